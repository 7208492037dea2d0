"""Puts a request's adapters into its plan, and into one set for the engine. Front end; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapters.formats.artefact import TEMPERATURES, Artefact
from adapters.sets import AdapterSet, Member
from adapters.where import EVERYWHERE, Where
from steering.errors import BadValue, NotFound
from steering.plan import BASE, AdapterUse, SteeringPlan

MOST_WHERES = 4
"""Different sets of positions that the adapters of one request may act at, beside all."""


@dataclass(frozen=True)
class ResolvedAdapter:
    """One adapter that a request names.

    Args:
        artefact: what the name stands for, inspected.
        digest: of its content (`Artefact.digest`, kept by its loader).
        stream: the stream that it shall change.
        weight: what it is multiplied by; 0 leaves it out.
        top_k: for a pack, members per token; None: the pack's own.
        temperature: for a pack, T; None: the pack's own.
        field: where it stands in the request, for errors, e.g. `adapters.0`.
        name, version: what the request and reports call it.
        where: at which positions it acts; None: where its file says, or everywhere.
    """

    artefact: Artefact
    digest: str
    stream: str = BASE
    weight: float = 1.0
    top_k: int | None = None
    temperature: float | None = None
    field: str = "adapters"
    name: str = ""
    version: str = ""
    where: Where | None = None

    @property
    def places(self) -> tuple[Where, ...]:
        """`AdapterUse.where` of each adapter."""
        found = self.artefact.where if self.where is None else (self.where,)
        return () if all(where.everywhere for where in found) else found


def adapt(
    plan: SteeringPlan,
    resolved: Sequence[ResolvedAdapter],
    owners: Mapping[str, str],
    *,
    weight: tuple[float, float] = (-10.0, 10.0),
    max_rank: int = 512,
) -> tuple[SteeringPlan, AdapterSet | None]:
    """The plan with its adapters, and the set for the engine; (plan, None) if there are none.

    Give `LoRARequest(**set.lora_request())` to the engine's `add_lora` once, and with every
    request that has this plan.

    Args:
        plan: the request's, without adapters.
        resolved: what the request names.
        owners: every stream of this server → the stream whose weights it runs; itself, but for
            a twin its original.
        weight: lowest and highest weight.
        max_rank: rank indices that a set may take.

    Raises:
        NotFound: a stream that this server does not have.
        BadValue: a number out of range, the same adapter twice on one stream, more rank than a set
            may take, or too many sets of positions.
    """
    uses: dict[tuple[str, str], AdapterUse] = {}
    members = []
    for one in resolved:
        if one.stream not in owners:
            raise NotFound(
                "no such stream",
                field=f"{one.field}.stream",
                value=one.stream,
                allowed=", ".join(owners),
            )
        use = _use(one, weight, owners[one.stream])
        if (use.stream, use.digest) in uses:
            raise BadValue("names the same adapter twice for one stream", field=one.field)
        uses[use.stream, use.digest] = use
        members.append(Member.of(one.artefact, one.digest, owners[one.stream]))
    kept = tuple(use for _, use in sorted(uses.items()) if use.weight)
    if not kept:
        return plan, None
    places: set[object] = {where for use in kept for where in use.where}
    places |= {use.invocation for use in kept if use.invocation}
    if len(places) > MOST_WHERES:
        raise BadValue("the request's adapters act at too many different sets of positions",
                       field=resolved[0].field.rsplit(".", 1)[0], value=len(places),
                       allowed=f"≤ {MOST_WHERES}")  # fmt: skip
    found = AdapterSet.of(members)
    if found.rank > max_rank:
        raise BadValue(
            "the adapters' ranks together",
            field=resolved[0].field.rsplit(".", 1)[0],
            value=found.rank,
            allowed=f"≤ {max_rank}",
        )
    return replace(plan, adapters=kept), found


def _check_invoked(one: ResolvedAdapter, owner: str) -> None:
    """Whether an aLoRA can act: its invocation tokens are looked for in the base's prompt."""
    if owner != BASE:
        raise BadValue("an aLoRA changes the base or a twin of it: its invocation tokens are the "
                       "base's", field=f"{one.field}.stream", value=one.stream)  # fmt: skip
    if one.where is not None:
        raise BadValue("an aLoRA acts from its invocation tokens on", field=f"{one.field}.where",
                       allowed="nothing")  # fmt: skip


def _use(one: ResolvedAdapter, weight: tuple[float, float], owner: str) -> AdapterUse:
    low, high = weight
    if not low <= one.weight <= high:
        raise BadValue(
            "out of range",
            field=f"{one.field}.weight",
            value=one.weight,
            allowed=f"[{low}, {high}]",
        )
    artefact = one.artefact
    if one.places and artefact.by_values:
        raise BadValue(
            "this adapter scales attention heads, by values that later positions read",
            field=f"{one.field}.where",
            allowed="all",
        )
    condition = artefact.condition
    if condition is not None:
        for where in one.places or (EVERYWHERE,):
            condition.check(where, f"{one.field}.where", BadValue)
    if artefact.invocation:
        _check_invoked(one, owner)
    if not artefact.gates:
        for name in ("top_k", "temperature"):
            if getattr(one, name) is not None:
                raise BadValue("only a MeteoRA pack has this", field=f"{one.field}.{name}")
        reads = condition is not None and condition.gate == "prompt"
        return AdapterUse(one.digest, one.stream, float(one.weight), where=one.places,
                          reads_prompt=reads, invocation=artefact.invocation)  # fmt: skip
    top_k = artefact.top_k if one.top_k is None else one.top_k
    temperature = artefact.temperature if one.temperature is None else one.temperature
    if not 1 <= top_k <= len(artefact.members):
        raise BadValue(
            "out of range",
            field=f"{one.field}.top_k",
            value=top_k,
            allowed=f"1 to {len(artefact.members)}",
        )
    lowest, highest = TEMPERATURES
    if not lowest <= temperature <= highest:
        raise BadValue("out of range", field=f"{one.field}.temperature", value=temperature,
                       allowed=f"[{lowest:g}, {highest:g}]")  # fmt: skip
    return AdapterUse(
        one.digest, one.stream, float(one.weight), top_k, float(temperature), one.places
    )
