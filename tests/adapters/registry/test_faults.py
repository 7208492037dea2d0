"""Whose fault it is that a load failed, and what is tried again."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import (
    AdapterError,
    BadAdapter,
    DoesNotFit,
    EngineAway,
    NoAdapter,
    NoRoom,
    ServerFault,
    StoreFull,
    from_wire,
    kind_of,
    to_wire,
)
from adapters.registry import manager
from adapters.registry.record import decode, encode
from tests.adapters.registry.kit import Replica, make_lora, replica, until

SERVER: list[Exception] = [
    EngineAway("the engine did not answer within 30 s"), NoRoom("no memory"), StoreFull("full"),
    ServerFault("the engine failed"), RuntimeError("nobody thought of this"),
]  # fmt: skip


async def failed(r: Replica) -> None:
    await until(lambda: "a" in r.manager.records and r.manager.records["a"].state == "failed")


@pytest.mark.parametrize("error", [*SERVER, BadAdapter("broken"), DoesNotFit("too wide")], ids=str)
async def test_a_record_says_whose_fault_it_is_and_posting_again_tries_again(
    redis_url: str, namespace: str, tmp_path: Path, error: Exception
) -> None:
    source = str(make_lora(tmp_path / "in/a", 5.0))
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        r.loader.broken = error
        await r.manager.submit("a", source)
        await failed(r)
        record = r.manager.records["a"]
        assert record.error is not None and record.reason is not None
        assert kind_of(record.error).whose == ("server" if error in SERVER else "adapter")
        assert str(error) in record.reason
        assert decode(encode(record), record.token) == record
        r.loader.broken = None
        await r.manager.submit("a", source)
        await until(lambda: r.answers("a") == 5.0)
        assert r.manager.records["a"].error is None


@pytest.mark.parametrize("error", SERVER, ids=str)
async def test_what_another_replica_loaded_is_tried_until_it_is_here(
    redis_url: str, namespace: str, tmp_path: Path, error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(manager, "_RETRY_S", 0.2)
    source = str(make_lora(tmp_path / "in/a", 5.0))
    root, store = tmp_path / "in", tmp_path / "store"
    async with replica(redis_url, namespace, root, store) as one:
        await one.manager.submit("a", source)
        await until(lambda: one.answers("a") == 5.0)
        async with replica(redis_url, namespace, root, store, broken=error) as two:
            await until(lambda: two.manager.failure("a") is not None)
            with pytest.raises(ServerFault):  # 503: it is not that there were no such adapter
                two.manager.lookup("a")
            two.loader.broken = None
            await until(lambda: two.answers("a") == 5.0)
            assert two.manager.failure("a") is None


async def test_an_artefact_that_is_refused_is_not_tried_again_and_again(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    source = str(make_lora(tmp_path / "in/a", 5.0))
    root, store = tmp_path / "in", tmp_path / "store"
    async with replica(redis_url, namespace, root, store) as one:
        await one.manager.submit("a", source)
        await until(lambda: one.answers("a") == 5.0)
        broken = BadAdapter("broken")
        async with replica(redis_url, namespace, root, store, broken=broken) as two:
            await until(lambda: two.manager.failure("a") is not None)
            with pytest.raises(NoAdapter, match="broken"):
                two.manager.lookup("a")


@pytest.mark.parametrize("error", [e for e in SERVER if isinstance(e, AdapterError)], ids=str)
def test_errors_survive_the_way_between_processes(error: AdapterError) -> None:
    found = from_wire(to_wire(error))
    assert type(found) is type(error) and str(found) == str(error)
    assert kind_of("FromANewerVersion") is AdapterError
