"""A fetcher, and what is left in its store when it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.errors import AdapterError
from adapters.sources.fetch import Fetcher
from adapters.sources.origin import Limits
from adapters.sources.source import parse_source
from tests.adapters.sources.servers import (
    Server,
)

WEIGHTS = "adapter_model.safetensors"
QUICK = Limits(max_bytes=1 << 20, max_file_bytes=1 << 20, connect_s=2, read_s=0.5, tries=2)


def on(fetcher: Fetcher, server: Server) -> Fetcher:
    """The fetcher with this server's port allowed."""
    return replace(fetcher, allowed=replace(fetcher.allowed, remotes=(server.url,)))


def left(fetcher: Fetcher) -> list[str]:
    """Everything that the store holds, half-written things included."""
    root = fetcher.store.root
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p != root / ".tmp")


def refused(fetcher: Fetcher, source: str, error: type[AdapterError], says: str) -> None:
    """The fetch fails so, and the store is as it was."""
    before = left(fetcher)
    with pytest.raises(error, match=says):
        fetcher.fetch(parse_source(source))
    assert left(fetcher) == before
