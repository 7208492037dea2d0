"""Faults in `adapters/`."""

from tests.mutations.fault import Fault

GATED = "tests/adapters/test_gated.py"
SOURCE = "tests/adapters/sources/test_source.py"
STORE = "tests/adapters/sources/test_store.py"
REGISTRY = "tests/adapters/registry"

FAULTS = (
    Fault(
        "adapters/kernels/gated.py",
        "beyond = place >= self.top_k[:, None]",
        "beyond = place > self.top_k[:, None]",
        GATED,
        "one member too many is routed to",
    ),
    Fault(
        "adapters/kernels/gated.py",
        "exponents.softmax(-1) * self.weight[:, None]",
        "exponents.softmax(-1)",
        GATED,
        "a pack's weight has no effect",
    ),
    Fault(
        "adapters/kernels/gated.py",
        "            found[:, self.products :] = 1.0\n",
        "            found[:, self.sums :] = 1.0\n",
        "tests/adapters/test_kinds_sum.py",
        "constants of adapters are left out",
    ),
    Fault(
        "adapters/kernels/gated.py",
        "gate[i, : len(own), : group.columns] =",
        "gate[i, :, : group.columns] =",
        GATED,
        "small groups add their first token's part more than once",
    ),
    Fault(
        "adapters/sets.py",
        "gate += len(m.ranks) if m.routed else 0",
        "gate += 1 if m.routed else 0",
        "tests/adapters/test_parts.py",
        "two packs of one set share gate rows",
    ),
    Fault(
        "adapters/sets.py",
        "for key in sorted(unique)",
        "for key in unique",
        "tests/adapters/test_parts.py tests/steering/test_adapters.py",
        "the same adapters in another order are another set",
    ),
    Fault(
        "adapters/formats/header.py",
        "if start != end:",
        "if start > end:",
        "tests/adapters/test_tensors.py",
        "tensors of a file may overlap",
    ),
    Fault(
        "adapters/formats/header.py",
        "& mask) == mask).any()",
        "& mask) == mask).all()",
        "tests/adapters/test_tensors.py",
        "one NaN in an adapter is not found",
    ),
    Fault(
        "adapters/sources/source.py",
        'any(part in (".", "..") for part in unquote(text).split("/"))',
        'any(part in (".", "..") for part in text.split("/"))',
        SOURCE,
        "%2e%2e leaves a folder",
    ),
    Fault(
        "adapters/sources/source.py",
        'text.startswith((f"{beginning}/", f"{beginning}@"))',
        "text.startswith(beginning)",
        SOURCE,
        "hf://acme allows hf://acme2",
    ),
    Fault(
        "adapters/sources/source.py",
        "real.is_relative_to(root.resolve())",
        "Path(source.place).is_relative_to(root.resolve())",
        SOURCE,
        "a link leads out of the roots",
    ),
    Fault(
        "adapters/sources/store.py",
        "            self.verify(digest)\n        target.chmod",
        "            pass\n        target.chmod",
        STORE,
        "a content that was changed on disk is used again",
    ),
    Fault(
        "adapters/sources/store.py",
        "if path.stat().st_mtime <= deadline:",
        "if True:",
        STORE,
        "contents that are about to be used are deleted",
    ),
    Fault(
        "adapters/registry/registry.py",
        "elif seen.attempts >= MOST_ATTEMPTS:",
        "elif False:",
        REGISTRY,
        "an adapter that kills its server is loaded for ever",
    ),
    Fault(
        "adapters/registry/registry.py",
        "if record is None or record.job != job.job or record.state not in WORKING:",
        "if record is None or record.state not in WORKING:",
        REGISTRY,
        "work that was superseded becomes ready",
    ),
    Fault(
        "adapters/registry/registry.py",
        "most_pins=most_pins)\n            if swapped",
        ")\n            if swapped",
        REGISTRY,
        "more are pinned than may be",
    ),
)
