"""What a critic's training run is asked to do, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.training.checked import Checked, bad
from adapters.training.errors import BadRecipe
from adapters.training.served import Served


@dataclass(frozen=True)
class CriticSettings(Checked):
    """One training run of a classifier that says whether the next token is critical.

    Args:
        body: folder of the model whose hidden states are read, safetensors, with its tokenizer.
        out: folder of the classifier, made at the end.
        label: the rule: `data`, `names`, `FILE.py:FUNCTION` or an address.
        data: JSONL file of ready replies; None: they are sampled.
        prompts: JSONL file of prompts to sample from; None with `data`.
        served: the server of the aligned model; None with `data`.
        adapter: folder of a PEFT LoRA adapter of the body, with which the aligned stream is served.
        probe: trains a head alone, on the hidden states of the frozen body.
        hidden: units of the probe's hidden layer; None: a linear probe.
        rank: LoRA rank of a classifier with a body of its own; None: all weights are trained.
        samples: replies for each prompt; ≥ 1.
        max_tokens: ids in the longest reply that is sampled; ≥ 1.
        temperature: of the samples; ≥ 0.
        top_p: of the samples, above 0, up to 1.
        epochs: passes over the training replies; None: 20 for a probe, else 3.
        batch: replies per step; ≥ 1.
        rate: peak learning rate; None: 1e-3 for a probe, 2e-4 with LoRA, 2e-5 without.
        warm_up: share of the steps in which the rate rises, 0 to 1; then it falls as a cosine.
        weight_decay: AdamW's, ≥ 0.
        pos_weight: what a critical token's loss is multiplied by, > 0; `auto`: tokens that are
            not critical / tokens that are.
        held_out: share of the prompts that is measured on, not trained on; 0 up to below 1.
        label_timeout_s: seconds that the rule may take for one reply; > 0.
        seed: of the samples, the split, the start and the order of the replies.
        save_every: steps between checkpoints; ≥ 1.
        device: torch's name of it, e.g. `cpu` or `cuda`.
        dtype: of the body's arithmetic, `float32` or `bfloat16`; what is trained stays float32.
    """

    # Folders, files, the server and the rule are compared by content.
    ELSEWHERE = frozenset(
        {"body", "adapter", "data", "prompts", "served", "label", "label_timeout_s", "out"}
        | {"save_every", "device"}
    )

    body: Path
    out: Path
    label: str
    data: Path | None = None
    prompts: Path | None = None
    served: Served | None = None
    adapter: Path | None = None
    probe: bool = False
    hidden: int | None = None
    rank: int | None = None
    samples: int = 4
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    epochs: int | None = None
    batch: int = 16
    rate: float | None = None
    warm_up: float = 0.05
    weight_decay: float = 0.01
    pos_weight: float | Literal["auto"] = 1.0
    held_out: float = 0.1
    label_timeout_s: float = 10.0
    seed: int = 0
    save_every: int = 200
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def passes(self) -> int:
        """Epochs, the default filled in."""
        return self.epochs if self.epochs is not None else 20 if self.probe else 3

    @property
    def peak(self) -> float:
        """The learning rate, the default filled in."""
        if self.rate is not None:
            return self.rate
        return 1e-3 if self.probe else 2e-5 if self.rank is None else 2e-4

    def check(self) -> None:
        """Raises BadRecipe for the first value that cannot be used."""
        self._check_sources()
        self._check_kind()
        for key in ("samples", "max_tokens", "batch", "save_every"):
            self._number(key, "≥ 1", lambda v: v >= 1)
        for key in ("epochs", "hidden", "rank"):
            if getattr(self, key) is not None:
                self._number(key, "≥ 1", lambda v: v >= 1)
        if self.rate is not None:
            self._number("rate", "> 0", lambda v: v > 0)
        if self.pos_weight != "auto":
            self._number("pos_weight", "> 0, or auto", lambda v: v > 0)
        for key in ("weight_decay", "temperature"):
            self._number(key, "≥ 0", lambda v: v >= 0)
        if self.temperature == 0 and self.samples > 1 and self.data is None:
            raise bad("samples", self.samples, "1, as replies at --temperature 0 are all the same")
        self._number("top_p", "above 0, up to 1", lambda v: 0 < v <= 1)
        self._number("warm_up", "0 to 1", lambda v: 0 <= v <= 1)
        self._number("held_out", "0 up to below 1", lambda v: 0 <= v < 1)
        self._number("label_timeout_s", "> 0", lambda v: v > 0)
        self._check_dtype()

    def _check_sources(self) -> None:
        if self.data is not None:
            for key in ("prompts", "served"):
                if getattr(self, key) is not None:
                    raise BadRecipe(
                        "replies are sampled or ready, not both",
                        field="--server" if key == "served" else "--prompts",
                        allowed=f"not with --data {self.data}",
                    )
        elif self.served is None or self.prompts is None:
            raise BadRecipe(
                "missing",
                field="--server" if self.served is None else "--prompts",
                allowed="--server and --prompts to sample replies, or --data with ready ones",
            )
        elif self.label == "data":
            raise bad("label", "data", "with --data; else names, FILE.py:FUNCTION, http(s)://…")

    def _check_kind(self) -> None:
        if self.hidden is not None and not self.probe:
            raise bad("hidden", self.hidden, "with --probe")
        if self.rank is not None and self.probe:
            raise bad("rank", self.rank, "without --probe, whose body is frozen")
        if self.adapter is not None and not self.probe:
            raise bad(
                "adapter",
                str(self.adapter),
                "with --probe; a classifier with a body of its own does not read the aligned one's",
            )
