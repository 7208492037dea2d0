"""Conditional vectors on disk, and what their conditions decide, beside the definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.convert import Request, When, convert, read_layers
from adapters.errors import BadAdapter, BadSource, DoesNotFit
from adapters.formats.inspect import inspect, read_artefact
from adapters.kernels.judging import (
    Gated,
    Judge,
    LoadedCondition,
    PromptState,
    Reading,
    Threshold,
)
from adapters.kernels.reference import similarity
from server.main import run
from tests.adapters.test_convert import HIDDEN, vector
from tests.adapters.test_vector_files import SHAPES
from tests.adapters.vectors import write

CONFIG: dict[str, Any] = {
    "kind": "conditional", "gate": "prompt", "conditions": {"1": {"above": 0.1}},
}  # fmt: skip


def made(folder: Path, *behind: int, **config: Any) -> Path:
    tensors = {str(n): vector(n) for n in behind or (1, 2)}
    return write(folder, tensors | {"1.condition": vector(9)}, **CONFIG | config)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gate": "sometimes"}, "gate"),
        ({"gate": None}, "gate"),
        ({"read": "first"}, "read"),
        ({"gate": "token", "read": "mean"}, "read"),
        ({"similarity": "dot"}, "similarity"),
        ({"conditions": {}}, "conditions"),
        ({"conditions": {"1": {"above": 2}}}, r"conditions\.1\.above"),
        ({"conditions": {"1": {"above": True}}}, r"conditions\.1\.above"),
        ({"conditions": {"1": {"above": 0, "below": 1}}}, r"conditions\.1"),
        ({"conditions": {"one": {"above": 0}}}, r"conditions\.one"),
        ({"conditions": {"2": {"above": 0}}}, r"1\.condition|2\.condition"),
        ({"where": "all"}, "own positions"),
        ({"where": {"prompt_last": 1}}, "own positions"),
        ({"threshold": 0.5}, "threshold"),
        ({"kind": "cast"}, "kind|gate"),
    ],
)
def test_what_a_file_says_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(BadAdapter, match=field):
        read_artefact(made(tmp_path / "v", **change))


def test_a_vector_in_front_of_its_condition(tmp_path: Path) -> None:
    """At that layer the condition is not known yet."""
    with pytest.raises(BadAdapter, match="before its condition"):
        read_artefact(made(tmp_path / "v", 0, 1))


def test_a_condition_of_a_plain_vector(tmp_path: Path) -> None:
    """One that is not looked at would steer every request."""
    tensors = {"1": vector(1), "1.condition": vector(2)}
    with pytest.raises(BadAdapter, match="unexpected tensor"):
        read_artefact(write(tmp_path / "v", tensors))
    with pytest.raises(BadAdapter, match="gate"):
        read_artefact(write(tmp_path / "w", tensors, gate="token"))


def test_shapes_are_the_base_s(tmp_path: Path) -> None:
    tensors = {"1": vector(1), "1.condition": torch.ones(HIDDEN + 1)}
    with pytest.raises(DoesNotFit, match=r"1\.condition"):
        inspect(write(tmp_path / "v", tensors, **CONFIG), SHAPES, max_rank=8)
    assert inspect(made(tmp_path / "w"), SHAPES, max_rank=8).condition is not None


def test_ibm_s_pair_of_files(tmp_path: Path) -> None:
    """Both act at the input of layer n, which is the output of n − 1."""
    for name, seed in (("refusal", 0), ("harmful", 10)):
        directions = {str(n): vector(seed + n).tolist() for n in range(5)}
        (tmp_path / f"{name}.svec").write_text(json.dumps({"directions": directions}))
    base = [str(tmp_path / "refusal.svec"), str(tmp_path / "guard"), "--layers", "3-4"]
    harm = ["--condition", str(tmp_path / "harmful.svec"), "--condition-layers", "2"]
    assert run(["convert-vectors", *base, *harm]) == 1
    assert run(["convert-vectors", *base, "--above", "0.1"]) == 1
    assert run(["convert-vectors", *base, *harm, "--above", "0.04", "--scale", "1.5"]) == 0
    found = read_artefact(tmp_path / "guard")
    assert found.kind == "conditional" and found.condition is not None
    (one,) = found.condition.comparisons
    assert (one.module, one.threshold, one.above) == ("layers[1]", 0.04, True)
    assert found.modules == ("layers[2]", "layers[3]")
    when = When(tmp_path / "harmful.svec", [4], above=0.04)
    request = Request(tmp_path / "refusal.svec", tmp_path / "late", read_layers("2-3"), when=when)
    with pytest.raises(BadSource, match="before its condition"):
        convert(request)
    assert not (tmp_path / "late").exists()


def condition(*, by_prompt: bool, mean: bool = True, projected: bool = True) -> LoadedCondition:
    thresholds = [Threshold(n, vector(20 + n), 0.15, above=n < 3) for n in (1, 3)]
    return LoadedCondition(by_prompt, mean, projected, tuple(thresholds))


def wanted(found: LoadedCondition, states: dict[int, torch.Tensor]) -> bool:
    """Whether a state of each layer meets one of the thresholds, by the definition."""
    met = []
    for at in found.thresholds:
        u, c = (t.double().numpy() for t in (states[at.layer], at.vector))
        value = similarity(u, c, projected=found.projected)
        met.append(value > at.threshold if at.above else value < at.threshold)
    return any(met)


def gates(n: int) -> Gated:
    gate = torch.full((n, 3), 0.5)
    rows, columns = torch.arange(n), torch.tensor([0, 2])
    return Gated(gate, rows, columns, gate[:, [0, 2]])


@pytest.mark.parametrize("projected", [True, False])
def test_each_token_decides_for_itself(projected: bool) -> None:
    random, judged, n = torch.Generator().manual_seed(1), condition(by_prompt=False), 40
    judged = condition(by_prompt=False, projected=projected)
    y, residual = (torch.randn(4, n + 2, HIDDEN, generator=random) for _ in range(2))
    gated, tokens = gates(n), torch.arange(2, n + 2)
    judge = Judge(judged, tokens, gated)
    for layer in range(4):
        judge.judge(y[layer], residual[layer], layer)
    states = y + residual
    want = [wanted(judged, {m: states[m, t] for m in range(4)}) for t in range(2, n + 2)]
    assert 0 < sum(want) < n
    assert gated.gate[:, 0].tolist() == [0.5 * met for met in want]
    assert torch.equal(gated.gate[:, 0], gated.gate[:, 2]) and (gated.gate[:, 1] == 0.5).all()


@pytest.mark.parametrize("mean", [True, False])
def test_a_prompt_in_chunks_decides_as_at_once(mean: bool) -> None:
    random, judged, found = (
        torch.Generator().manual_seed(2),
        condition(by_prompt=True, mean=mean),
        [],
    )
    for length in (1, 2, 7, 30, 5, 9, 11, 8, 1, 1, 2, 3, 4, 6):
        states = torch.randn(4, length + 2, HIDDEN, generator=random)
        prompt, cut = PromptState(), np.cumsum([0, length // 3, length // 3])
        ends = [*cut[1:], length + 2]  # the last chunk has two tokens of the reply
        for start, end in zip(cut, ends, strict=True):
            read = torch.arange(min(end, length) - start)
            last = length if end > length else 0
            gated = gates(2) if last else None
            reading = Reading(prompt, read, start == 0, last) if len(read) else None
            judge = Judge(judged, torch.arange(2), gated, prompt, reading)
            for layer in range(4):
                judge.judge(states[layer, start:end], None, layer)
        own = states[:, :length].double()
        u = own.mean(1) if mean else own[:, -1]
        want = wanted(judged, {m: u[m] for m in range(4)})
        assert gated is not None
        assert gated.gate[:, 0].tolist() == [0.5 * want] * 2
        found.append(want)
    assert 0 < sum(found) < len(found)
    assert not np.isnan(similarity(np.ones(3), np.ones(3), projected=True))
