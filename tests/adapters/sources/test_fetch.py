"""Fetching from folders, a web server, an S3 server and a hub, all real; and all that is bad."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters.errors import BadAdapter, BadSource, SourceAway, TooLarge
from adapters.formats.inspect import read_artefact
from adapters.sources.fetch import Fetcher
from adapters.sources.source import parse_source
from tests.adapters.kinds import shard
from tests.adapters.registry.kit import MODULE, make_lora
from tests.adapters.sources.fetching import WEIGHTS, on, refused
from tests.adapters.sources.servers import (
    Server,
    folder,
    hub,
)


def make_pack(path: Path) -> Path:
    """A native MeteoRA pack of two tasks."""
    for task in ("one", "two"):
        make_lora(path / task)
    config = {"layout": "native", "top_k": 1, "temperature": 1, "tasks": ["one", "two"]}
    (path / "meteora.json").write_text(json.dumps(config))
    gates = {f"{MODULE}.moe_gate.weight": np.ones((2, 16), np.float32)}
    save_file(gates, path / "gates.safetensors")
    return path


def test_a_local_adapter_is_copied_whole_and_read_only(fetcher: Fetcher, tmp_path: Path) -> None:
    source = make_lora(tmp_path / "in/a", 2.0)
    (source / "training_args.bin").write_bytes(pickle.dumps("evil"))
    (source / "README.md").write_text("hello")
    seen: list[int] = []
    found = fetcher.fetch(parse_source(str(source)), seen.append)
    assert sorted(p.name for p in found.folder.iterdir()) == ["adapter_config.json", WEIGHTS]
    for name in ("adapter_config.json", WEIGHTS):
        assert (found.folder / name).read_bytes() == (source / name).read_bytes()
        assert (found.folder / name).stat().st_mode & 0o777 == 0o444
    assert found.folder.stat().st_mode & 0o777 == 0o555
    assert found.digest == read_artefact(source).digest() == found.folder.name
    assert seen[-1] == found.size_bytes == sum(f.stat().st_size for f in found.folder.iterdir())
    assert fetcher.fetch(parse_source(str(source))) == found, "again: the same folder"


def test_shards_are_fetched_with_their_index_from_a_folder_and_from_the_web(
    fetcher: Fetcher, tmp_path: Path, server: Server
) -> None:
    source = make_lora(tmp_path / "in/a", 2.0)
    whole = read_artefact(source)
    shard(source)
    local = fetcher.fetch(parse_source(str(source)))
    assert local.digest == read_artefact(local.folder).digest() == read_artefact(source).digest()
    assert sorted(p.name for p in local.folder.iterdir()) == sorted(
        p.name for p in source.iterdir()
    )
    assert read_artefact(local.folder).parts[0].keys() == whole.parts[0].keys()
    server.answers = folder(source, "/s")
    assert on(fetcher, server).fetch(parse_source(f"{server.url}/s")).digest == local.digest
    few = replace(fetcher, limits=replace(fetcher.limits, max_files=3))
    with pytest.raises(TooLarge, match="too many files"):
        few.fetch(parse_source(str(source)))
    next(source.glob("*00002.safetensors")).unlink()
    refused(fetcher, str(source), BadAdapter, "missing")


def test_a_pack_is_fetched_with_its_tasks_from_a_folder_and_from_the_web(
    fetcher: Fetcher, tmp_path: Path, server: Server
) -> None:
    pack = make_pack(tmp_path / "in/pack")
    local = fetcher.fetch(parse_source(str(pack)))
    assert local.kind == "meteora"
    assert (local.folder / "two" / WEIGHTS).is_file()
    server.answers = folder(pack, "/p")
    web = on(fetcher, server).fetch(parse_source(f"{server.url}/p"))
    assert web.digest == local.digest


def test_the_same_adapter_from_everywhere_has_one_digest(
    fetcher: Fetcher, tmp_path: Path, server: Server, s3: str
) -> None:
    source = make_lora(tmp_path / "in/a", 2.0)
    local = fetcher.fetch(parse_source(str(source)))
    server.answers = folder(source, "/x/a b") | hub(tmp_path / "in", "acme/lora")
    web = on(fetcher, server).fetch(parse_source(f"{server.url}/x/a%20b/"))
    with_hub = replace(fetcher, hub_endpoint=server.url)
    from_hub = with_hub.fetch(parse_source("hf://acme/lora@v1/a"))
    put(s3, "some/a", source)
    from_s3 = replace(fetcher, s3_endpoint=s3).fetch(parse_source("s3://adapters/some/a"))
    assert local.digest == web.digest == from_hub.digest == from_s3.digest
    assert fetcher.store.digests() == {local.digest}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3-compatible server with the bucket `adapters`.

    In a process of its own: vLLM looks at every loaded module when an engine starts, and Flask's
    proxies raise when they are looked at outside of a request.
    """
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("moto_server")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        served = subprocess.Popen(
            [str(program), "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_port(port)
            url = f"http://127.0.0.1:{port}"
            boto3.client("s3", endpoint_url=url).create_bucket(Bucket="adapters")
            yield url
        finally:
            served.terminate()
            served.wait()


def wait_for_port(port: int, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.1)
        else:
            return


def put(url: str, prefix: str, source: Path) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=url)
    for file in source.iterdir():
        client.upload_file(str(file), "adapters", f"{prefix}/{file.name}")


def test_buckets_refuse_what_other_places_refuse(fetcher: Fetcher, tmp_path: Path, s3: str) -> None:
    fetcher = replace(fetcher, s3_endpoint=s3)
    big = make_lora(tmp_path / "in/big", size=80_000)
    put(s3, "big", big)
    refused(fetcher, "s3://adapters/big", TooLarge, "too large")
    refused(fetcher, "s3://adapters/nothing", BadAdapter, "no adapter here")
    refused(fetcher, "s3://other/a", BadSource, "not an allowed place")
    # Nothing listens there.
    away = replace(fetcher, s3_endpoint="http://127.0.0.1:9")
    refused(away, "s3://adapters/big", SourceAway, ".")


def test_a_hub_refuses_what_other_places_refuse(
    fetcher: Fetcher, tmp_path: Path, server: Server
) -> None:
    fetcher = replace(fetcher, hub_endpoint=server.url)
    make_lora(tmp_path / "in/big", size=80_000)
    (tmp_path / "in/pickled").mkdir()
    (tmp_path / "in/pickled/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "in/pickled/adapter_model.bin").write_bytes(pickle.dumps([1]))
    server.answers = hub(tmp_path / "in", "acme/lora")
    refused(fetcher, "hf://acme/lora/big", TooLarge, "too large")
    refused(fetcher, "acme/lora/pickled".replace("acme", "hf://acme"), BadAdapter, "pickle")
    refused(fetcher, "acme/lora", BadAdapter, "no adapter here")
    refused(fetcher, "hf://other/lora", BadSource, "not an allowed place")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a safetensors file"),
        (pickle.dumps({"lora": [1.0] * 100}), "a pickle"),
        (struct.pack("<Q", 1 << 40) + b"{}" * 20, "not a safetensors file"),
        (struct.pack("<Q", 20) + b'{"a": ' + b"[" * 14, "broken header"),
        (b"\x1f\x8b" + b"0" * 64, "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_what_is_no_safetensors_file_is_named(
    fetcher: Fetcher, tmp_path: Path, content: bytes, says: str
) -> None:
    source = make_lora(tmp_path / "in/a")
    (source / WEIGHTS).write_bytes(content)
    refused(fetcher, str(source), BadAdapter, says)


def header(entries: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 255]},
        {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 1 << 50]},
        {"dtype": "F32", "shape": [4, 16], "data_offsets": [-256, 0]},
        {"dtype": "F31", "shape": [4, 16], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [4, -16], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [4, 16], "data_offsets": [8, 264]},
        "text",
    ],
)
def test_headers_that_lie_are_refused(fetcher: Fetcher, tmp_path: Path, entry: object) -> None:
    source = make_lora(tmp_path / "in/a")
    (source / WEIGHTS).write_bytes(header({f"base_model.model.{MODULE}.lora_A.weight": entry},
                                          bytes(256)))  # fmt: skip
    refused(fetcher, str(source), BadAdapter, WEIGHTS)


def test_every_truncation_of_a_file_is_refused(fetcher: Fetcher, tmp_path: Path) -> None:
    source = make_lora(tmp_path / "in/a")
    whole = (source / WEIGHTS).read_bytes()
    for length in [0, 7, 8, 9, 100, *range(len(whole) - 600, len(whole), 37), len(whole) - 1]:
        (source / WEIGHTS).write_bytes(whole[:length])
        refused(fetcher, str(source), BadAdapter, ".")
    (source / WEIGHTS).write_bytes(whole + b"\0")
    refused(fetcher, str(source), BadAdapter, "cut off|behind")
    (source / WEIGHTS).write_bytes(whole)
    assert fetcher.fetch(parse_source(str(source))).kind == "lora"


def test_links_pipes_and_devices_do_not_lead_out_of_the_root(
    fetcher: Fetcher, tmp_path: Path
) -> None:
    outside = make_lora(tmp_path / "secret")
    source = make_lora(tmp_path / "in/a")
    (tmp_path / "in/link").symlink_to(outside)
    refused(fetcher, str(tmp_path / "in/link"), BadSource, "not under an allowed root")
    refused(fetcher, str(tmp_path / "secret"), BadSource, "not under an allowed root")
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).symlink_to(outside / WEIGHTS)
    refused(fetcher, str(source), BadSource, "leads out")
    (source / WEIGHTS).unlink()
    os.mkfifo(source / WEIGHTS)
    refused(fetcher, str(source), BadSource, "not a regular file")
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).mkdir()
    refused(fetcher, str(source), BadSource, "not a regular file")
    (source / WEIGHTS).rmdir()
    # A link that stays inside, as in the hub's own cache, is fine.
    inside = make_lora(tmp_path / "in/blobs", 7.0)
    (source / WEIGHTS).symlink_to(inside / WEIGHTS)
    found = fetcher.fetch(parse_source(str(source)))
    assert not (found.folder / WEIGHTS).is_symlink()
    assert load_file(found.folder / WEIGHTS)[f"base_model.model.{MODULE}.lora_A.weight"][0, 0] == 7


def test_a_pack_cannot_name_folders_outside(fetcher: Fetcher, tmp_path: Path) -> None:
    make_lora(tmp_path / "in/other")
    pack = make_pack(tmp_path / "in/pack")
    for task in ("../other", "/etc", "", ".", "a/b", 7):
        config = {"layout": "native", "tasks": ["one", task]}
        (pack / "meteora.json").write_text(json.dumps(config))
        refused(fetcher, str(pack), BadAdapter, "not the name of a folder")
    (pack / "meteora.json").write_text(json.dumps({"layout": "native", "tasks": ["x"] * 9999}))
    refused(fetcher, str(pack), TooLarge, "tasks")


def test_an_archive_is_not_unpacked(fetcher: Fetcher, tmp_path: Path) -> None:
    bomb = tmp_path / "in/bomb.zip"
    bomb.parent.mkdir()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(WEIGHTS, bytes(50_000_000))
    with pytest.raises(BadSource, match="archives"):
        parse_source(str(bomb))
    source = make_lora(tmp_path / "in/a")
    bomb.rename(source / WEIGHTS)
    refused(fetcher, str(source), BadAdapter, "zip")
