"""Which tokens end a stream's texts: as its files say, where the base has the same token."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from server.checks.diagnosis import Diagnosis
from server.checks.end_tokens import end_tokens
from steering.vocabulary import Vocabulary, overlap


def stream(root: Path, name: str, **files: Any) -> Any:
    folder = root / name
    folder.mkdir()
    for file, eos in files.items():
        (folder / f"{file}.json").write_text(json.dumps({"eos_token_id": eos}))
    return SimpleNamespace(checkpoint=SimpleNamespace(folder=folder))


def test_ends_that_the_base_lacks_and_knows(tmp_path: Path) -> None:
    words = {i: f"t{i}" for i in range(10)}
    special = frozenset(range(5, 10))
    base = Vocabulary(words, 10, special)
    own = Vocabulary({**words, 8: "other", 11: "t11"}, 12, special)
    diagnosis = SimpleNamespace(
        streams={
            "base": stream(tmp_path, "base", generation_config=5, config=5),
            "expert": stream(tmp_path, "expert", generation_config=[5, 7, 8, 11], config=6),
            "plain": stream(tmp_path, "plain"),
        },
        overlaps={name: overlap(base, own, name=name).to_wire() for name in ("expert", "plain")},
    )
    tokenizers = {name: SimpleNamespace(eos_token_id=eos)
                  for name, eos in (("base", 5), ("expert", 9), ("plain", None))}  # fmt: skip
    # 8 is another token of the base, which has no 11.
    assert end_tokens(cast(Diagnosis, diagnosis), tokenizers) == {
        "expert": (6, 7, 9), "plain": (),
    }  # fmt: skip
