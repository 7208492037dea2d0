"""What passes cost outside of graphs, as `docs/internals/gpu-steps.md` says."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from steering.worker.plan.batches import Candidates, whole_batch
from steering.worker.plan.step_plan import plan_step
from steering.worker.step.graph_inputs import PIECES, Field, Shape
from steering.worker.step.graphs import RESERVE, _none_at_all
from tests.emulated.graphs import emulated
from tests.emulated.passes import (
    BATCHES,
    DRAFTS,
    PART,
    SIZE,
    TOP_K,
    Counted,
    Group,
    Passes,
    adapters_of,
    again,
    counting,
    plan_of,
    prompts_of,
    request,
    valued,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "internals" / "gpu-steps.md"
ROWS = (16, 64)


@pytest.fixture(scope="module")
def passes() -> Iterator[Passes]:
    with emulated():
        yield Passes((*ROWS, TOP_K * ROWS[-1]))


@pytest.fixture(scope="module")
def speculating() -> Iterator[Passes]:
    with emulated():
        yield Passes(ROWS, drafts=DRAFTS)


@pytest.fixture(scope="module")
def reading() -> Iterator[Passes]:
    """Captures in pieces too."""
    with emulated():
        yield Passes(ROWS, pieces=(80, 256))


def read(reading: Passes) -> dict[tuple[str, int], Counted]:
    """By kind of batch and number of rows, of a step in which some read prompts."""
    found = {}
    for rows in ROWS:
        plans = {
            name: prompts_of([state(row) for row in range(rows)], 20)
            for name, state in BATCHES.items()
        }
        adapted = adapters_of(rows, random.Random(5))
        for name, plan in plans.items():
            ids = torch.arange(plan.schedule.tokens, dtype=torch.int32) % 40
            with counting() as found[name, rows]:
                reading.run(plan, ids)
        with counting() as found["mixed, adapters of new requests", rows]:
            reading.run(plans["mixed"], ids, adapted)
    return found


def counted(passes: Passes, speculating: Passes) -> dict[tuple[str, int], Counted]:
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
        plan = plan_of([valued(row) for row in range(rows)], 20)
        passes.run(plan, ids)
        with counting() as found["values of candidates", rows]:
            passes.run(again(plan), ids)
        plan = plan_of([BATCHES["mixed"](row) for row in range(rows)], 20, DRAFTS)
        newest, drawn = torch.full((rows,), 24), torch.arange(rows) % 40
        for name, own in (("", None), (", with adapters", adapted)):
            speculating.run(plan, ids.repeat(1 + DRAFTS), own)
            speculating.step.draft(newest, drawn)
            with counting() as found[f"mixed, {DRAFTS} drafts verified and drawn{name}", rows]:
                speculating.run(again(plan), ids.repeat(1 + DRAFTS), own)
                speculating.step.draft(newest, drawn)
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


@pytest.mark.nightly
@pytest.mark.parametrize("block", ["passes", "prompts"])
def test_the_page_says_what_was_counted(
    passes: Passes, speculating: Passes, reading: Passes, block: str
) -> None:
    found = read(reading) if block == "prompts" else counted(passes, speculating)
    assert all(one.copies == 1 for one in found.values())
    page = PAGE.read_text()
    pattern = re.compile(rf"(?<=<!-- {block} -->\n).*?(?=<!-- end -->)", re.S)
    if os.environ.get("WRITE_DOCS"):
        page = pattern.sub(lambda _: table(found) + "\n", page)
        PAGE.write_text(page)
    said = pattern.search(page)
    assert said is not None
    assert said[0] == table(found) + "\n", "run this test again with WRITE_DOCS=1"


@pytest.mark.nightly
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


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_read_in_pieces_is_right(reading: Passes, name: str) -> None:
    """Rows of any lengths, each stream's at positions of its own."""
    passes, before = reading, dict(reading.graphs.replays)
    plan = prompts_of([BATCHES[name](row) for row in range(13)], 20)
    ids = torch.arange(plan.schedule.tokens, dtype=torch.int32) * 3 % 40
    out = passes.run(plan, ids)
    layout, lengths = passes.step.readout.layout, torch.from_numpy(plan.schedule.lengths)
    at = torch.cat([20 + torch.arange(n) for n in lengths.tolist()])
    for i, model in enumerate(passes.step.models):
        if out.shape[1] != layout.width and i:  # the base alone
            continue
        used = torch.from_numpy(plan.tables.uses[:, i]).repeat_interleave(lengths)
        lag = torch.from_numpy(plan.tables.offsets[:, i]).repeat_interleave(lengths)
        want = model(ids[used], (at - lag)[used])
        assert torch.equal(out[used][:, layout.columns(i)], want)
        assert not out[~used][:, layout.columns(i)].any()
        assert passes.graphs.replays[i] == before[i] + 1
        batch = plan.batches[i] or whole_batch(plan.schedule, int(lengths.sum()), PART)
        assert batch is not None
        if batch.width == 1:  # none of its rows reads a prompt
            continue
        assert passes.graphs.shape_for(i, batch) == (80, PIECES)
        assert passes.graphs.shape_for(i, batch, whole=True) is None
        stream = passes.graphs._streams[i]
        [group], count = stream.groups, batch.tokens.size
        position, row = torch.from_numpy(batch.positions), batch.rows[batch.token_rows]
        slots = passes.table[row, position // SIZE] * SIZE + position % SIZE
        assert group.slots[:80].tolist() == [*slots.tolist(), *[PAD_SLOT_ID] * (80 - count)]
        told = stream.rows_of(batch)
        assert told["query_start_loc"].tolist() == batch.starts.tolist()
        assert told["seq_lens"].tolist() == batch.lengths.tolist()
        assert torch.equal(group.blocks[: batch.rows.size], passes.table[batch.rows])


def test_adapters_in_pieces_are_as_in_whole_graphs(reading: Passes) -> None:
    """Each request by itself decodes the same tokens one by one."""
    plan = prompts_of([BATCHES["mixed"](row) for row in range(6)], 20)
    ids = torch.arange(plan.schedule.tokens, dtype=torch.int32) % 40
    adapted, starts = adapters_of(6, random.Random(5)), plan.schedule.starts
    found = reading.run(plan, ids, adapted)
    for row in range(6):
        uses = replace(adapted, uses=adapted.uses[row : row + 1], sets=adapted.sets[row : row + 1])
        for k, token in enumerate(range(starts[row], starts[row + 1])):
            alone = plan_of([BATCHES["mixed"](row)], 20 + k)
            want = reading.run(alone, ids[token : token + 1], uses)
            assert torch.allclose(want[0], found[token, : want.shape[1]], atol=1e-5)


def test_graphs_leave_memory_free(caplog: pytest.LogCaptureFixture) -> None:
    """Four of six fit: the two left out are of the smaller size, whose rows are padded further."""
    free = iter([2 * RESERVE] * 5 + [RESERVE - 1] * 2)
    with emulated(), caplog.at_level("INFO", "steering.worker.step.graphs"):
        few = Passes((4, 8), lambda: next(free))
    assert "graphs: 4 of 3 streams, 0 of them in pieces, 512 MiB taken" in caplog.text
    assert "2 of 6 were left out" in caplog.text
    assert "gpu_memory_utilization" in caplog.text
    plan = plan_of([request({0: 1.0, 1: 0.5}) for _ in range(3)], 20)
    batch = whole_batch(plan.schedule, 3, 1)
    assert [few.graphs.shape_for(i, batch) for i in range(3)] == [(4, 1), (8, 1), (8, 1)]
    out = few.run(plan, torch.arange(3, dtype=torch.int32))
    want = few.step.models[1](torch.arange(3), torch.full((3,), 20))
    assert torch.equal(out[:, few.step.readout.layout.columns(1)], want)


def test_streams_that_run_without_graphs_are_named(caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of([request({0: 1.0})], 20)
    single = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    with emulated(), patch.object(Group, "support", single):
        some = Passes((4,), drafts=1)
    assert some.graphs.shape_for(0, whole_batch(plan.schedule, 1, 1)) == (4, 1)
    plan = plan_of([request({0: 1.0})], 20, 1)
    assert some.graphs.shape_for(0, whole_batch(plan.schedule, 2, 2)) is None
    assert (
        "stream 'twin' runs without: small cannot be captured over rows of 2 tokens" in caplog.text
    )
    with emulated(), patch.object(Group, "support", AttentionCGSupport.NEVER):
        none = Passes((4,))
    assert not none.graphs._streams
    assert "stream 'base' runs without: small cannot be captured\n" in caplog.text


def test_what_cannot_be_captured_is_replayed_in_pieces(caplog: pytest.LogCaptureFixture) -> None:
    """Decoding too: attention is not in the graphs."""
    with emulated(), patch.object(Group, "support", AttentionCGSupport.NEVER):
        some = Passes((4,), pieces=(8,))
    assert "stream 'chat' runs in pieces: small cannot be captured\n" in caplog.text
    plan = plan_of([request({0: 1.0, 1: 0.5}) for _ in range(3)], 20)
    out = some.run(plan, torch.arange(3, dtype=torch.int32))
    want = some.step.models[1](torch.arange(3), torch.full((3,), 20))
    assert torch.equal(out[:, some.step.readout.layout.columns(1)], want)
    assert some.graphs.replays == {0: 1, 1: 1, 2: 0}


@pytest.mark.parametrize(
    ("eager", "tables", "why"),
    [(True, [], "enforce_eager is set"), (False, None, "Model Runner V1"), (False, [], "")],
)
def test_whatever_leaves_all_streams_without_is_told(eager: bool, tables: Any, why: str) -> None:
    found = _none_at_all(SimpleNamespace(enforce_eager=eager), tables)
    assert why in found and bool(why) == bool(found)


def test_without_memory_nothing_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    with emulated():
        none = Passes((4, 8), lambda: 0)
    plan = plan_of([request({0: 1.0})], 20)
    assert none.graphs.shape_for(0, whole_batch(plan.schedule, 1, 1)) is None
    assert "6 of 6 were left out" in caplog.text


@pytest.mark.nightly
def test_drafts_read_positions_that_only_the_device_knows(speculating: Passes) -> None:
    """The host has bounds; ids, positions, lengths and slots are the device's."""
    passes, drafting = speculating, [0, 2, 3]
    states = [request({0: 1.0, 1: 1.0} if row in drafting else {0: 1.0}) for row in range(5)]
    passes.run(plan_of(states, 30, DRAFTS), torch.zeros(5 * (1 + DRAFTS)).int())
    newest = torch.tensor([33, 30, 31, 32, 30])
    own, where = torch.tensor([4, 7, 9, 2, 8]), newest[drafting]
    before = dict(passes.graphs.replays)
    found = passes.step.draft(newest, own)
    assert passes.graphs.replays[1] == before[1] + DRAFTS
    want, ids = own[:, None].repeat(1, DRAFTS), own[drafting]
    for k in range(DRAFTS):
        ids = passes.step.models[1](ids, where + k).argmax(-1)
        want[drafting, k] = ids
    assert torch.equal(found, want)
    # Those of the last draft.
    [group] = passes.graphs._streams[1].groups
    last = where + DRAFTS - 1
    blocks = passes.table[drafting].gather(1, last[:, None] // SIZE)[:, 0]
    assert group.slots[:3].tolist() == (blocks * SIZE + last % SIZE).tolist()
    assert (group.slots[3:16] == PAD_SLOT_ID).all()
    assert passes.graphs._inputs[1, Field.LENGTH, :4].tolist() == [*(last + 1).tolist(), 0]
    assert torch.equal(passes.step.draft(newest, own), own[:, None].repeat(1, DRAFTS))


@pytest.mark.nightly
@pytest.mark.parametrize("rows", [3, 16])
def test_steps_that_verify_drafts_are_replayed(speculating: Passes, rows: int) -> None:
    """Each stream at positions of its own; whoever has another number of tokens is not."""
    passes, width = speculating, 1 + DRAFTS
    plan = plan_of([BATCHES["mixed"](row) for row in range(rows)], 13, DRAFTS)
    ids = torch.arange(rows * width, dtype=torch.int32) % 40
    before = dict(passes.graphs.replays)
    out = passes.run(plan, ids)
    assert all(passes.graphs.replays[i] == before[i] + 1 for i in range(3))
    layout, offsets = passes.step.readout.layout, torch.from_numpy(plan.tables.offsets)
    for i, model in enumerate(passes.step.models):
        used = torch.from_numpy(plan.tables.uses[:, i]).repeat_interleave(width)
        at = (13 - offsets[:, i])[:, None] + torch.arange(width)
        want = model(ids[used], at.flatten()[used])
        assert torch.equal(out[used][:, layout.columns(i)], want)
        assert not out[~used][:, layout.columns(i)].any()
        batch = plan.batches[i] or whole_batch(plan.schedule, rows * width, width)
        assert batch is not None
        [group] = passes.graphs._streams[i].groups
        position = torch.from_numpy(batch.positions)
        row = torch.from_numpy(batch.rows[batch.token_rows])
        slots = passes.table[row, position // SIZE] * SIZE + position % SIZE
        count, padded = position.numel(), passes.graphs.shape_for(i, batch)
        assert padded is not None and padded.tokens == 16 * width
        assert group.slots[: padded.tokens].tolist() == [
            *slots.tolist(), *[PAD_SLOT_ID] * (padded.tokens - count)
        ]  # fmt: skip


@pytest.mark.nightly
def test_rows_without_drafts_beside_rows_with_some(speculating: Passes) -> None:
    """Shorter rows begin with padding; nobody sees it, nor its adapters."""
    passes, width = speculating, 1 + DRAFTS
    counts = [width, 1, 1, width, 2, 1]
    drafted = plan_of([BATCHES["mixed"](row) for row in range(6)], 13, DRAFTS)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    plan = plan_step(replace(drafted.schedule, starts=starts), drafted.tables)
    ids = torch.arange(starts[-1], dtype=torch.int32) % 40
    layout, offsets = passes.step.readout.layout, plan.tables.offsets
    adapted = adapters_of(6, random.Random(5))
    before = dict(passes.graphs.replays)
    replayed, graphs = passes.run(plan, ids, adapted), passes.step.graphs
    assert all(passes.graphs.replays[i] == before[i] + 1 for i in range(3))
    # Each request by itself.
    for row in range(6):
        own = slice(starts[row], starts[row + 1])
        alone = plan_of([BATCHES["mixed"](row)], 13, counts[row] - 1)
        uses = replace(adapted, uses=adapted.uses[row : row + 1], sets=adapted.sets[row : row + 1])
        exact = passes.run(alone, ids[own], uses)
        width_of = min(exact.shape[1], replayed.shape[1])
        assert torch.allclose(exact[:, :width_of], replayed[own][:, :width_of], atol=1e-5)
    assert passes.step.graphs is graphs and not offsets[0].any() and layout.streams == 3


@pytest.mark.nightly
def test_rows_of_more_tokens_are_not_replayed(speculating: Passes) -> None:
    plan = plan_of([BATCHES["pure"](row) for row in range(4)], 20, DRAFTS + 1)
    assert whole_batch(plan.schedule, 4 * (DRAFTS + 2), 1 + DRAFTS) is None
    batch = whole_batch(plan.schedule, 4 * (DRAFTS + 2), 99)
    assert batch is not None and speculating.graphs.shape_for(0, batch) is None
    plan = plan_of([BATCHES["pure"](row) for row in range(4)], 20, DRAFTS - 1)
    batch = whole_batch(plan.schedule, 4 * DRAFTS, 1 + DRAFTS)
    assert speculating.graphs.shape_for(0, batch) == (16, 1 + DRAFTS)
    assert speculating.graphs.shape_for(0, batch, exact=True) is None


@pytest.mark.nightly
def test_candidates_are_valued_as_if_they_had_been_drawn(passes: Passes) -> None:
    plan = plan_of([valued(row) for row in range(5)], 20)
    ids = torch.arange(5, dtype=torch.int32) * 3
    before, layout = passes.graphs.replays[1], passes.step.readout.layout
    out = passes.run(plan, ids)
    assert passes.graphs.replays[1] == before + 2
    base, chat = passes.step.models[:2]
    control = layout.read_control(out)
    best = base.compute_logits(base(ids, torch.full((5,), 20))).topk(TOP_K).indices
    assert torch.equal(control.ids.long(), best)
    after = chat(best.flatten(), torch.full((5 * TOP_K,), 21)).sum(-1).view(5, TOP_K)
    assert not (best == 3).any()  # no end of a text
    assert torch.allclose(control.added, after - after.mean(-1, keepdim=True), atol=1e-5)


@pytest.mark.nightly
def test_candidates_are_written_into_blocks_of_their_own(passes: Passes) -> None:
    batch = Candidates.of(np.array([1, 1, 4]), np.array([18, 18, 5], np.int32))
    shape, scratch = passes.graphs.shape_for(0, batch), 900
    assert shape == Shape(16, 1)
    passes.graphs.put_later(0, torch.from_numpy(passes.graphs.inputs_of(batch, scratch)))
    passes.graphs.put_own(0, torch.tensor([7, 8, 9], dtype=torch.int32))
    found = passes.graphs.run(0, batch, shape)
    want = passes.step.models[0](torch.tensor([7, 8, 9]), torch.tensor([18, 18, 5]))
    assert torch.equal(found, want)
    [group] = passes.graphs._streams[0].groups
    assert group.blocks[:3, :2].tolist() == [[6, 900], [6, 901], [902, 25]]
    assert group.slots[:3].tolist() == [900 * SIZE + 2, 901 * SIZE + 2, 902 * SIZE + 5]
