"""What is tried of each family: as base, twin, companion of the family before it, and adapted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel

from adapters.formats.base import base_shapes
from steering.engine_args import StreamSource, adapter_engine_args
from tests.adapters.make import make_lora
from tests.adapters.vectors import make_reft
from tests.engine.driver import ERRORS, Case, Engine, Use, logprobs, tokens
from tests.family_models import FAMILIES as _CONFIGS
from tests.family_models import WINDOW
from tests.models import ARCHITECTURES, SPECIAL, VOCAB_SIZE

FAMILIES = (
    "llama3", "gemma2", "qwen2.5", "gpt-oss", "qwen3", "gemma3", "mistral", "mixtral", "phi3",
    "cohere2", "cohere", "olmo3", "granite", "qwen3-moe", "olmo2", "glm4", "stablelm", "falcon",
    "bloom", "gpt2", "opt",
)  # fmt: skip
"""Each is the base of an engine, whose companion is the next; the last one's is the first."""

ONE_OF_EACH = ("gemma2", "gpt-oss", "phi3", "bloom")
"""The mechanisms once: a sliding window and capped scores beside biases; experts and sinks beside
norms of q and k; fused projections beside parallel blocks; slopes beside learned positions."""

ROLES = ("base", "twin", "companion", "adapters", "taps")

TOLERANCE = 1e-4
"""Nats, float32."""

_NOT_ADAPTED = ("embed", "wte", "wpe", "lm_head", "experts", "gate.", "router", "norm", "altup",
                "laurel", "per_layer")  # fmt: skip
"""Parts of the names of two-dimensional weights that the adapters leave alone."""


def companion_of(family: str) -> str:
    """The family that is the companion in a family's engine."""
    return FAMILIES[(FAMILIES.index(family) + 1) % len(FAMILIES)]


def engine_of(family: str, folder: Path) -> Engine:
    """A family as base, with a twin, the next family as companion, and an adapter for each."""
    streams: dict[str, tuple[str, int] | str] = {
        "other": (companion_of(family), VOCAB_SIZE),
        "twin": "base",
    }
    with _as_they_are(family, companion_of(family)):
        slots = adapter_engine_args(4, 8)
        taps = {
            f"{on}-{layer}": StreamSource(on=on, layer=layer, norm=norm)
            for on in ("base", "other")
            for layer, norm in ((0, False), (1, True))
        }
        base_of = family, VOCAB_SIZE
        found = Engine(folder, base_of, streams, taps=taps, vectors=True, **slots)
    families = {"base": family, "other": companion_of(family)}
    for stream in families:
        base = found.folders[stream]
        targets = sorted(
            name.removesuffix(".weight").rsplit(".", 1)[-1]
            for name in base_shapes(base).tensors
            if base_shapes(base).linear(name.removesuffix(".weight"))
            and not any(part in name for part in _NOT_ADAPTED)
            # PEFT takes these names for the experts' too.
            and not (families[stream].startswith("deepseek") and ".mlp." in name)
        )
        lora = make_lora(folder / f"lora-{stream}", base, seed=7, targets=sorted(set(targets)))
        found.load_adapters({stream: lora}, stream)
        config = AutoConfig.from_pretrained(base)
        behind = range(config.num_hidden_layers)
        reft = make_reft(folder / f"reft-{stream}", config.hidden_size, behind, seed=8, rank=2)
        found.load_adapters({f"{stream}-vectors": reft}, stream)
    return found


@contextmanager
def _as_they_are(*families: str) -> Iterator[None]:
    """Undoes what vLLM changes in the classes of `transformers` that it runs itself (OLMo's)."""
    kinds = [
        AutoModel._model_mapping[type((ARCHITECTURES | _CONFIGS)[name](vocab_size=VOCAB_SIZE))]
        for name in families
    ]
    before = [{key: vars(kind).get(key) for key in ("__init__", "__call__")} for kind in kinds]
    yield
    for kind, own in zip(kinds, before, strict=True):
        for key, value in own.items():
            if value is not None:
                setattr(kind, key, value)
            elif key in vars(kind):
                delattr(kind, key)


def cases(seed: int) -> Iterator[tuple[str, Case]]:
    """(role, case): prompts on both sides of the window, steered and not, in one batch."""
    rng = random.Random(seed)

    def prompt(low: int, high: int) -> list[int]:
        return [rng.randrange(len(SPECIAL), VOCAB_SIZE) for _ in range(rng.randint(low, high))]

    long, short = (2 * WINDOW + 10, 3 * WINDOW), (3, WINDOW - 10)
    guidance: dict[str, Any] = {"method": "guidance", "negative": "twin", "strength": 1.4}
    mix: dict[str, Any] = {"method": "mix", "weights": {"base": 0.6, "other": 0.7}}
    yield "base", Case(prompt(*long), max_tokens=8)
    yield "base", Case(prompt(*short), max_tokens=8, arrives=2)
    inner = {"base": 0.7, "base-0": 0.2, "base-1": 0.3}
    yield "taps", Case(prompt(*long), {"method": "mix", "weights": inner}, max_tokens=8)
    dola = {"method": "dola", "layers": ["base-0", "base-1"]}
    yield "taps", Case(prompt(*short), dola, max_tokens=8, arrives=1)
    inner = {"base": 0.7, "other-0": 0.2, "other-1": 0.3}
    yield "companion", Case(prompt(*short), {"method": "mix", "weights": inner}, max_tokens=8)
    yield "twin", Case(prompt(*long), guidance, {"twin": prompt(*short)}, max_tokens=8)
    yield "twin", Case(prompt(*short), guidance, {"twin": prompt(*long)}, max_tokens=8, arrives=1)
    yield "companion", Case(prompt(*long), mix, max_tokens=8)
    yield "companion", Case(prompt(*short), mix, {"other": prompt(*long)}, max_tokens=8, arrives=3)
    yield "companion", Case(prompt(*long), mix, {"other": prompt(*short)}, max_tokens=8, arrives=1)
    yield "adapters", Case(prompt(*long), max_tokens=8, adapters=(Use("base"),))
    yield "adapters", Case(
        prompt(*short), mix, {"other": prompt(*long)}, 8, 2,
        adapters=(Use("base", 0.6), Use("other", stream="other")),
    )  # fmt: skip
    yield (
        "adapters",
        Case(
            prompt(*long),
            guidance,
            {"twin": prompt(*short)},
            8,
            adapters=(Use("base", stream="twin"),),
        ),
    )


def more_cases(seed: int) -> Iterator[tuple[str, Case]]:
    """Vectors behind every decoder layer, some of the prompt's or the reply's positions."""
    rng = random.Random(seed)
    for where in ("", '"reply"'):
        ids = [rng.randrange(len(SPECIAL), VOCAB_SIZE) for _ in range(WINDOW + 20)]
        yield "adapters", Case(ids, max_tokens=5, adapters=(Use("base-vectors", 0.5, where=where),))


def errors(engine: Engine, seed: int) -> dict[str, float]:
    """Role → the largest error of a log-probability, nats; infinite where a token differs."""
    tried = [*cases(seed), *more_cases(seed)]
    found = dict.fromkeys(ROLES, 0.0)
    outputs = engine.run([case for _, case in tried])
    for (role, case), output in zip(tried, outputs, strict=True):
        found[role] = max(found[role], error(engine, case, output))
    return found


def error(engine: Engine, case: Case, output: Any) -> float:
    """The largest error of a case's log-probabilities, nats; infinite where a token differs."""
    steps = engine.reference(case)
    if tokens(output) != [s.token for s in steps]:
        return float("inf")
    pairs = zip(logprobs(output), steps, strict=True)
    found = [abs(got - step.logprob) for got, step in pairs]
    ERRORS.extend(found)
    return max(found)
