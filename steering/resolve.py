"""From a steering spec to a plan: the method's own checks, then ours. Pure; front end only.

In two steps, because tokenising needs the server: `resolve` gives the plan and the own prompts
that its streams read; `Resolved.with_prompts` adds their token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from steering.checked import best_of, bodies_of, part_of, phase_of, search_of, texts_of
from steering.errors import BadValue, NotFound
from steering.faults import fault
from steering.method import Limits, Method, MethodConfig, OwnPrompt, Snapshot
from steering.phases import both, read_phase
from steering.plan import BARE, BASE, Phase, Recipe, Report, SteeringPlan
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
        phase_fields: where each of the plan's phases stands; a method's own where the object does.
    """

    plan: SteeringPlan
    prompts: Mapping[str, OwnPrompt]
    field: str = FIELD
    phase_fields: tuple[str, ...] = ()

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
    whole = phase_of(part_of(recipe), config, snapshot, limits, field)
    best = best_of(recipe, config, snapshot, limits, field)
    search = search_of(recipe, config, snapshot, limits, field)
    phases, fields = _phases(spec, recipe, config, method, snapshot, limits, field)
    if all(replace(phase, span=whole.span) == whole for phase in phases):
        phases, fields = (), ()
    parts, report = (whole, *phases), _report(config)
    terms = [term for part in parts for term in part.weights]
    taps = tuple(dict.fromkeys(name for name, _ in terms if name in snapshot.taps))
    valued = [name for part in parts if part.values for name, _ in part.values.strengths]
    plan = SteeringPlan(
        method.name,
        whole.weights,
        whole.rule,
        (),
        report,
        bodies=bodies_of(parts, taps, config, snapshot, field),
        values=whole.values,
        heads=tuple(sorted({*valued})) if report == "tokens" else (),
        best=best,
        search=search,
        layers=whole.layers,
        taps=taps,
        phases=phases,
    )
    prompts = _prompts(config, recipe, plan, snapshot, field)
    return Resolved(plan, prompts, field, fields)


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
) -> tuple[tuple[Phase, ...], tuple[str, ...]]:
    """The recipe's own phases, and behind them those that the request asks for; the field of each.

    One of the request's is the method with other values, and with the phases of its own that it has
    with these: inside the request's.
    """

    def none(asked: Recipe, where: str) -> None:
        if asked.best or asked.search:
            raise BadValue("the method takes no phases: it chooses among replies, or blocks of "
                           "them", field=where)  # fmt: skip

    if config.phases:
        none(recipe, f"{field}.phases")
    found = [(part, field) for part in recipe.phases]
    for i, raw in enumerate(config.phases):
        where = f"{field}.phases.{i}"
        span, own = read_phase(raw, method.config, where)
        there = Recipe({BASE: 1.0})
        if own is not None:
            inner = parse({**spec, "phases": (), **own}, method, snapshot, limits, where)
            there = method.resolve(inner, snapshot)
            none(there, where)
        found.append((replace(part_of(there), span=span), where))
        for part in there.phases:
            found.append((replace(part, span=both(span, part.span, where)), where))
    phases = tuple(phase_of(part, config, snapshot, limits, where) for part, where in found)
    return phases, tuple(where for _, where in found)


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
    named = {name for _, name in texts_of(config)} | recipe.weights.keys() | set(plan.streams)
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
