"""From a steering spec to a plan: the method's own checks, then ours. Pure; front end only.

In two steps, because tokenising needs the server: `resolve` gives the plan and the own prompts
that its streams read; `Resolved.with_prompts` adds their token ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from steering.errors import BadValue, NotFound
from steering.faults import fault
from steering.method import Limits, Method, MethodConfig, OwnPrompt, Snapshot
from steering.phases import read_phase
from steering.plan import (
    BARE,
    BASE,
    Best,
    LayerKind,
    LayerRule,
    Phase,
    Recipe,
    RecipePhase,
    Report,
    Rule,
    RuleKind,
    SteeringPlan,
    Values,
)
from steering.rules import checked_rule
from steering.search import Proposal, Search
from steering.spec import FIELD, Profile

Methods = Mapping[str, Method[Any]]
"""Methods by name: `steering.plugins.Registry`, or a plain dict."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A plan whose own prompts are not tokenised yet.

    Args:
        plan: everything but the prompts.
        prompts: stream → its own prompt, for the streams that the plan runs.
        field: where the steering object stands, for errors.
    """

    plan: SteeringPlan
    prompts: Mapping[str, OwnPrompt]
    field: str = FIELD

    def with_prompts(self, token_ids: Mapping[str, tuple[int, ...]]) -> SteeringPlan:
        """The complete plan.

        Args:
            token_ids: stream → ids of that stream's own tokenizer, for each of `prompts`.

        Raises:
            BadValue: a prompt has no tokens.
        """
        assert token_ids.keys() == self.prompts.keys(), (set(token_ids), set(self.prompts))
        for stream, ids in token_ids.items():
            if not ids:
                raise BadValue("the prompt has no tokens", field=f"{self.field}.prompts.{stream}")
        ordered = tuple((stream, tuple(token_ids[stream])) for stream in sorted(token_ids))
        return replace(self.plan, prompts=ordered)


def resolve(
    spec: Mapping[str, Any],
    *,
    methods: Methods,
    snapshot: Snapshot,
    limits: Limits,
    field: str = FIELD,
) -> Resolved:
    """The plan of one steering object.

    Args:
        spec: the object, profiles folded in (`steering.spec.read_steering`). With `report` alone it
            asks for a report of a request that is not steered.
        methods: methods by name.
        snapshot: the server's streams.
        limits: the ranges that hold for this request.
        field: where the object stands, for errors: `steering`, or `profiles.<name>`.

    Raises:
        NotFound: unknown method or stream.
        BadValue: a value out of range, an unknown or missing field, fields that contradict each
            other, a stream of the wrong head, a prompt that no stream would read.
    """
    if spec.keys() == {"report"}:
        return Resolved(replace(BARE, report=_report(_bare(spec, field))), MappingProxyType({}))
    method = _method(spec, methods, field)
    config = parse(spec, method, snapshot, limits, field)
    recipe = method.resolve(config, snapshot)
    weights = _weights(recipe.weights, recipe.rule, config, snapshot, field)
    rule = checked_rule(recipe.rule, weights, field)
    values = _values(recipe, config, snapshot, limits, field)
    best = _best(recipe, config, snapshot, limits, field)
    search = _search(recipe, config, snapshot, limits, field)
    phases = _phases(spec, recipe, config, method, snapshot, limits, field)
    phases = phases if any((p.weights, p.rule) != (weights, rule) for p in phases) else ()
    rules = (rule, *(phase.rule for phase in phases))
    terms = [*weights, *(term for phase in phases for term in phase.weights)]
    taps = tuple(dict.fromkeys(name for name, _ in terms if name in snapshot.taps))
    bodies = _bodies(rules, values, taps, config, snapshot, field)
    report = _report(config)
    plan = SteeringPlan(
        method.name,
        weights,
        rule,
        (),
        report,
        bodies=bodies,
        values=values,
        heads=tuple(s for s, _ in values.strengths) if values and report == "tokens" else (),
        best=best,
        search=search,
        layers=_layers(recipe, config, snapshot, field),
        taps=taps,
        phases=phases,
    )
    return Resolved(plan, _prompts(config, recipe, plan, snapshot, field), field)


def _bare(spec: Mapping[str, Any], field: str) -> MethodConfig:
    try:
        return MethodConfig.model_validate({"method": BARE.method, **spec})
    except ValidationError as error:
        raise fault(error, spec, MethodConfig, field) from None


def parse(
    spec: Mapping[str, Any],
    method: Method[Any],
    snapshot: Snapshot,
    limits: Limits,
    field: str = FIELD,
) -> MethodConfig:
    """The method's own config, validated inside `limits` and with the snapshot's stream names.

    Raises:
        BadValue, NotFound: the first fault, with the dotted path of its field.
    """
    context = replace(limits, streams=frozenset(snapshot.streams))
    try:
        return method.config.model_validate(spec, context=context)
    except ValidationError as error:
        raise fault(error, spec, method.config, field) from None


def check_profile(
    name: str, profile: Profile, *, methods: Methods, snapshot: Snapshot, limits: Limits
) -> Resolved:
    """What a profile resolves to as it stands: run it before the profile is accepted.

    Raises:
        BadValue, NotFound: as `resolve`, with fields under `profiles.<name>`; also a profile
            whose limits reach outside the server's, or whose adapters say something wrong.
    """
    field = f"profiles.{name}"
    narrowed = profile.narrow(limits, field)
    profile.check_adapters(narrowed, field)
    return resolve(profile.spec, methods=methods, snapshot=snapshot, limits=narrowed, field=field)


def _method(spec: Mapping[str, Any], methods: Methods, field: str) -> Method[Any]:
    known = f"one of: {', '.join(sorted(methods))}"
    name = spec.get("method")
    if not isinstance(name, str):
        raise BadValue("give the method's name", field=f"{field}.method", value=name, allowed=known)
    if name not in methods:
        raise NotFound("no such method", field=f"{field}.method", value=name, allowed=known)
    return methods[name]


def _phases(
    spec: Mapping[str, Any],
    recipe: Recipe,
    config: MethodConfig,
    method: Method[Any],
    snapshot: Snapshot,
    limits: Limits,
    field: str,
) -> tuple[Phase, ...]:
    """The recipe's own phases, or those that the request asks for."""
    none = recipe.values or recipe.best or recipe.search or recipe.layers
    if config.phases and (none or recipe.phases):
        why = "it has its own" if recipe.phases else "values, choices and layers have none"
        raise BadValue(f"the method takes no phases: {why}", field=f"{field}.phases")
    found = [(part, field) for part in recipe.phases]
    for i, raw in enumerate(config.phases):
        where = f"{field}.phases.{i}"
        span, own = read_phase(raw, method.config, where)
        there = Recipe({BASE: 1.0})
        if own is not None:
            inner = parse({**spec, "phases": (), **own}, method, snapshot, limits, where)
            there = method.resolve(inner, snapshot)
        found.append((RecipePhase(span, there.weights, there.rule), where))
    phases = []
    for part, where in found:
        weights = _weights(part.weights, part.rule, config, snapshot, where)
        phases.append(Phase(part.span, weights, checked_rule(part.rule, weights, where)))
    return tuple(phases)


def _weights(
    asked: Mapping[str, float], rule: Rule, config: MethodConfig, snapshot: Snapshot, field: str
) -> tuple[tuple[str, float], ...]:
    """(stream, c_i), base first, then by name, without zeros; names, heads and numbers checked."""
    for stream, weight in asked.items():
        where = _where(config, stream, field)
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
    if not any(asked.values()):
        raise BadValue("all weights are 0, so every token would be as likely", field=field)
    # Adding 0.0 turns −0.0 into 0.0.
    base = (BASE, float(asked.get(BASE, 0.0)) + 0.0)
    others = sorted((s, float(c)) for s, c in asked.items() if s != BASE and c != 0)
    return (base, *others)


def _layers(
    recipe: Recipe, config: MethodConfig, snapshot: Snapshot, field: str
) -> LayerRule | None:
    """The recipe's rule over layers; the streams that it reads are checked."""
    if recipe.layers is None or recipe.layers.kind is LayerKind.NONE:
        return None
    read = [name for name, weight in recipe.weights.items() if weight < 0]
    if not read:
        raise BadValue("a rule over layers reads at least one", field=field)
    there = sorted(name for name, tapped in snapshot.taps.items() if tapped == BASE)
    for name in read:
        if name not in there:
            where = _where(config, name, field)
            allowed = f"one of: {', '.join(there)}" if there else "(there is none)"
            raise BadValue(f"the stream is not a tap on {BASE}", field=where, value=name,
                           allowed=allowed)  # fmt: skip
    return recipe.layers


def _bodies(
    rules: Sequence[Rule],
    values: Values | None,
    taps: tuple[str, ...],
    config: MethodConfig,
    snapshot: Snapshot,
    field: str,
) -> tuple[str, ...]:
    """The streams that must run for the heads and taps that the plan reads."""
    found = {name for name, _ in values.strengths} if values is not None else set()
    found |= {snapshot.taps[name] for name in taps} - {BASE}
    for head in {rule.head for rule in rules if rule.reads_head}:
        _check_head(head, ("classifier",), config, snapshot, field)
        found.add(snapshot.bodies.get(head, head))
    return tuple(sorted(found))


def _values(
    recipe: Recipe, config: MethodConfig, snapshot: Snapshot, limits: Limits, field: str
) -> Values | None:
    """The recipe's values without zeros; names, heads and numbers checked."""
    values = recipe.values
    if values is None:
        return None
    for stream, strength in values.strengths:
        _check_head(stream, ("value",), config, snapshot, field)
        if not math.isfinite(strength):
            where = _where(config, stream, field)
            raise BadValue(f"the strength of {stream} is not finite", field=where, value=strength)
    if not 1 <= values.top_k <= limits.top_k:
        allowed = f"1 to {limits.top_k}"
        raise BadValue("too many or too few candidates", field=field, value=values.top_k,
                       allowed=allowed)  # fmt: skip
    strengths = tuple(sorted((s, float(b)) for s, b in values.strengths if b))
    if len({stream for stream, _ in strengths}) < len(strengths):
        raise BadValue("names the same value stream twice", field=field)
    return replace(values, strengths=strengths) if strengths else None


def _best(
    recipe: Recipe, config: MethodConfig, snapshot: Snapshot, limits: Limits, field: str
) -> Best | None:
    """The recipe's choice among replies, with its head's body."""
    best = recipe.best
    if best is None:
        return None
    _check_head(best.head, ("value", "classifier"), config, snapshot, field)
    if not 1 <= best.n <= limits.best_of:
        allowed = f"1 to {limits.best_of}"
        raise BadValue("too many or too few replies", field=field, value=best.n, allowed=allowed)
    return replace(best, body=snapshot.bodies.get(best.head, best.head))


def _search(
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
        _weights(dict(one.weights), Rule(), config, snapshot, field)
        score = one.score
        for stream in (*dict(one.weights), *(score.ratio if score else ())):
            if stream in snapshot.taps:
                raise BadValue("a search draws and scores with streams that run, and this is a tap",
                               field=_where(config, stream, field), value=stream)  # fmt: skip
        if score is None:
            return one
        for stream in score.ratio:
            _check_head(stream, ("lm",), config, snapshot, field)
        if score.head:
            _check_head(score.head, ("value", "classifier"), config, snapshot, field)
            score = replace(score, body=snapshot.bodies.get(score.head, score.head))
        return replace(one, score=score)

    fallback = search.fallback
    return replace(search, draw=proposal(search.draw), fallback=fallback and proposal(fallback))


def _check_head(
    name: str, wanted: tuple[str, ...], config: MethodConfig, snapshot: Snapshot, field: str
) -> None:
    """Raises unless a stream of this name has a head that the method can read."""
    # The name may stand in a field for a language model too, and methods name their heads last.
    where, kind = _where(config, name, field, -1), " or ".join(wanted)
    there = sorted(stream for stream, head in snapshot.streams.items() if head in wanted)
    allowed = f"one of: {', '.join(there)}" if there else f"(no stream has a {kind} head)"
    if name not in snapshot.streams:
        raise NotFound("no such stream", field=where, value=name, allowed=allowed)
    if snapshot.streams[name] not in wanted:
        raise BadValue(f"the stream has no {kind} head", field=where, value=name, allowed=allowed)


def _report(config: MethodConfig) -> Report:
    if config.report == "tokens":
        return "tokens"
    return "summary" if config.report else "off"


def _prompts(
    config: MethodConfig, recipe: Recipe, plan: SteeringPlan, snapshot: Snapshot, field: str
) -> Mapping[str, OwnPrompt]:
    """Own prompts of the streams that run; a prompt that no field's stream could read is a fault.

    A stream that is named but has weight 0 may keep its prompt: a caller may turn the strength
    down to 0 and change nothing else.
    """
    named = {name for _, name in _texts(config)} | recipe.weights.keys() | set(plan.streams)
    for stream in config.prompts:
        where = f"{field}.prompts.{stream}"
        if stream == BASE:
            raise BadValue("the request's own prompt is the base's", field=where)
        if stream in snapshot.bodies:
            body = snapshot.bodies[stream]
            raise BadValue(f"a head on {body} reads what {body} reads", field=where)
        if stream in snapshot.taps:
            tapped = snapshot.taps[stream]
            raise BadValue(f"a tap on {tapped} reads what {tapped} reads", field=where)
        if stream not in named:
            used = ", ".join(sorted(recipe.weights.keys() - {BASE})) or "none"
            raise BadValue("the plan does not use this stream", field=where, allowed=used)
    return MappingProxyType({s: p for s, p in config.prompts.items() if s in plan.streams})


def _where(config: MethodConfig, stream: str, field: str, which: int = 0) -> str:
    """The dotted path of the `which`-th config field that names `stream`; `field` if none does."""
    paths = [path for path, text in _texts(config) if text == stream]
    return f"{field}.{paths[which]}" if paths else field


def _texts(config: MethodConfig) -> Iterator[tuple[str, str]]:
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
