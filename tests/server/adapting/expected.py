"""What requests must answer: PEFT, a plain MeteoRA forward and sums of scores, each run alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.adapters.make import make_lora, make_native
from tests.adapters.models import Applied, adapted
from tests.reference import one_thread
from tests.server.adapting.answers import Expected

TOKENS = 6

PROMPTS = (
    [11, 40, 7, 93, 5, 61, 22, 8, 15, 33],
    [(37 * i * i + 11 * i) % 480 + 10 for i in range(75)],
)
"""The second one fills blocks of the key-value cache, which later requests find again."""

CONTENTS = ("v0", "v1", "v2", "v3")
"""Adapters of the base that are loaded and replaced while requests run."""


def make_adapters(root: Path, models: Path) -> dict[str, Path]:
    """Folders by name: `a`, `b`, the contents, `f` for the stream `chat`, and a pack."""
    base = models / "base"
    found = {name: make_lora(root / name, base, seed=10 + i)
             for i, name in enumerate(("a", "b", *CONTENTS))}  # fmt: skip
    found["f"] = make_lora(root / "f", models / "chat", seed=30)
    found["pack"] = make_native(root / "pack", base, tasks=3, seed=40)
    return found


@dataclass(frozen=True)
class Kind:
    """One kind of request.

    Args:
        used: (adapter, weight, top_k, temperature) on the base; the last two None for the pack's
            own or where there is no pack.
        on_chat: adapters of the stream `chat`.
        strength: of proxy-tuning with `chat` and `plain`; 0: not steered.
        prompt: which of `PROMPTS`.
    """

    used: tuple[tuple[str, float, int | None, float | None], ...] = ()
    on_chat: tuple[str, ...] = ()
    strength: float = 0.0
    prompt: int = 0

    def body(self, names: dict[str, str], *, as_model: bool = False) -> dict[str, Any]:
        """The request.

        Args:
            names: what the server calls an adapter, where that is something else.
            as_model: give the first adapter as the model; its weight must be 1.
        """
        refs: list[dict[str, Any]] = []
        for name, weight, top_k, temperature in self.used:
            ref: dict[str, Any] = {"name": names.get(name, name), "weight": weight}
            if top_k is not None:
                ref |= {"top_k": top_k, "temperature": temperature}
            refs.append(ref)
        refs += [{"name": names.get(name, name)} for name in self.on_chat]
        body: dict[str, Any] = {
            "model": "big", "prompt": PROMPTS[self.prompt], "max_tokens": TOKENS, "temperature": 0,
            "logprobs": 1, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        if as_model:
            assert refs[0].pop("weight") == 1.0
            body["model"] = refs.pop(0)["name"]
        if refs:
            body["adapters"] = refs
        if self.strength:
            body["steering"] = {"method": "proxy_tuning", "expert": "chat",
                                "anti_expert": "plain", "strength": self.strength}  # fmt: skip
        return body


@dataclass
class Oracle:
    """Answers by kind, each computed once.

    Args:
        models: a folder with `base`, `chat` and `plain`.
        folders: adapters by name.
        tokens: of an answer.
    """

    models: Path
    folders: dict[str, Path]
    tokens: int = TOKENS
    known: dict[Kind, Expected] = field(default_factory=dict)

    def __call__(self, kind: Kind) -> Expected:
        if kind not in self.known:
            with one_thread():
                self.known[kind] = self._decode(kind)
        return self.known[kind]

    def _decode(self, kind: Kind) -> Expected:
        base = self._model("base", kind.used)
        chat = self._model("chat", tuple((name, 1.0, None, None) for name in kind.on_chat))
        ids = list(PROMPTS[kind.prompt])
        rows: list[tuple[int, float, int, float]] = []
        for _ in range(self.tokens):
            scores = _last(base, ids)
            if kind.strength:
                plain = self._model("plain", ())
                scores = scores + kind.strength * (_last(chat, ids) - _last(plain, ids))
            (first, second), (best, next_best) = (
                x.tolist() for x in scores.log_softmax(-1).topk(2)
            )
            rows.append((best, first, next_best, second))
            ids.append(best)
        columns = tuple(zip(*rows, strict=True))
        return Expected(columns[0], columns[1], columns[2], columns[3])

    def _model(
        self, name: str, used: tuple[tuple[str, float, int | None, float | None], ...]
    ) -> Any:
        applied = tuple(
            Applied(self.folders[adapter], weight, top_k, temperature)
            for adapter, weight, top_k, temperature in used
            if weight
        )
        return adapted(self.models / name, applied)


def _last(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        return found
