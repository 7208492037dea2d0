"""Phases: other weights and another rule for some of a reply's tokens.

A phase holds where its `Span` says: for the first tokens, from one on, behind a text or in front of
its end. A text is matched as the base's tokens that it is encoded to by itself, among the reply's
tokens. What closes a block (`</think>` closes `<think>`) may stand in the prompt already: a
template may open a block there, and close it.

Front end and tests; no torch. The worker has `steering.worker.plan.phases`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.where import Text
from steering.errors import BadValue
from steering.faults import fault
from steering.method import MethodConfig, refusal
from steering.plan import Phase, Span, SteeringPlan

MOST_TOKENS = 16
"""Most tokens of a text that bounds a phase."""

_COMMON = frozenset(MethodConfig.model_fields)
"""Fields that hold for a whole request."""

_CLOSES = re.compile(r"([<\[{(|]+)/(.+)", re.DOTALL)

Bound = Annotated[str, Field(min_length=1, max_length=64)]


class PhaseConfig(BaseModel):
    """One entry of `phases`; further fields are the method's."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    first: int | None = Field(None, strict=True, ge=1, le=2**30)
    start: int | None = Field(None, alias="from", strict=True, ge=0, le=2**30)
    after: Bound | None = None
    until: Bound | None = None
    off: bool = Field(False, strict=True)

    @model_validator(mode="after")
    def _somewhere(self) -> PhaseConfig:
        if (self.first, self.start, self.after, self.until) == (None,) * 4:
            raise refusal("a phase says where it holds", "first, from, after or until")
        if self.off and self.model_extra:
            raise refusal("off goes with no other fields of the method")
        return self

    @property
    def span(self) -> Span:
        """Where it holds."""
        after, until = (None if t is None else Text(t) for t in (self.after, self.until))
        return Span(self.start or 0, self.first, after, until)


def read_phase(
    raw: Mapping[str, Any], method: type[MethodConfig], field: str
) -> tuple[Span, dict[str, Any] | None]:
    """Where a phase holds, and its values of the method's fields; None: the base alone.

    Args:
        raw: an entry of `phases`.
        method: the config of the method.
        field: where the entry stands, for errors.

    Raises:
        BadValue: a field that no phase has, or a value out of range.
    """
    try:
        found = PhaseConfig.model_validate(raw)
    except ValidationError as error:
        raise fault(error, raw, PhaseConfig, field) from None
    own = dict(found.model_extra or {})
    known = sorted(method.model_fields.keys() - _COMMON)
    for name in own:
        if name not in known:
            words = ", ".join(["first", "from", "after", "until", "off", *known])
            raise BadValue("unknown field", field=f"{field}.{name}", value=own[name], allowed=words)
    return found.span, None if found.off else own


def both(one: Span, other: Span, field: str) -> Span:
    """The tokens that are in two spans.

    Args:
        one: a span.
        other: another.
        field: where the first one stands, for errors.

    Raises:
        BadValue: a text bounds both of them from the same side.
    """
    stops = [stop for stop in (one.stop, other.stop) if stop is not None]
    for side in ("after", "until"):
        if getattr(one, side) is not None and getattr(other, side) is not None:
            raise BadValue("the method's own phases are bounded by a text there",
                           field=f"{field}.{side}")  # fmt: skip
    return Span(
        max(one.start, other.start),
        min(stops, default=None),
        one.after or other.after,
        one.until or other.until,
    )


def opener_of(text: str) -> str | None:
    """`<think>` for `</think>`; None for a text that closes nothing."""
    found = _CLOSES.fullmatch(text)
    return found[1] + found[2] if found else None


def encoded(
    text: Text | None, encode: Callable[[str], Sequence[int]], field: str
) -> Text | None:  # fmt: skip
    """A text with its tokens.

    Args:
        text: None: none.
        encode: as for `with_ids`.
        field: where it stands, for errors.

    Raises:
        BadValue: it has too many tokens.
    """
    if text is None or text.ids:
        return text
    ids, opener = tuple(encode(text.text)), opener_of(text.text)
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise BadValue("the text has too many tokens", field=field, value=text.text,
                       allowed=f"1 to {MOST_TOKENS}")  # fmt: skip
    return replace(text, ids=ids, opener=() if opener is None else tuple(encode(opener)))


def with_ids(
    plan: SteeringPlan, encode: Callable[[str], Sequence[int]], fields: Sequence[str]
) -> SteeringPlan:
    """The plan with the tokens of its phases' texts.

    Args:
        plan: as it was resolved.
        encode: a text → the base's tokens, without any that stand for a text's begin or end.
        fields: where each phase of the plan stands in the request, for errors.

    Raises:
        BadValue: a text of too many tokens.
    """
    phases = []
    for phase, where in zip(plan.phases, fields, strict=True):
        span = phase.span
        after = encoded(span.after, encode, f"{where}.after")
        until = encoded(span.until, encode, f"{where}.until")
        phases.append(replace(phase, span=replace(span, after=after, until=until)))
    return replace(plan, phases=tuple(phases))


def begun(plan: SteeringPlan, prompt: Sequence[int]) -> SteeringPlan:
    """The plan for a prompt: what it has closed already is behind the reply.

    Args:
        plan: with the tokens of its texts.
        prompt: the base's ids.
    """
    if not plan.phases:
        return plan
    phases: list[Phase] = []
    for phase in plan.phases:
        span = phase.span
        if span.until is not None and closed(span.until, prompt):
            continue
        if span.after is not None and closed(span.after, prompt):
            phase = replace(phase, span=replace(span, after=None))
        phases.append(phase)
    return replace(plan, phases=tuple(phases))


def closed(text: Text, prompt: Sequence[int]) -> bool:
    """Whether a prompt has closed with a text what it had opened."""
    opened = last_of(prompt, text.opener) if text.opener else -1
    return opened >= 0 and last_of(prompt, text.ids) > opened


def last_of(ids: Sequence[int], part: Sequence[int]) -> int:
    """Where the last of `part` begins among `ids`; −1: nowhere."""
    places = range(len(ids) - len(part), -1, -1)
    return next((i for i in places if tuple(ids[i : i + len(part)]) == tuple(part)), -1)


def holding(plan: SteeringPlan, reply: Sequence[int]) -> Phase | None:
    """The phase of the token behind a reply so far; None: none. Slow: the tests' reference.

    Args:
        plan: as `begun` gives it.
        reply: ids.
    """
    n, found = len(reply), None
    for phase in plan.phases:
        span = phase.span
        inside = span.start <= n and (span.stop is None or n < span.stop)
        inside &= span.after is None or _there(reply, span.after.ids)
        inside &= span.until is None or not _there(reply, span.until.ids)
        found = phase if inside else found
    return found


def _there(ids: Sequence[int], part: Sequence[int]) -> bool:
    return last_of(ids, part) >= 0
