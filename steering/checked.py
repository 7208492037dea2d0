"""A recipe's parts, checked: names, heads and numbers of what a method asks for. Front end only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from steering.errors import BadValue, NotFound
from steering.method import Limits, MethodConfig, Snapshot
from steering.plan import (
    BASE,
    Best,
    LayerKind,
    LayerRule,
    Phase,
    Recipe,
    RecipePhase,
    Rule,
    RuleKind,
    Span,
    Values,
)
from steering.rules import checked_rule
from steering.search import Proposal, Search


def part_of(recipe: Recipe) -> RecipePhase:
    """What a recipe does where none of its phases holds, as a phase of the whole reply."""
    return RecipePhase(Span(), recipe.weights, recipe.rule, recipe.values, recipe.layers)


def phase_of(
    part: RecipePhase, config: MethodConfig, snapshot: Snapshot, limits: Limits, field: str
) -> Phase:
    """A recipe's phase, resolved.

    Args:
        part: as a method wrote it.
        config: the method's.
        snapshot: the server's streams.
        limits: the ranges that hold for the request.
        field: where the phase, or the steering object, stands, for errors.

    Raises:
        BadValue, NotFound: as `steering.resolve.resolve`.
    """
    weights = weights_of(part.weights, part.rule, config, snapshot, field)
    return Phase(
        part.span,
        weights,
        checked_rule(part.rule, weights, field),
        values_of(part.values, config, snapshot, limits, field),
        layers_of(part, config, snapshot, field),
    )


def weights_of(
    asked: Mapping[str, float], rule: Rule, config: MethodConfig, snapshot: Snapshot, field: str
) -> tuple[tuple[str, float], ...]:
    """(stream, c_i), base first, then by name, without zeros; names, heads and numbers checked."""
    for stream, weight in asked.items():
        where = where_of(config, stream, field)
        if stream not in snapshot.streams:
            known = f"one of: {', '.join(sorted(snapshot.streams))}"
            raise NotFound("no such stream", field=where, value=stream, allowed=known)
        if not math.isfinite(weight):
            raise BadValue(f"the weight of {stream} is not finite", field=where, value=weight)
        head = snapshot.streams[stream]
        if head != "lm" and not (head == "q" and rule.kind is RuleKind.SUM):
            models = sorted(name for name, head in snapshot.streams.items() if head == "lm")
            raise BadValue(
                f"the stream has a {head} head and cannot be mixed as a language model",
                field=where,
                value=stream,
                allowed=f"one of: {', '.join(models)}",
            )
    if not any(map(_counts, asked.values())):
        raise BadValue("all weights are 0, so every token would be as likely", field=field)
    base = float(asked.get(BASE, 0.0))
    others = sorted((s, float(c)) for s, c in asked.items() if s != BASE and _counts(c))
    return ((BASE, base if _counts(base) else 0.0), *others)


def _counts(number: float) -> bool:
    """Whether a coefficient is more than 0 where it is used, in float32."""
    return bool(np.float32(number) != 0)


def layers_of(
    part: RecipePhase, config: MethodConfig, snapshot: Snapshot, field: str
) -> LayerRule | None:
    """The part's rule over layers; the streams that it reads are checked."""
    if part.layers is None or part.layers.kind is LayerKind.NONE:
        return None
    read = [name for name, weight in part.weights.items() if weight < 0]
    if not read:
        raise BadValue("a rule over layers reads at least one", field=field)
    there = sorted(name for name, tapped in snapshot.taps.items() if tapped == BASE)
    for name in read:
        if name not in there:
            where = where_of(config, name, field)
            allowed = f"one of: {', '.join(there)}" if there else "(there is none)"
            raise BadValue(f"the stream is not a tap on {BASE}", field=where, value=name,
                           allowed=allowed)  # fmt: skip
    return part.layers


def bodies_of(
    parts: Sequence[Phase],
    taps: tuple[str, ...],
    config: MethodConfig,
    snapshot: Snapshot,
    field: str,
) -> tuple[str, ...]:
    """The streams that must run for the heads and taps that a plan's phases read."""
    found = {name for part in parts if part.values for name, _ in part.values.strengths}
    found |= {snapshot.taps[name] for name in taps} - {BASE}
    for head in {part.rule.head for part in parts if part.rule.reads_head}:
        check_head(head, ("classifier",), config, snapshot, field)
        found.add(snapshot.bodies.get(head, head))
    return tuple(sorted(found))


def values_of(
    values: Values | None, config: MethodConfig, snapshot: Snapshot, limits: Limits, field: str
) -> Values | None:
    """A recipe's values without zeros; names, heads and numbers checked."""
    if values is None:
        return None
    for stream, strength in values.strengths:
        check_head(stream, ("value",), config, snapshot, field)
        if not math.isfinite(strength):
            where = where_of(config, stream, field)
            raise BadValue(f"the strength of {stream} is not finite", field=where, value=strength)
    if not 1 <= values.top_k <= limits.top_k:
        allowed = f"1 to {limits.top_k}"
        raise BadValue("too many or too few candidates", field=field, value=values.top_k,
                       allowed=allowed)  # fmt: skip
    strengths = tuple(sorted((s, float(b)) for s, b in values.strengths if _counts(b)))
    if len({stream for stream, _ in strengths}) < len(strengths):
        raise BadValue("names the same value stream twice", field=field)
    return replace(values, strengths=strengths) if strengths else None


def best_of(
    recipe: Recipe, config: MethodConfig, snapshot: Snapshot, limits: Limits, field: str
) -> Best | None:
    """The recipe's choice among replies, with its head's body."""
    best = recipe.best
    if best is None:
        return None
    check_head(best.head, ("value", "classifier"), config, snapshot, field)
    if not 1 <= best.n <= limits.best_of:
        allowed = f"1 to {limits.best_of}"
        raise BadValue("too many or too few replies", field=field, value=best.n, allowed=allowed)
    return replace(best, body=snapshot.bodies.get(best.head, best.head))


def search_of(
    recipe: Recipe, config: MethodConfig, snapshot: Snapshot, limits: Limits, field: str
) -> Search | None:
    """The recipe's search, with its heads' bodies; names, heads and numbers checked."""
    search = recipe.search
    if search is None:
        return None
    if search.drawn > limits.best_of:
        raise BadValue("the blocks drawn at a time (k × beams) are out of range",
                       field=f"{field}.beams", value=search.drawn,
                       allowed=f"1 to {limits.best_of}")  # fmt: skip

    def proposal(one: Proposal) -> Proposal:
        weights_of(dict(one.weights), Rule(), config, snapshot, field)
        score = one.score
        for stream in (*dict(one.weights), *(score.ratio if score else ())):
            if stream in snapshot.taps:
                raise BadValue("a search draws and scores with streams that run, and this is a tap",
                               field=where_of(config, stream, field), value=stream)  # fmt: skip
        if score is None:
            return one
        for stream in score.ratio:
            check_head(stream, ("lm",), config, snapshot, field)
        if score.head:
            check_head(score.head, ("value", "classifier"), config, snapshot, field)
            score = replace(score, body=snapshot.bodies.get(score.head, score.head))
        return replace(one, score=score)

    fallback = search.fallback
    return replace(search, draw=proposal(search.draw), fallback=fallback and proposal(fallback))


def check_head(
    name: str, wanted: tuple[str, ...], config: MethodConfig, snapshot: Snapshot, field: str
) -> None:
    """Raises unless a stream of this name has a head that the method can read."""
    # The name may stand in a field for a language model too, and methods name their heads last.
    where, kind = where_of(config, name, field, -1), " or ".join(wanted)
    there = sorted(stream for stream, head in snapshot.streams.items() if head in wanted)
    allowed = f"one of: {', '.join(there)}" if there else f"(no stream has a {kind} head)"
    if name not in snapshot.streams:
        raise NotFound("no such stream", field=where, value=name, allowed=allowed)
    if snapshot.streams[name] not in wanted:
        raise BadValue(f"the stream has no {kind} head", field=where, value=name, allowed=allowed)


def where_of(config: MethodConfig, stream: str, field: str, which: int = 0) -> str:
    """The dotted path of the `which`-th config field that names `stream`; `field` if none does."""
    paths = [path for path, text in texts_of(config) if text == stream]
    return f"{field}.{paths[which]}" if paths else field


def texts_of(config: MethodConfig) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every text and every mapping key in the method's own fields."""
    own = config.model_dump(exclude={"method", "prompts", "report"})
    pending: list[tuple[str, object]] = list(own.items())
    while pending:
        path, value = pending.pop(0)
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, Mapping):
            yield from ((f"{path}.{key}", key) for key in value if isinstance(key, str))
            pending += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(f"{path}.{i}", inner) for i, inner in enumerate(value)]
