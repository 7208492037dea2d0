"""vLLM's series stay bounded when adapters come and go."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from server import engine_series
from server.adapting import served_names
from server.adapting.served_names import ServedNames
from server.engine_series import _Newest

LABELS = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")


def test_the_newest_sets_of_adapters_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_series, "MOST", 3)
    registry = CollectorRegistry()
    gauge = Gauge("lora_requests_info", "", LABELS, registry=registry)
    newest = _Newest(gauge)
    for running in ("a", "b", "a", "c", "a,c", "d"):
        labels = dict(zip(LABELS, (2, "", running), strict=True))
        newest.labels(**labels).set_to_current_time()
    page = generate_latest(registry).decode()
    kept = {line.split('running_lora_adapters="')[1].split('"')[0]
            for line in page.splitlines() if not line.startswith("#")}  # fmt: skip
    assert kept == {"c", "a,c", "d"}


def test_sets_are_called_as_clients_call_them() -> None:
    names = ServedNames()
    with names.using("x", ["b", "a"]), names.using("x", ["a"]), names.using("y", ["c"]):
        assert names.of(["x"]) == ["a", "b"]
        assert names.of(["x", "y", "gone"]) == ["a", "b", "c"]
        with names.waiting(["d"]):
            assert names.of_waiting(["y"]) == ["c", "d"]
    assert names.of(["x", "y"]) == names.of_waiting(["x"]) == []
    many = [f"n{i:04}" for i in range(served_names.MOST + 5)]
    with names.using("x", many):
        assert names.of(["x"]) == many[: served_names.MOST]
