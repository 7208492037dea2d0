"""A reward at decoding time: value-augmented sampling, a vector, choices among replies, prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import AutoTokenizer

from smollm.evidence.asking import CHAT, ask, log_probs
from smollm.evidence.claim import Cell, Claim, Mean, Plot, Point, Table, above
from smollm.evidence.sunny import CHEERS, Message, Requests, plain
from smollm.evidence.sunny_made import (
    ENGINE,
    LAYERS,
    SAMPLES,
    TOKENS,
    Made,
    with_value,
    with_vector,
)
from smollm.evidence.vader import compound
from smollm.evidence.work import Work

STRENGTHS = (5.0, 10.0, 20.0, 40.0)
"""β of value-augmented sampling."""
WEIGHTS = (0.25, 0.5, 1.0)
"""Of the vector; 1 is what its training chose."""
POOL = 8
"""Plain replies to each request; best of n chooses among the first n of them."""
NS = (2, 4, 8)
K = 4
"""Of how many replies, or blocks, the value model chooses one."""
VALIDATION, TEST = 24, 66
"""Requests that are asked."""
BLOCK = 8
"""Tokens of a block of guided search."""
VALUE = "value"
"""The stream with the value model."""
PLAIN = "the base, asked plainly"

Asking = Callable[[str], list[Message]]
"""A request → the conversation that is asked."""


@dataclass(frozen=True)
class Drawn:
    """A reply.

    Args:
        text: of it.
        ids: its tokens, with the one that ended it.
        own: log-probability of each under what drew it, nats.
        plain: the same under the plain model; empty: not known yet.
        passes: forward passes per token, by stream.
    """

    text: str
    ids: tuple[int, ...]
    own: tuple[float, ...]
    plain: tuple[float, ...]
    passes: Mapping[str, float]


@dataclass(frozen=True)
class Way:
    """How replies of one way did on some requests.

    Args:
        name: for tables.
        reward: of the replies.
        kl: from the plain model, nats for a reply; a number where it is a bound.
        surprise: of a reply's tokens under the plain model, nats for a token.
        passes: forward passes per token of the reply, by stream.
    """

    name: str
    reward: Mean
    kl: Mean | float
    surprise: Mean
    passes: str

    @property
    def nats(self) -> float:
        """The KL as one number."""
        return self.kl.value if isinstance(self.kl, Mean) else self.kl

    @property
    def perplexity(self) -> Mean:
        """Of the replies under the plain model."""
        found = self.surprise
        return Mean(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.of)

    @property
    def row(self) -> tuple[Cell, ...]:
        """For the table."""
        kl = self.kl if isinstance(self.kl, Mean) else f"at most {self.kl:.2f}"
        return self.name, self.reward, kl, self.perplexity, self.passes

    def point(self, x: float) -> Point:
        """The reward over some x."""
        return x, self.reward.value, self.reward.low, self.reward.high


def run(work: Work) -> Claim:
    """Measures the claim."""
    requests = Requests.made(work.seed)
    found = with_value(work, requests)
    with work.server(config(found)) as url:
        with_vector(found, work, requests, url)
        return _Reward(work, url, requests).claim()


def config(found: Made) -> dict[str, Any]:
    """Of the server: the value model as a stream, and room for vectors."""
    return {
        "streams": {VALUE: {"model": str(found.value), "head": "value"}},
        "adapters": found.adapters,
        "steering": {"strength": [0, max(STRENGTHS)]},
        "engine": ENGINE,
    }


def valued(strength: float) -> dict[str, Any]:
    """The part of a request that draws by values."""
    values = [{"stream": VALUE, "strength": strength}]
    return {"steering": {"method": "value_augmented", "values": values, "eos_value": "model",
                         "report": "tokens"}}  # fmt: skip


def sunny(weight: float) -> dict[str, Any]:
    """The part of a request that adds the vector."""
    return {"adapters": [{"name": "sunny", "weight": weight}]}


def best_of(n: int) -> dict[str, Any]:
    """The part of a request whose reply the value model chooses."""
    return {"steering": {"method": "best_of_n", "n": n, "value": VALUE, "report": True}}


def searched(k: int) -> dict[str, Any]:
    """The part of a request whose blocks the value model chooses."""
    return {"steering": {"method": "guided_search", "k": k, "block": {"tokens": BLOCK},
                         "score": {"value": VALUE}, "report": True}}  # fmt: skip


def bound(n: int) -> float:
    """KL of the best of n draws from one draw, at most; nats (Beirami et al., arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class _Reward:
    """The measurements.

    Args:
        work: see there.
        url: of the server.
        requests: neutral ones.
    """

    work: Work
    url: str
    requests: Requests

    def claim(self) -> Claim:
        tried = {c.name: self._way(f"prompt: {c.name}", self.validation, c.messages)
                 for c in CHEERS}  # fmt: skip
        best = max(tried, key=lambda name: tried[name].reward.value)
        dials = {s: self._valued(s, self.validation) for s in STRENGTHS}
        within = [s for s in STRENGTHS if dials[s].nats <= tried[best].nats] or [min(STRENGTHS)]
        strength = max(within, key=lambda s: dials[s].reward.value)
        prompts = self._prompts(tried, best)
        values = {s: self._valued(s, self.test) for s in STRENGTHS}
        vectors = [self._sunny(w, self.test) for w in WEIGHTS]
        first, by_reward = self._pool()
        by_value, search = self._by_value(), self._searched()
        ours, theirs = values[strength].reward, prompts[best].reward
        return Claim(
            name="reward",
            title="A reward, at decoding time",
            claim="A value model trained by `coxswain train value` raises a reward further than "
            "the best prompt does, at no more KL from the plain model.",
            holds=above(ours, theirs),
            best_prompt=theirs,
            ours=ours,
            how=self._how(),
            tables=(
                _table(
                    "Replies to neutral requests, on the test split",
                    [first, *prompts.values(), *vectors, *values.values(), *by_reward, by_value,
                     search],
                    f"Chosen on the validation split: β {strength:g}, the prompt `{best}`. A pass "
                    "of the value stream reads 20 candidates with "
                    f"{LAYERS} of the base's 30 layers.",
                ),
                _table("On the validation split", [*tried.values(), *dials.values()]),
            ),
            plots=_plots(
                {
                    "value-augmented, by β": [first, *values.values()],
                    "the vector, by weight": [first, *vectors],
                    "best of n, by the reward itself": [first, *by_reward],
                    by_value.name: [by_value],
                    search.name: [search],
                    **{way.name: [way] for way in prompts.values()},
                }
            ),
            examples=self._examples(strength),
        )  # fmt: skip

    def _examples(self, strength: float) -> tuple[tuple[str, str, str], ...]:
        some = self.test[:3]
        asked = [plain(request) for request in some]
        before, after = (self._drawn(asked, more) for more in ({}, valued(strength)))
        return tuple(
            (request, a.text, b.text)
            for request, (a, *_), (b, *_) in zip(some, before, after, strict=True)
        )

    @property
    def validation(self) -> tuple[str, ...]:
        return self.requests.validation[: self.work.few(VALIDATION)]

    @property
    def test(self) -> tuple[str, ...]:
        return self.requests.test[: self.work.few(TEST)]

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.work.model)

    def _how(self) -> str:
        return (
            "The reward is VADER's compound score of a reply, −1 to 1. Requests are about everyday "
            "things that nobody feels much about; no thing is in two splits. The value model is "
            f"the base's first {LAYERS} layers with a value head, trained on {SAMPLES} replies to "
            f"each of {len(self.requests.train)} training requests. The vector is the mean "
            "difference of the states of the best and the worst of the same replies; "
            "`coxswain train vector` chose its layer and weight. All replies are drawn at "
            f"temperature 1, at most {TOKENS} tokens. KL from the plain model: the mean over "
            "replies of log p(reply) by what drew it, less that by the plain model after the plain "
            "request; of choices among replies the known upper bound, log n − (n − 1)/n for each "
            "choice. Perplexity is the plain model's."
        )

    def _drawn(
        self, asked: Sequence[Sequence[Message]], more: Mapping[str, Any], by_plain: bool = False
    ) -> list[list[Drawn]]:
        """The replies to each conversation.

        Args:
            asked: conversations.
            more: goes into every request.
            by_plain: the plain model draws the tokens after a plain request.
        """
        bodies = [
            {"messages": messages, "temperature": 1.0, "max_tokens": TOKENS, "seed": 1000 * i,
             "return_token_ids": True, "logprobs": True, "steering": {"report": True}, **more}
            for i, messages in enumerate(asked)
        ]  # fmt: skip
        found = ask(self.url, CHAT, bodies, at_once=32)
        return [[_drawn_of(answer, c, by_plain) for c in answer["choices"]] for answer in found]

    def _plainly(
        self, requests: Sequence[str], found: Sequence[Drawn]
    ) -> Sequence[Sequence[float]]:
        """Log-probabilities under the plain model, after the plain requests."""
        if all(one.plain for one in found):
            return [one.plain for one in found]
        prompts = [
            self._tokenizer.apply_chat_template(
                plain(request), add_generation_prompt=True, return_dict=False
            )
            for request in requests
        ]
        return log_probs(self.url, prompts, [one.ids for one in found])

    def _told(
        self, name: str, requests: Sequence[str], found: Sequence[Drawn], kl: float | None = None
    ) -> Way:
        """What a way's replies are worth, one to each request.

        Args:
            name: of the way.
            requests: plain ones.
            found: the replies.
            kl: the bound, where replies were chosen.
        """
        plainly = self._plainly(requests, found)
        nats = [sum(one.own) - sum(base) for one, base in zip(found, plainly, strict=True)]
        return Way(
            name,
            Mean.over([compound(None, one.text) for one in found]),
            Mean.over(nats) if kl is None else kl,
            Mean.over([-sum(base) / len(base) for base in plainly]),
            _passes(found),
        )

    def _way(
        self, name: str, requests: Sequence[str], asking: Asking = plain, **more: Any
    ) -> Way:  # fmt: skip
        found = self._drawn([asking(request) for request in requests], more)
        return self._told(name, requests, [one for one, *_ in found])

    def _valued(self, strength: float, requests: Sequence[str]) -> Way:
        return self._way(f"value-augmented, β {strength:g}", requests, **valued(strength))

    def _sunny(self, weight: float, requests: Sequence[str]) -> Way:
        return self._way(f"the vector at weight {weight:g}", requests, **sunny(weight))

    def _prompts(self, tried: Mapping[str, Way], best: str) -> dict[str, Way]:
        """On the test split: the best zero-shot and the best few-shot prompt."""
        kinds = [[c for c in CHEERS if bool(c.shots) == few] for few in (False, True)]
        some = [max(kind, key=lambda c: tried[c.name].reward.value) for kind in kinds]
        assert best in {cheer.name for cheer in some}
        return {c.name: self._way(f"prompt: {c.name}", self.test, c.messages) for c in some}

    def _pool(self) -> tuple[Way, list[Way]]:
        """The plain model; and the best of n of its replies, by the reward itself."""
        size = self.work.few(POOL, 2)
        pool = self._drawn([plain(r) for r in self.test], {"n": size}, by_plain=True)
        first = self._told(PLAIN, self.test, [replies[0] for replies in pool])
        ways = []
        for n in [n for n in NS if n <= size]:
            best = [max(replies[:n], key=lambda one: compound(None, one.text)) for replies in pool]
            ways.append(self._told(f"best of {n}, by the reward itself", self.test, best, bound(n)))
        return first, ways

    def _by_value(self) -> Way:
        """The server's `best_of_n`."""
        asked = [plain(r) for r in self.test]
        found = [one for one, *_ in self._drawn(asked, best_of(K), by_plain=True)]
        return self._told(f"best of {K}, by the value model", self.test, found, bound(K))

    def _searched(self) -> Way:
        asked = [plain(request) for request in self.test]
        found = [one for one, *_ in self._drawn(asked, searched(K), by_plain=True)]
        blocks = sum(math.ceil(len(one.ids) / BLOCK) for one in found) / len(found)
        name = f"guided search, {K} blocks of {BLOCK} tokens, by the value model"
        return self._told(name, self.test, found, blocks * bound(K))


def _table(title: str, ways: Sequence[Way], note: str = "") -> Table:
    heads = ("way", "reward", "KL for a reply, nats", "perplexity", "passes per token")
    return Table(title, heads, tuple(way.row for way in ways), note)


def _plots(series: Mapping[str, Sequence[Way]]) -> tuple[Plot, Plot]:
    """The reward over the KL, and over the perplexity."""
    reward = "mean reward (VADER's compound score)"
    return (
        Plot(
            "A reward against the distance from the plain model",
            "KL from the plain model, nats for a reply",
            reward,
            {name: [way.point(way.nats) for way in ways] for name, ways in series.items()},
        ),
        Plot(
            "A reward against the perplexity under the plain model",
            "perplexity",
            reward,
            {n: [way.point(way.perplexity.value) for way in ways] for n, ways in series.items()},
        ),
    )


def _drawn_of(answer: Any, choice: Any, by_plain: bool) -> Drawn:
    """A choice of an answer, with what the report says of it."""
    ids = tuple(choice["token_ids"])
    own = tuple(float(one["logprob"]) for one in choice["logprobs"]["content"])
    if len(own) != len(ids):
        raise ValueError(f"{len(own)} log-probabilities of {len(ids)} tokens")
    report = answer["steering"]
    by_choice = {one["index"]: one for one in report.get("choices", ())}
    details = by_choice.get(choice["index"], {}).get("token_details", ())
    plainly = own if by_plain else tuple(float(one["base_logprob"]) for one in details)
    text = choice["message"]["content"] or ""
    return Drawn(text, ids, own, plainly, report["forward_passes_per_token"])


def _passes(found: Sequence[Drawn]) -> str:
    """Forward passes per token of the reply, by stream, in the mean."""
    names = sorted({name for one in found for name in one.passes})
    means = {n: sum(one.passes.get(n, 0.0) for one in found) / len(found) for n in names}
    return ", ".join(f"{name} {mean:.2g}" for name, mean in means.items())
