"""What a request must give by the definition of its plan: a full forward for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from steering.kernels.reference import SET_BACK, Scores, log_softmax, mix_reference, value_offsets
from steering.phases import holding
from steering.plan import BASE, Phase, Recipe, Span, SteeringPlan, Values
from tests.engine.driver import ERRORS, Case, Engine, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE
from tests.models import EOS
from tests.reference import load, scores

OFF = Phase(Span(), ((BASE, 1.0),))
MARGIN = 1e-4
"""Nats by which the best id leads, where it is said which one that is."""


def raw(engine: Engine, case: Case, stream: str, reply: Sequence[int], size: int) -> Scores:
    """[size] scores of a stream, or of a tap on it, behind a reply, over the base's ids."""
    body = engine.taps[stream][0] if stream in engine.taps else stream
    original = engine.same_as.get(body, body)
    table = engine.overlaps[original].read_as
    ids = list(reply) if body in case.own else [*case.prompt, *reply]
    ids = ids if table is None else [int(table[i]) for i in ids]
    ids = [*case.own.get(body, ()), *ids]
    own = scores(engine.model(stream), ids)[-1][:size]
    found = np.concatenate([own, np.full(size - own.size, -np.inf)])
    found[~engine.overlaps[original].shared] = -np.inf
    return found


def read(engine: Engine, case: Case, name: str, reply: Sequence[int]) -> float:
    """A head's number behind a reply."""
    head = engine.heads[name]
    return head.read([*case.own.get(head.on or name, case.prompt), *reply])


def steered(engine: Engine, case: Case, reply: Sequence[int], ends: Sequence[int] = (EOS,)) -> Any:
    """[V] float64 scores of the token behind a reply."""
    plan, size = engine.plan(case), scores(load(engine.folders[BASE]), [1]).shape[-1]
    phase = None if plan is None else holding(plan, reply)
    part = phase or plan
    if part is None or _without_span(part) == OFF:
        return scores(load(engine.folders[BASE]), [*case.prompt, *reply])[-1]
    weights, rule = dict(part.weights), part.rule
    rows = {n: raw(engine, case, n, reply, size) for n in {BASE, *weights, rule.stream}}
    if rule.head:
        rows[rule.head] = np.array([read(engine, case, rule.head, reply)])
    z = mix_reference(Recipe(weights, rule, layers=part.layers), rows, ends)
    if part.values is not None:
        z = valued(engine, case, reply, z, rows[BASE], part.values, ends)
    return z


def _without_span(part: SteeringPlan | Phase) -> Phase:
    return Phase(Span(), part.weights, part.rule, part.values, part.layers)


def valued(
    engine: Engine,
    case: Case,
    reply: Sequence[int],
    z: Scores,
    base: Scores,
    values: Values,
    ends: Sequence[int],
) -> Scores:
    """The scores with what value streams add: a full forward for each candidate."""
    order = np.argsort(-base, kind="stable")
    best = order[: values.top_k]
    # Else rounding may decide who is a candidate, and the test says nothing.
    assert base[best[-1]] - base[order[best.size]] > 1e-5, "a tie: take another seed"
    for name, beta in values.strengths:
        after = np.array([read(engine, case, name, [*reply, int(i)]) for i in best])
        prefix = read(engine, case, name, reply)
        ending = np.isin(best, ends)
        z[best] += beta * value_offsets(
            after, prefix, ending, values.ends, values.transform, values.centre
        )
    if values.mask:
        known = z[np.isfinite(z)]
        z[~np.isin(np.arange(z.size), best)] -= SET_BACK + known.max() - known.min()
    return z


def assert_exact(engine: Engine, cases: Sequence[Case], outputs: Sequence[Any]) -> int:
    """Every token is the best one and has its log-probability; how many phases were seen."""
    seen = set()
    for case, output in zip(cases, outputs, strict=True):
        drawn, plan = tokens(output), engine.plan(case)
        for n, (token, found) in enumerate(zip(drawn, logprobs(output), strict=True)):
            z = steered(engine, case, drawn[:n])
            want = log_softmax(z)
            assert z[token] >= z.max() - MARGIN, (case, n)
            assert found == pytest.approx(want[token], abs=TOLERANCE), (case, n)
            ERRORS.append(abs(found - float(want[token])))
            phase = None if plan is None else holding(plan, drawn[:n])
            seen |= {(id(case), None if phase is None else phase.span)}
        assert len(drawn) == case.max_tokens
    return len(seen) - len(cases)
