"""Fetching from hosts that are slow, silent, large, or somewhere else."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import BadSource, SourceAway, TooLarge
from adapters.sources.fetch import Fetcher
from adapters.sources.source import parse_source
from tests.adapters.registry.kit import make_lora
from tests.adapters.sources.fetching import QUICK, WEIGHTS, left, on, refused
from tests.adapters.sources.servers import (
    Server,
    break_off,
    endless,
    folder,
    in_turn,
    send,
    status,
)


def test_sizes_are_limited_by_what_is_said_and_by_what_comes(
    fetcher: Fetcher, tmp_path: Path, server: Server
) -> None:
    fetcher = on(fetcher, server)
    config = (make_lora(tmp_path / "in/a") / "adapter_config.json").read_bytes()
    server.answers["/a/adapter_config.json"] = send(config)
    ten_gb = send(b"", content_length=str(10 << 30))
    server.answers[f"/a/{WEIGHTS}"] = ten_gb
    refused(fetcher, f"{server.url}/a", TooLarge, "too large")
    server.answers[f"/a/{WEIGHTS}"] = endless
    refused(fetcher, f"{server.url}/a", TooLarge, "too large")
    server.answers["/a/adapter_config.json"] = send(b" " * (1 << 20) + config)
    refused(fetcher, f"{server.url}/a", TooLarge, "too large")
    total = replace(fetcher, limits=replace(QUICK, max_bytes=700))
    refused(total, str(tmp_path / "in/a"), TooLarge, "too large")


def test_redirects_stay_on_the_host(fetcher: Fetcher, tmp_path: Path, server: Server) -> None:
    fetcher = on(fetcher, server)
    source = make_lora(tmp_path / "in/a")
    server.answers = folder(source, "/real")
    for name in ("adapter_config.json", WEIGHTS):
        server.answers[f"/a/{name}"] = status(302, location=f"/real/{name}")
    assert fetcher.fetch(parse_source(f"{server.url}/a")).kind == "lora"
    with Server(folder(source, "/real")).running() as other:
        for target in (f"{other.url}/real/{WEIGHTS}", "http://localhost:1/x", "file:///etc/passwd",
                       "//127.0.0.1:1/x"):  # fmt: skip
            server.answers[f"/a/{WEIGHTS}"] = status(301, location=target)
            refused(fetcher, f"{server.url}/a", BadSource, "another host")
        assert other.asked == []
    server.answers[f"/a/{WEIGHTS}"] = status(302, location=f"/a/{WEIGHTS}")
    refused(fetcher, f"{server.url}/a", BadSource, "more than 5 redirects")


def test_what_may_pass_is_tried_again_and_what_may_not_is_not(
    fetcher: Fetcher, tmp_path: Path, server: Server
) -> None:
    fetcher = on(fetcher, server)
    source = make_lora(tmp_path / "in/a")
    whole = (source / WEIGHTS).read_bytes()
    for trouble in (status(503), break_off(whole, 100), break_off(whole, 0)):
        server.answers = folder(source, "/a")
        server.answers[f"/a/{WEIGHTS}"] = in_turn(trouble, send(whole))
        server.asked.clear()
        assert fetcher.fetch(parse_source(f"{server.url}/a")).size_bytes > len(whole)
        assert server.asked.count(f"/a/{WEIGHTS}") == 2
        server.answers[f"/a/{WEIGHTS}"] = trouble
        refused(fetcher, f"{server.url}/a", SourceAway, ".")
    server.answers[f"/a/{WEIGHTS}"] = status(403)
    server.asked.clear()
    refused(fetcher, f"{server.url}/a", BadSource, "403")
    assert server.asked.count(f"/a/{WEIGHTS}") == 1
    server.answers[f"/a/{WEIGHTS}"] = send(whole, content_encoding="gzip")
    refused(fetcher, f"{server.url}/a", BadSource, "compresses")


def test_silence_and_slowness_end(fetcher: Fetcher, tmp_path: Path, server: Server) -> None:
    source = make_lora(tmp_path / "in/a")
    over = threading.Event()

    def hang(request: Any) -> None:
        over.wait(20)

    server.answers = folder(source, "/a")
    server.answers[f"/a/{WEIGHTS}"] = hang
    silent = replace(on(fetcher, server), limits=replace(QUICK, tries=1))
    refused(silent, f"{server.url}/a", SourceAway, "ReadTimeout")
    over.set()

    def drip(request: Any) -> None:
        request.send_response(200)
        request.send_header("content-length", "1000")
        request.end_headers()
        for _ in range(1000):
            request.wfile.write(b"\x10" + bytes(7))
            over.wait(0)
            threading.Event().wait(0.05)

    server.answers[f"/a/{WEIGHTS}"] = drip
    slow = replace(silent, limits=replace(QUICK, tries=3, timeout_s=0.4))
    begun = time.monotonic()
    refused(slow, f"{server.url}/a", SourceAway, "too slow")
    assert time.monotonic() - begun < 2


def test_a_fetch_that_is_called_off_leaves_nothing(fetcher: Fetcher, tmp_path: Path) -> None:
    source = make_lora(tmp_path / "in/a")

    def report(done: int) -> None:
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetcher.fetch(parse_source(str(source)), report)
    assert left(fetcher) == []
