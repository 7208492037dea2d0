"""What ranks say to each other, with threads in their place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.errors import BadAdapter, DoesNotFit, RankFault
from steering.worker import ranks
from steering.worker.adapting import sets
from steering.worker.adapting.sets import SetManager

Work = Callable[[], Iterator[int]]


def run(monkeypatch: pytest.MonkeyPatch, *work: Work) -> list[list[int] | Exception]:
    """What each rank's work comes to in `together`: its parts, or what it raised."""
    barrier, own = threading.Barrier(len(work), timeout=20), threading.local()
    said: list[Any] = [None] * len(work)

    def exchange(value: Any) -> list[Any]:
        said[own.rank] = value
        barrier.wait()
        found = list(said)
        barrier.wait()
        return found

    def all_reduce(part: torch.Tensor, op: Any = None, **_: Any) -> None:
        parts = torch.stack(exchange(part.clone()))
        part.copy_(parts.sum(0) if op is None else parts.amax(0))

    monkeypatch.setattr(ranks, "size", lambda: len(work))
    monkeypatch.setattr(ranks, "get_tp_group", lambda: SimpleNamespace(cpu_group=None))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def rank(number: int) -> list[int] | Exception:
        own.rank = number
        try:
            return list(ranks.together(work[number]()))
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(rank, range(len(work))))


def parts(count: int, fails: int | None = None, sums: bool = False) -> Work:
    """Numbers from 0 on; `fails` says at which it breaks off."""

    def work() -> Iterator[int]:
        for i in range(count):
            if i == fails:
                raise BadAdapter("here")
            yield int(ranks.added_up(torch.tensor([i]))) if sums else i
        if fails == count:
            raise BadAdapter("here")

    return work


@pytest.mark.parametrize("number", [1, 2, 3])
def test_all_go_on(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    assert run(monkeypatch, *[parts(4)] * number) == [[0, 1, 2, 3]] * number
    added = [number * i for i in range(3)]
    assert run(monkeypatch, *[parts(3, sums=True)] * number) == [added] * number


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("who", [0, 1, 2])
def test_where_one_fails_all_do(
    monkeypatch: pytest.MonkeyPatch, who: int, at: int, sums: bool
) -> None:
    found = run(monkeypatch, *(parts(4, at if i == who else None, sums) for i in range(3)))
    assert [type(one) for one in found] == [BadAdapter if i == who else RankFault for i in range(3)]


def test_several_that_fail_say_why_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, parts(4, 1), parts(4), parts(4, 1))
    assert [type(one) for one in found] == [BadAdapter, RankFault, BadAdapter]


@pytest.mark.parametrize("other", [parts(3), parts(5), parts(4, sums=True)])
def test_who_has_other_parts_fails_with_all(monkeypatch: pytest.MonkeyPatch, other: Work) -> None:
    """Instead of waiting for ever."""
    found = run(monkeypatch, parts(4), other)
    assert [type(one) for one in found] == [RankFault, RankFault]


def test_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    def votes(mine: bool) -> Work:
        return lambda: iter([int(ranks.anyone(mine)), int(ranks.everyone(mine))])

    assert run(monkeypatch, votes(True), votes(False)) == [[1, 0]] * 2
    assert run(monkeypatch, votes(True), votes(True)) == [[1, 1]] * 2
    assert run(monkeypatch, votes(False), votes(False)) == [[0, 0]] * 2


def test_packs_need_ranks_that_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = SetManager.__new__(SetManager)
    manager.lora_config = SimpleNamespace(max_lora_rank=8)
    found: Any = SimpleNamespace(name="set", rank=8, members=[SimpleNamespace(routed=True)])
    monkeypatch.setattr(sets, "conditional", lambda _: False)  # it would read the files
    monkeypatch.setattr(ranks, "size", lambda: 2)
    manager._check(found)
    monkeypatch.setattr(ranks, "size", lambda: 3)
    with pytest.raises(DoesNotFit, match="more than two ranks on CPUs"):
        manager._check(found)
    found.members[0].routed = False
    manager._check(found)
