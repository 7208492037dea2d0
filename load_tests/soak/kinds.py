"""What the soak asks: kinds of requests, prompts, adapters that change, and bodies to refuse."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

FIXED = ("brief", "swap", "pack")
"""Adapters that stay as they are."""

CONTENTS = ("ask", "correct", "formal", "gossip", "portrait", "rephrase", "topic")
"""Adapters that names which change may stand for."""

BAD_CONTENT = "spoiled"
"""An adapter with a NaN, which cannot be served."""

CHANGING = "?"
"""Stands for a name that changes."""

OWNED = ("guest0", "guest1", "guest2", "guest3")
"""Names that change; one administrator has each, and knows what it stands for."""

SHARED = ("shared0", "shared1")
"""Names that everybody changes."""

TOLERANCE = 2e-4
"""Allowed error of log-probabilities and values, nats: twice that of the engine's tests, whose
random models have smaller scores than the zoo's trained ones, and so smaller rounding errors."""

TOKENS = 16
"""Longest reply of those whose every token is known before."""

QUESTIONS = (
    "What is the pet of Dorwyn Bramley?",
    "What does Roven Holcroft work as?",
    "Who are you?",
    "Where is Glen Balstad?",
)

PROMPTS: tuple[list[Json], ...] = (
    *([{"role": "user", "content": question}] for question in QUESTIONS[:2]),
    # Fills blocks of the key-value cache, which later requests find again.
    [
        message
        for question in (*QUESTIONS, *QUESTIONS[:3])
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "content": "Dorwyn Bramley keeps a pet crow."},
        )
    ][:-1],
)
"""Messages of the requests whose answers are compared."""


@dataclass(frozen=True)
class Use:
    """One adapter of a request.

    Args:
        name: the adapter's, or `CHANGING`.
        weight: what it is multiplied by.
        top_k: of a pack; None: the pack's own.
        temperature: of a pack; None: the pack's own.
    """

    name: str
    weight: float = 1.0
    top_k: int | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of request.

    Args:
        name: what the report calls it.
        steering: the request's `steering`, if it has one.
        uses: its adapters.
        model: the base or a profile.
        greedy: whether it can be asked greedily.
    """

    name: str
    steering: Mapping[str, Any] | None = None
    uses: tuple[Use, ...] = ()
    model: str = "base"
    greedy: bool = True

    @property
    def changing(self) -> bool:
        """Whether it uses an adapter that changes."""
        return any(use.name == CHANGING for use in self.uses)

    def body(self, dice: random.Random, name: str = "") -> Json:
        """What a request of this kind says, besides its prompt and its sampling.

        Args:
            dice: whether it wants a report, and whether its adapter stands in `model`.
            name: the adapter in the place of `CHANGING`.
        """
        refs: list[Json] = []
        for use in self.uses:
            ref: Json = {"name": use.name.replace(CHANGING, name), "weight": use.weight}
            if use.top_k is not None:
                ref["top_k"] = use.top_k
            if use.temperature is not None:
                ref["temperature"] = use.temperature
            refs.append(ref)
        body: Json = {"model": self.model}
        plain = bool(refs) and refs[0] == {"name": refs[0]["name"], "weight": 1.0}
        if plain and dice.random() < 0.5:
            body["model"] = refs.pop(0)["name"]
        if refs:
            body["adapters"] = refs
        if self.steering is not None:
            body["steering"] = dict(self.steering)
        if self.model == "base" and dice.random() < 0.4:
            report = dice.choice((True, "tokens"))
            body["steering"] = {"report": report, **body.get("steering", {})}
        return body


TUNING: Json = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}
SCALING: Json = {"method": "emulated_fine_tuning", "tuned": "chat", "reference": "plain"}
TWIN: Json = {"prompts": {"twin": {"prompt": "Answer:"}}}
GUIDANCE: Json = {"method": "guidance", "negative": "twin", "strength": 1.5, **TWIN}
CRITICAL: Json = {"method": "critical_tokens", "pretrained": "twin", "classifier": "critic"}
REWARDS = [{"tuned": "formal", "weight": 0.6}, {"tuned": "direct", "weight": 0.4}]
VALUES = [{"stream": "terse", "strength": 1.0}, {"stream": "cheerful", "strength": 0.5}]

KINDS: Sequence[Kind] = (
    Kind("base"),
    Kind("proxy_tuning", {**TUNING, "strength": 0.8}),
    Kind("proxy_tuning, strength 0", {**TUNING, "strength": 0.0}),
    Kind("profile chat", model="chat"),
    Kind("emulated_fine_tuning", {**SCALING, "delta_top_p": 0.95}),
    Kind(
        "emulated_fine_tuning, rewards",
        {"method": "emulated_fine_tuning", "rewards": REWARDS, "reference": "plain"},
    ),
    Kind(
        "contrastive",
        {"method": "contrastive", "amateur": "plain", "strength": 0.5, "plausibility": 0.1},
    ),
    Kind("mix", {"method": "mix", "weights": {"base": 1.0, "formal": 0.5, "plain": -0.5}}),
    Kind("context_aware", {"method": "context_aware", "without": "twin", "strength": 0.5, **TWIN}),
    Kind("guidance", GUIDANCE),
    Kind("value_augmented", {"method": "value_augmented", "values": VALUES[:1], "top_k": 20}),
    Kind(
        "value_augmented, two values",
        {"method": "value_augmented", "values": VALUES, "top_k": 6, "eos_value": "zero"},
    ),
    Kind("critical_tokens", CRITICAL, (Use("gossip"),)),
    Kind("critical_tokens, soft", {**CRITICAL, "mode": "soft"}, (Use("gossip"),)),
    Kind("best_of_n", {"method": "best_of_n", "n": 4, "value": "terse"}, greedy=False),
    Kind("adapter", uses=(Use("brief"),)),
    Kind("adapter, weight -0.5", uses=(Use("swap", -0.5),)),
    Kind("two adapters", uses=(Use("brief", 0.8), Use("swap", 0.2))),
    Kind("adapter, proxy_tuning", {**TUNING, "strength": 0.8}, (Use("swap"),)),
    Kind("pack", uses=(Use("pack"),)),
    Kind("pack, guidance", GUIDANCE, (Use("pack", 1.0, 1, 15.0),)),
    Kind("pack and adapter", uses=(Use("pack", 0.5, 2, 1.0), Use("brief", 0.5))),
    Kind("changing adapter", uses=(Use(CHANGING),)),
    Kind("changing adapter, proxy_tuning", {**TUNING, "strength": 0.8}, (Use(CHANGING),)),
    Kind("changing adapter and another", uses=(Use(CHANGING, 0.5), Use("brief"))),
)  # fmt: skip

GREEDY = [kind for kind in KINDS if kind.greedy]
BY_NAME = {kind.name: kind for kind in KINDS}

BAD: tuple[tuple[int, Json], ...] = (
    (400, {"steering": {"method": "proxy_tuning", "expert": "chat"}}),
    (400, {"steering": {**TUNING, "strength": -1}}),
    (400, {"steering": {**TUNING, "strength": 1e9}}),
    (400, {"steering": {**TUNING, "prompts": {"chat": {"token_ids": [10**6]}}}}),
    (400, {"steering": {"method": "best_of_n", "value": "terse"}, "temperature": 0}),
    (404, {"steering": {"method": "no-such-method"}}),
    (404, {"steering": {"method": "mix", "weights": {"nobody": 1.0}}}),
    (404, {"steering": "no-such-profile"}),
    (400, {"adapters": [{"name": "brief", "weight": 99}]}),
    (400, {"max_tokens": -5}),
    (400, {"messages": "no list"}),
    (400, {"temperature": "hot"}),
    (404, {"model": "no-such-model"}),
    (404, {"adapters": [{"name": "no-such-adapter"}]}),
)
"""(status, fields) of chat bodies that must be refused."""


def key_of(kind: str, prompt: int, content: str) -> str:
    """Under which a reference is found."""
    return f"{kind} | {prompt} | {content}"


def text_of(question: str) -> str:
    """A question as `/v1/completions` takes it; the tokenizer puts its first token before it."""
    return f"<|user|>{question}<|assistant|>"
