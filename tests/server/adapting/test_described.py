"""What the admin API says of an adapter holds for the requests that come next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from adapters.registry.loader import Loaded
from adapters.registry.record import Content, Facts, Record
from server.adapting.service import described

OLD, NEW = (Content("a", v, "/x", digest=v, facts=Facts("lora")) for v in ("1", "2"))


def state(record: Record, here: Content | None, failure: Exception | None = None) -> str:
    """The state that a server shows which answers with `here`."""
    loaded = {} if here is None else {"a": Loaded(here, Path("/x"))}
    adapters: Any = SimpleNamespace(
        manager=SimpleNamespace(
            loaded=loaded, failure=lambda _: failure, registry=SimpleNamespace(replica="me")
        ),
        loader=SimpleNamespace(resident=lambda _: True),
    )
    found: str = described(record, adapters)["state"]
    return found


def test_what_this_server_loads_is_ready_when_requests_get_it() -> None:
    """Else whoever saw `ready` and asked at once got what the name stood for before."""
    ready = Record(NEW, "ready", 0.0, 0.0, serving=NEW, owner="me")
    assert state(ready, OLD) == state(ready, None) == "loading"
    assert state(ready, NEW) == "ready"
    assert state(Record(NEW, "failed", 0.0, 0.0, serving=OLD, owner="me"), OLD) == "failed"
    # Another server's work, which this one follows: `here` tells how far it is.
    assert state(Record(NEW, "ready", 0.0, 0.0, serving=NEW, owner="you"), OLD) == "ready"
