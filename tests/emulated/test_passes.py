"""What passes cost outside of graphs, as `docs/gpu-steps.md` says."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from steering.worker.plan.batches import Candidates, StreamBatch, decoding_batch
from steering.worker.plan.staging import stage
from steering.worker.step.graph_inputs import Field
from steering.worker.step.graphs import RESERVE
from tests.emulated.graphs import emulated
from tests.emulated.passes import (
    BATCHES,
    SIZE,
    Counted,
    Passes,
    adapters_of,
    again,
    counting,
    plan_of,
    request,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu-steps.md"
ROWS = (16, 64)


@pytest.fixture(scope="module")
def passes() -> Iterator[Passes]:
    with emulated():
        yield Passes(ROWS)


def counted(passes: Passes) -> dict[tuple[str, int], Counted]:
    """By kind of batch and number of rows, of a step that follows one of the same requests."""
    found = {}
    for rows in ROWS:
        ids = torch.arange(rows, dtype=torch.int32) % 40
        for name, state in BATCHES.items():
            plan = plan_of([state(row) for row in range(rows)], 20)
            passes.run(plan, ids)
            with counting() as found[name, rows]:
                passes.run(again(plan), ids)
        plan = plan_of([BATCHES["mixed"](row) for row in range(rows)], 20)
        adapted = adapters_of(rows, random.Random(5))
        with counting() as found["mixed, adapters of new requests", rows]:
            passes.run(plan, ids, adapted)
        with counting() as found["mixed, adapters of the same requests", rows]:
            passes.run(again(plan), ids, adapted)
    return found


def table(found: dict[tuple[str, int], Counted]) -> str:
    lines = [
        "| batch | rows | graphs | launches outside | copies to the device | waits |",
        "|---|---|---|---|---|---|",
    ]
    for (name, rows), one in found.items():
        launches = sum(one.launches.values())
        lines.append(f"| {name} | {rows} | {one.replays} | {launches} | {one.copies} | 0 |")
    return "\n".join(lines)


def test_the_page_says_what_was_counted(passes: Passes) -> None:
    found = counted(passes)
    assert all(one.copies == 1 for one in found.values())
    page = PAGE.read_text()
    pattern = re.compile(r"(?<=<!-- passes -->\n).*?(?=\n<!-- end -->)", re.S)
    if os.environ.get("WRITE_DOCS"):
        page = pattern.sub(lambda _: table(found), page)
        PAGE.write_text(page)
    said = pattern.search(page)
    assert said is not None
    assert said[0] == table(found), "run this test again with WRITE_DOCS=1"


@pytest.mark.parametrize("name", BATCHES)
def test_what_was_counted_is_right(passes: Passes, name: str) -> None:
    plan = plan_of([BATCHES[name](row) for row in range(13)], 20)
    ids = torch.arange(13, dtype=torch.int32) * 3
    out = passes.run(plan, ids)
    layout = passes.step.readout.layout
    uses, offsets = plan.tables.uses, plan.tables.offsets
    for i, model in enumerate(passes.step.models):
        if out.shape[1] != layout.width and i:  # the base alone
            continue
        rows = torch.from_numpy(uses[:, i].nonzero()[0])
        want = model(ids[rows], 20 - torch.from_numpy(offsets)[rows, i])
        assert torch.equal(out[rows][:, layout.columns(i)], want)
        others = torch.from_numpy((~uses[:, i]).nonzero()[0])
        assert not out[others][:, layout.columns(i)].any()


def test_graphs_leave_memory_free(caplog: pytest.LogCaptureFixture) -> None:
    """Four of six fit: the two left out are of the smaller size, whose rows are padded further."""
    free = iter([2 * RESERVE] * 5 + [RESERVE - 1] * 2)
    with emulated(), caplog.at_level("INFO", "steering.worker.step.graphs"):
        few = Passes((4, 8), lambda: next(free))
    assert "graphs: 4 of 3 streams, 512 MiB taken" in caplog.text
    assert "2 of 6 were left out" in caplog.text
    assert "gpu_memory_utilization" in caplog.text
    plan = plan_of([request({0: 1.0, 1: 0.5}) for _ in range(3)], 20)
    batch = decoding_batch(plan.schedule, 3)
    assert [few.graphs.size_for(i, batch) for i in range(3)] == [4, 8, 8]
    out = few.run(plan, torch.arange(3, dtype=torch.int32))
    want = few.step.models[1](torch.arange(3), torch.full((3,), 20))
    assert torch.equal(out[:, few.step.readout.layout.columns(1)], want)


def test_without_memory_nothing_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    with emulated():
        none = Passes((4, 8), lambda: 0)
    plan = plan_of([request({0: 1.0})], 20)
    assert none.graphs.size_for(0, decoding_batch(plan.schedule, 1)) == 0
    assert "6 of 6 were left out" in caplog.text


def test_drafts_read_positions_that_only_the_device_knows(passes: Passes) -> None:
    """The host has bounds; ids, positions, lengths and slots are the device's."""
    passes.run(plan_of([request({0: 1.0, 1: 1.0}) for _ in range(5)], 30), torch.zeros(5).int())
    rows, bounds = np.array([0, 2, 3]), np.array([40, 40, 40], np.int32)
    [staged] = stage([StreamBatch.of(rows, bounds)], torch.device("cpu"))
    where, ids = torch.tensor([33, 17, 31]), torch.tensor([4, 9, 2])
    before = dict(passes.graphs.replays)
    found = passes.step.draft_scores(1, ids, staged.at(where), 0)
    assert passes.graphs.replays[1] == before[1] + 1
    assert torch.equal(found, passes.step.models[1](ids, where))
    [group] = passes.graphs._streams[1].groups
    blocks = passes.table[torch.from_numpy(rows)].gather(1, where[:, None] // SIZE)[:, 0]
    assert group.slots[:3].tolist() == (blocks * SIZE + where % SIZE).tolist()
    assert (group.slots[3:16] == PAD_SLOT_ID).all()
    assert passes.graphs._inputs[1, Field.LENGTH, :4].tolist() == [34, 18, 32, 0]


def test_candidates_are_written_into_blocks_of_their_own(passes: Passes) -> None:
    batch = Candidates.of(np.array([1, 1, 4]), np.array([18, 18, 5], np.int32))
    size, scratch = passes.graphs.size_for(0, batch), 900
    inputs = torch.from_numpy(passes.graphs.inputs({0: batch}, scratch))
    passes.graphs.put(inputs, torch.zeros(3, dtype=torch.int32))
    passes.graphs.put_own(0, torch.tensor([7, 8, 9], dtype=torch.int32))
    found = passes.graphs.run(0, batch, size)
    want = passes.step.models[0](torch.tensor([7, 8, 9]), torch.tensor([18, 18, 5]))
    assert torch.equal(found, want)
    [group] = passes.graphs._streams[0].groups
    assert group.blocks[:3, :2].tolist() == [[6, 900], [6, 901], [902, 25]]
    assert group.slots[:3].tolist() == [900 * SIZE + 2, 901 * SIZE + 2, 902 * SIZE + 5]
