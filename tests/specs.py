"""Sound steering objects of every method, for a server's streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from steering.plan import BASE

Spec = dict[str, Any]


@dataclass(frozen=True)
class Streams:
    """A server's streams by what they are; `base` is not among them.

    Args:
        models: language models, at least two.
        values: with a value head.
        classifiers: with a classifier head.
        taps: on the base.
        most: largest `top_k` and `n`.
        strength: range of every strength.
        weight: range of every weight.
    """

    models: Sequence[str]
    values: Sequence[str] = ()
    classifiers: Sequence[str] = ()
    taps: Sequence[str] = ()
    most: int = 8
    strength: tuple[float, float] = (0.0, 10.0)
    weight: tuple[float, float] = (-10.0, 10.0)

    def strengths(self) -> st.SearchStrategy[float]:
        """Inside the range; whole numbers too, and its ends often."""
        low, high = self.strength
        return st.floats(low, high) | st.sampled_from([low, high, 1, 0, -0.0, 5e-324])

    def weights(self) -> st.SearchStrategy[float]:
        """Inside the range."""
        low, high = self.weight
        return st.floats(low, high) | st.sampled_from([low, high, 1, -0.5])


@st.composite
def _two(draw: st.DrawFn, names: Sequence[str]) -> list[str]:
    return draw(st.lists(st.sampled_from(names), min_size=2, max_size=2, unique=True))


def _fractions() -> st.SearchStrategy[float]:
    return st.floats(0, 1, exclude_min=True) | st.sampled_from([1, 5e-324])


SUMS = ("proxy", "scale", "rewards", "contrastive", "mix", "without", "negative", "select", "safe")
LAYERED = ("dola", "sled")
HEADED = ("value_augmented", "critical_tokens", "best_of_n", "guided_search")
WITHOUT_PHASES = ("best_of_n", "guided_search")


def kinds(streams: Streams) -> tuple[str, ...]:
    """What a request may name: methods, and forms of them."""
    headed = HEADED if streams.values and streams.classifiers else ()
    return (*SUMS, *(LAYERED if streams.taps else ()), *headed)


@st.composite
def _sums(draw: st.DrawFn, streams: Streams, kind: str) -> Spec:
    """Methods that need language models only, or layers of the base."""
    models = list(streams.models)
    one, other = draw(_two(models))
    strength = draw(streams.strengths())
    weights = st.dictionaries(
        st.sampled_from([BASE, *models]), streams.weights(), min_size=1
    ).filter(lambda found: any(abs(weight) > 1e-9 for weight in found.values()))
    rewards = st.lists(
        st.fixed_dictionaries({"tuned": st.just(one), "weight": streams.weights()}),
        min_size=1, max_size=3,
    )  # fmt: skip
    match kind:
        case "proxy":
            return {"method": "proxy_tuning", "expert": one,
                    "anti_expert": draw(st.sampled_from([other, BASE])),
                    "strength": strength}  # fmt: skip
        case "scale":
            return {"method": "emulated_fine_tuning", "tuned": one, "reference": other,
                    "strength": strength,
                    "delta_top_p": draw(st.none() | _fractions())}  # fmt: skip
        case "rewards":
            return {"method": "emulated_fine_tuning", "reference": other,
                    "rewards": draw(rewards)}  # fmt: skip
        case "contrastive":
            return {"method": "contrastive", "amateur": one, "strength": strength,
                    "plausibility": draw(_fractions())}  # fmt: skip
        case "mix":
            masks: list[Spec] = [{}, {}, {"top_k": 3}, {"plausibility": 0.2}]
            summed = draw(weights)
            masked = draw(st.sampled_from(masks)) if abs(summed.get(BASE, 0)) > 1e-9 else {}
            return {"method": "mix", "weights": summed, **masked}
        case "select":
            return draw(_selects(streams))
        case "safe":
            return {"method": "safe_decoding", "expert": one, "strength": strength,
                    "tokens": draw(st.integers(1, 5)),
                    "shared": draw(st.integers(1, streams.most))}  # fmt: skip
        case "dola" | "sled" as layered:
            found: Spec = {"method": layered, "layers": draw(_some(streams.taps))}
            if layered == "sled":
                return found | {"rate": draw(st.floats(0.1, 9)), "top_k": draw(st.integers(1, 20))}
            return found | {"jsd": draw(st.booleans()), "relative_top": draw(_fractions())}
    method = {"without": "context_aware", "negative": "guidance"}[kind]
    return {"method": method, kind: one, "strength": strength,
            "prompts": {one: draw(own_prompts())}}  # fmt: skip


def _some(names: Sequence[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)


@st.composite
def _selects(draw: st.DrawFn, streams: Streams) -> Spec:
    first, second = draw(_two([BASE, *streams.models]))
    found: Spec = {"method": "select", "first": first, "second": second}
    gates = ["constant", "confidence", *["classifier"] * bool(streams.classifiers)]
    found["gate"] = draw(st.sampled_from(gates))
    if found["gate"] == "constant":
        return found | {"share": draw(st.floats(0, 1) | st.sampled_from([0, 1, 5e-324]))}
    if found["gate"] == "classifier":
        found["classifier"] = draw(st.sampled_from(streams.classifiers))
    found["threshold"] = draw(st.floats(0, 1) | st.sampled_from([0, 1]))
    if draw(st.booleans()):
        return found | {"mode": "soft", "ends": draw(st.sampled_from(("either", "first")))}
    ends = draw(st.sampled_from(("either", "first", "second")))
    return found | {"ends": ends, "greedy": draw(st.booleans())}


@st.composite
def _headed(draw: st.DrawFn, streams: Streams, method: str) -> Spec:
    """Methods that need a head."""
    few = st.integers(1, streams.most)
    if method == "guided_search":
        return draw(_searches(streams))
    if method == "best_of_n":
        return {"method": method, "value": draw(st.sampled_from(streams.values)), "n": draw(few)}
    if method == "critical_tokens":
        return {
            "method": method,
            "pretrained": draw(st.sampled_from(streams.models)),
            "classifier": draw(st.sampled_from(streams.classifiers)),
            "threshold": draw(st.floats(0, 1)),
            "mode": draw(st.sampled_from(("hard", "soft"))),
        }
    names = draw(st.lists(st.sampled_from(streams.values), min_size=1, unique=True))
    changes: list[Spec] = [{}, {}, {"mask": True}, {"centre": False}]
    changes.append({"mask": True, "centre": False, "transform": "log_sigmoid"})
    return {
        "method": method,
        "values": [{"stream": name, "strength": draw(streams.strengths())} for name in names],
        "top_k": draw(few),
        "eos_value": draw(st.sampled_from(("prefix", "zero", "model"))),
        **draw(st.sampled_from(changes)),
    }


@st.composite
def _phases(draw: st.DrawFn, spec: Spec, streams: Streams) -> list[Spec]:
    """Other values of a method's numbers for some tokens, or the base alone."""
    begin, length = st.integers(0, 9), st.integers(1, 10)
    texts: list[Spec] = [{"after": " the"}, {"until": "."}, {"from": 1, "until": "</think>"}]
    found: list[Spec] = []
    for kind in draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)):
        span = draw(st.sampled_from(texts))
        if kind:
            start, stop = draw(begin), draw(length)
            both: Spec = {"from": start, "first": start + stop}
            span = both if kind == 3 else {"first": stop} if kind == 1 else {"from": start}
        own: Spec = {}
        if "strength" in spec:
            own["strength"] = draw(streams.strengths())
        if "values" in spec:
            terms = draw(_some(streams.values))
            own["values"] = [{"stream": n, "strength": draw(streams.strengths())} for n in terms]
        if "layers" in spec:
            own["layers"] = draw(_some(streams.taps))
        if "weights" in spec:
            own["weights"] = {BASE: 1.0, draw(st.sampled_from(streams.models)): 0.5}
        on: bool = draw(st.booleans())
        found.append({**span, **(own if own and on else {"off": True})})
    return found


@st.composite
def _searches(draw: st.DrawFn, streams: Streams) -> Spec:
    of, to = draw(_two([BASE, *streams.models]))
    ratio = {"log_ratio": {"of": of, "to": to}}
    number = st.floats(-100, 100)
    blocks = [{"tokens": 2}, {"until": " the"}, {"tokens": 9, "until": "."}]
    head: Spec = {"value": draw(st.sampled_from([*streams.values, *streams.classifiers])),
                  "scale": draw(st.sampled_from(("raw", "probability", "log_probability"))),
                  "weight": draw(number)}  # fmt: skip
    k = draw(st.integers(1, streams.most))
    found: Spec = {
        "method": "guided_search",
        "draw": draw(st.sampled_from([BASE, *streams.models])),
        "block": draw(st.sampled_from(blocks)),
        "k": k,
        "score": draw(st.sampled_from([head, ratio, head | ratio])),
    }  # fmt: skip
    if draw(st.booleans()):
        found |= {"choose": "sample", "beta": draw(st.floats(0.1, 9))}
    if draw(st.booleans()):
        return found | {"accept": {"at_least": draw(number)}}
    return found | {"beams": draw(st.integers(1, max(1, streams.most // k)))}


def own_prompts() -> st.SearchStrategy[Spec]:
    """Prompts of a stream's own that any stream can read."""
    return st.sampled_from([
        {"prompt": "Water boils at"},
        {"token_ids": [11, 40, 7]},
        {"chat_template": "{{ messages[0].content }}"},
    ])  # fmt: skip


@st.composite
def specs(
    draw: st.DrawFn, streams: Streams, kind: str | None = None, phased: bool | None = None
) -> Spec:
    """A steering object that the server must take.

    Args:
        draw: hypothesis's.
        streams: the server's.
        kind: one of `kinds`; None: any.
        phased: whether it has phases; None: some have.
    """
    kind = kind or draw(st.sampled_from(kinds(streams)))
    found = dict(draw(_headed(streams, kind) if kind in HEADED else _sums(streams, kind)))
    some = draw(st.integers(0, 2)) == 0 if phased is None else phased
    if some and kind not in WITHOUT_PHASES:
        found["phases"] = draw(_phases(found, streams))
    report = draw(st.sampled_from((None, None, True, False, "tokens")))
    return found if report is None else {**found, "report": report}
