"""What a request must give by the definition of its plan: a full forward for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from steering.kernels.reference import Scores, log_softmax, mix_reference
from steering.phases import holding
from steering.plan import BASE, Recipe, Rule
from tests.engine.driver import ERRORS, Case, Engine, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE
from tests.models import EOS
from tests.reference import load, scores

MARGIN = 1e-4
"""Nats by which the best id leads, where it is said which one that is."""


def raw(engine: Engine, case: Case, stream: str, reply: Sequence[int], size: int) -> Scores:
    """[size] a stream's scores behind a reply, over the base's ids."""
    original = engine.same_as.get(stream, stream)
    table = engine.overlaps[original].read_as
    ids = list(reply) if stream in case.own else [*case.prompt, *reply]
    ids = ids if table is None else [int(table[i]) for i in ids]
    ids = [*case.own.get(stream, ()), *ids]
    own = scores(load(engine.folders[original]), ids)[-1][:size]
    found = np.concatenate([own, np.full(size - own.size, -np.inf)])
    found[~engine.overlaps[original].shared] = -np.inf
    return found


def steered(engine: Engine, case: Case, reply: Sequence[int], ends: Sequence[int] = (EOS,)) -> Any:
    """[V] float64 scores of the token behind a reply."""
    plan, size = engine.plan(case), scores(load(engine.folders[BASE]), [1]).shape[-1]
    phase = None if plan is None else holding(plan, reply)
    part = phase or plan
    if part is None or (part.weights, part.rule) == (((BASE, 1.0),), Rule()):
        return scores(load(engine.folders[BASE]), [*case.prompt, *reply])[-1]
    weights, rule = part.weights, part.rule
    rows = {n: raw(engine, case, n, reply, size) for n in {BASE, *dict(weights), rule.stream}}
    if rule.head:
        head = engine.heads[rule.head]
        own = case.own.get(head.on or rule.head, case.prompt)
        rows[rule.head] = np.array([head.read([*own, *reply])])
    return mix_reference(Recipe(dict(weights), rule), rows, ends)


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
