"""A server with value streams, classifiers and an adapter, and what its answers must be.

Expected numbers come from `transformers` and PEFT, a full forward for every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from steering.method import Logits, log_softmax
from tests.adapters.make import make_lora
from tests.adapters.models import Applied, adapted
from tests.engine.heads import Headed, classifier, last_hidden, probe, valued
from tests.models import EOS
from tests.reference import load, scores
from tests.server.live import document

HEADS = ("value", "kind", "critic", "probe")
MOST = 12
"""`steering.max_top_k` and `steering.max_best_of` of the server."""


def make_headed(root: Path) -> dict[str, Headed]:
    """Streams with heads beside the models of `tests.server.live`, and an adapter of the base."""
    make_lora(root / "loras" / "tuned", root / "base", seed=50)
    return {
        "value": valued(root / "value", "qwen2", 21),
        "kind": valued(root / "kind", "llama", 22, port=True),
        "critic": classifier(root / "critic", "gpt2", 12, tokens=True, labels=2),
        "probe": probe(root / "probe", root / "base", "base", 15),
    }


def configuration() -> dict[str, Any]:
    """The server's configuration."""
    streams = {
        "plain": {"model": "./plain"},
        "twin": {"same_as": "base"},
        "value": {"model": "./value", "head": "value"},
        "kind": {"model": "./kind", "head": "value"},
        "critic": {"model": "./critic", "head": "classifier"},
        "probe": {"on": "base", "head": "classifier", "path": "./probe"},
    }
    profiles = {
        "kinder": {"method": "value_augmented", "values": [{"stream": "kind", "strength": 1.5}],
                   "top_k": 6,
                   "limits": {"strength": [0, 2]}},
        "factual": {"method": "critical_tokens", "pretrained": "plain", "classifier": "critic"},
        "picky": {"method": "best_of_n", "n": 4, "value": "value",
                  "chat_template": "{{ messages[0].content }}"},
        "seeking": {"method": "guided_search", "k": 2, "block": {"tokens": 3},
                    "score": {"value": "value"},
                    "chat_template": "{{ messages[0].content }}"},
    }  # fmt: skip
    adapters = {
        "roots": ["./loras"], "max_loaded": 2, "max_rank": 16,
        "preload": [{"name": "tuned", "source": "./loras/tuned"}],
    }  # fmt: skip
    found = document(
        streams=streams, profiles=profiles, adapters=adapters,
        registry={"directory": "./headed-state"},
        chat={},
        steering={"max_top_k": MOST, "max_best_of": MOST},
    )  # fmt: skip
    found["server"]["sse_keep_alive_s"] = 0.1
    return found


@dataclass
class Slow:
    """The formulas, one position at a time.

    Args:
        root: folder of the models.
        heads: from `make_headed`.
        lora: whether the base has its adapter.
    """

    root: Path
    heads: Mapping[str, Headed]
    lora: bool = False
    critical: list[float] = field(default_factory=list)
    """The classifier's probability at each position that was asked for."""

    @property
    def base(self) -> Any:
        """The base, with its adapter."""
        folder = self.root / "base"
        return adapted(folder, (Applied(self.root / "loras" / "tuned"),) if self.lora else ())

    def log_p(self, stream: str, ids: Sequence[int]) -> Logits:
        """The log-probabilities of the next token, [V]."""
        folder = {"twin": "base"}.get(stream, stream)
        model = self.base if stream == "base" else load(self.root / folder)
        return log_softmax(scores(model, ids)[-1])

    def head(self, name: str, ids: Sequence[int]) -> float:
        """What a head says after `ids`."""
        if name != "probe":
            return self.heads[name].read(ids)
        tensors = load_file(self.root / "probe" / "model.safetensors")
        weight, bias = (tensors[n].double() for n in ("weight", "bias"))
        return float(weight[0] @ last_hidden(self.base, ids) + bias[0])

    def value_augmented(self, spec: Mapping[str, Any], ids: Sequence[int]) -> Logits:
        """The scores of `value_augmented`, normalised."""
        found = self.log_p("base", ids)
        order = np.argsort(-found, kind="stable")
        k = spec.get("top_k", MOST)
        # Else rounding may decide who is a candidate, and the test says nothing.
        assert found[order[k - 1]] - found[order[k]] > 1e-5, "a tie: take another prompt"
        added = np.zeros_like(found)
        for term in spec["values"]:
            after = {int(j): self.head(term["stream"], [*ids, int(j)]) for j in order[:k]}
            if EOS in after:
                after[EOS] = self.head(term["stream"], ids)
            for j, value in after.items():
                added[j] += term.get("strength", 1.0) * (value - np.mean(list(after.values())))
        return log_softmax(found + added)

    def critical_tokens(self, spec: Mapping[str, Any], ids: Sequence[int]) -> Logits:
        """The log-probabilities of `critical_tokens`."""
        aligned = self.log_p(spec.get("aligned", "base"), ids)
        known = self.log_p(spec["pretrained"], ids)
        known[EOS] = -np.inf
        q = 1 / (1 + np.exp(-self.head(spec["classifier"], ids)))
        self.critical.append(float(q))
        with np.errstate(divide="ignore"):
            if spec.get("mode") == "soft":
                p, k = np.exp(aligned), np.exp(log_softmax(known))
                mixed = (1 - q) * p + q * (1 - p[EOS]) * k
                mixed[EOS] = p[EOS]
                found: Logits = np.log(mixed)
                return found
            if q > spec.get("threshold", 0.5):
                only: Logits = np.log(np.eye(known.size)[known.argmax()])
                return only
        return aligned
