"""What cannot be served is refused with a reason, and nothing else changes."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from server.main import run
from tests.adapters.make import make_lora
from tests.adapters.sources.servers import Server as Web
from tests.adapters.sources.servers import break_off, folder, send, status
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import ask, exact, listing, load, record_of, settled, submit, unload
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A = Kind((("a", 1.0, None, None),))
V0 = Kind((("v0", 1.0, None, None),))
MIXED = Kind((("a", 1.0, None, None), ("b", 0.5, None, None)))


def copy(folder: Path, into: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(folder, into)
    return into


def _tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return spoil


def _config(**change: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**config, **change}))

    return spoil


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / WEIGHTS).write_bytes(change((path / WEIGHTS).read_bytes()))

    return spoil


def _nan(tensors: dict[str, Any]) -> None:
    tensors[min(tensors)].flat[0] = np.nan


def _stray(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        if "layers.1.self_attn.q_proj" in name:
            tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)


def _pickle(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))


def _empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def _sparse(path: Path) -> None:
    with (path / WEIGHTS).open("r+b") as file:
        file.truncate(10 << 30)


def _linked(path: Path) -> None:
    outside = path.parents[1] / f"outside-{path.name}"
    (path / WEIGHTS).rename(outside)
    (path / WEIGHTS).symlink_to(outside)


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_bytes(lambda raw: raw[:-100]), f"{WEIGHTS}.*(truncated|bytes|end)"),
    "corrupt": (_bytes(lambda raw: raw[:8] + b"{]" + raw[10:]), f"{WEIGHTS}.*header"),
    "garbage": (_bytes(lambda raw: b"\xff" * 4096), WEIGHTS),
    "pickle": (_pickle, r"pickle \(.bin\).*safetensors"),
    "pickle-renamed": (_bytes(lambda raw: pickle.dumps({"x": raw})), "this is a pickle"),
    "archive": (_bytes(lambda raw: b"PK\x03\x04" + raw), f"{WEIGHTS}: this is a zip archive"),
    "bomb": (_bytes(lambda raw: gzip.compress(bytes(1 << 20))), "this is a gzip archive"),
    "nan": (_tensors(_nan), f"{WEIGHTS}: .*NaN or infinite"),
    "stray": (_tensors(_stray), r"layers\.7\.self_attn\.q_proj"),
    "rank-said": (_config(r=8), "r(ank)?.*8|shape"),
    "dora": (_config(use_dora=True), "use_dora"),
    "sparse": (_sparse, f"{WEIGHTS}: the file is too large .*at most"),
    "linked": (_linked, f"{WEIGHTS}: .*root"),
    "empty": (_empty, f"no adapter here; allowed: a folder with {CONFIG}"),
}  # fmt: skip
"""Name → how to spoil a sound adapter, and what the reason must say."""


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_files_fail_with_the_reason(
    live: Server, folders: dict[str, Path], oracle: Oracle, name: str
) -> None:
    spoil, reason = SPOILED[name]
    path = copy(folders["b"], folders["a"].parent / f"spoiled-{name}")
    spoil(path)
    fails(live, f"bad-{name}", path, reason)
    exact(live, A.body({}), oracle(A))


def fails(live: Server, name: str, source: object, reason: str) -> None:
    """The load ends in a record that says why; nothing else changes, and the record goes."""
    before = listing(live)
    answer = submit(live, name, source)
    assert answer.status_code == 202, answer.text
    record = settled(live, name)
    assert record["state"] == "failed", record
    assert re.search(reason, record["reason"]), record["reason"]
    assert record["serving"] is None and record["here"]["version"] is None
    asked = live.post("/v1/completions", A.body({"a": name}, as_model=True))
    assert asked.status_code == 404 and name in asked.text
    after = listing(live)
    assert [r for r in after["adapters"] if r["name"] != name] == before["adapters"]
    assert after["engine"]["bytes"] == before["engine"]["bytes"]
    unload(live, name)


def test_adapters_of_other_shapes_and_ranks_fail_with_the_numbers(
    live: Server, models: Path, folders: dict[str, Path]
) -> None:
    root = folders["a"].parent
    fails(live, "other-base", folders["f"], "shape|layer|module")
    wide = make_lora(root / "wide", models / "base", seed=5, r=32)
    fails(live, "wide", wide, "32.*24|24.*32")


def test_web_sources_that_misbehave_fail_with_the_reason(
    live: Server, folders: dict[str, Path], web: Web
) -> None:
    answers = folder(folders["b"], "/b")
    elsewhere = web.url.replace("127.0.0.1", "localhost")
    raw = (folders["b"] / WEIGHTS).read_bytes()
    huge = send(raw, content_length=str(10 << 30))
    for path, misbehaviour, reason in (
        ("moved", status(302, location=f"{elsewhere}/b/{WEIGHTS}"),
         f"redirects to another host .*only {re.escape(web.url)}"),
        ("huge", huge, "the file is too large .*at most"),
        ("short", break_off(raw, 1000), "broke off|Protocol"),
        ("zipped", send(raw, content_encoding="gzip"), "compresses"),
        ("gone", status(404), "missing"),
        ("locked", status(403), "403"),
    ):  # fmt: skip
        for file, answer in answers.items():
            web.answers[file.replace("/b/", f"/{path}/")] = answer
        web.answers[f"/{path}/{WEIGHTS}"] = misbehaviour
        fails(live, f"bad-{path}", f"{web.url}/{path}", reason)


def test_what_is_not_a_request_for_an_adapter_is_refused_at_once(
    live: Server, folders: dict[str, Path]
) -> None:
    before = listing(live)
    sound = {"name": "new", "source": str(folders["b"])}
    outside = folders["a"].parents[1] / "chat"
    for change, code, text in (
        ({"source": f"{folders['b']}/../../chat"}, 400, "source: .*\\.\\."),
        ({"source": str(outside)}, 400, "source: not under an allowed root"),
        ({"source": "/etc"}, 400, "not under an allowed root"),
        ({"source": "relative/folder/of/mine"}, 400, "source: .*allowed: /folder"),
        ({"source": "https://elsewhere.example/x"}, 400, "not an allowed place"),
        ({"source": "http://user:secret@127.0.0.1/x"}, 400, "credentials"),
        ({"source": "https://elsewhere.example/x.zip"}, 400, "archives are not unpacked"),
        ({"source": "/tmp/adapter_model.bin"}, 400, "pickles"),
        ({"source": "ftp://elsewhere.example/x"}, 400, "allowed: /folder"),
        ({"source": f"{folders['b']}\n"}, 400, "control characters"),
        ({"source": ""}, 400, "source"),
        ({"name": "a\u0000b"}, 400, "name: not a usable name"),
        ({"name": "a\nb"}, 400, "name: not a usable name"),
        ({"name": "a@b"}, 400, "name: .*letters, digits"),
        ({"name": "../x"}, 400, "name: not a usable name"),
        ({"name": ""}, 400, "name"),
        ({"name": "n" * 200}, 400, "at most 128"),
        ({"version": "1/2"}, 400, "version: not a usable name"),
        ({"name": "big"}, 409, "taken by the base or by a profile"),
        ({"name": "big-chat"}, 409, "taken by the base or by a profile"),
        ({"name": "a"}, 409, "taken by version '1'.*replace"),
        ({"stream": "nowhere"}, 404, "stream: no such stream .*allowed: .*chat"),
        ({"weight": 1.0}, 400, "weight"),
        ({"name": 7}, 400, "name"),
        ({"source": ["x"]}, 400, "source"),
        ({"pin": "yes"}, 400, "pin"),
        ({"replace": 1}, 400, "replace"),
    ):  # fmt: skip
        answer = live.post("/admin/adapters", {**sound, **change})
        assert answer.status_code == code, (change, answer.text)
        error = answer.json()["error"]
        assert re.search(text, error["message"]), (change, error)
        assert "secret" not in answer.text
    for raw in (b"", b"[]", b"{", b'{"name": NaN}', b'"x"'):
        answer = httpx.post(f"{live.url}/admin/adapters", content=raw)
        assert answer.status_code == 400, (raw, answer.text)
    for method, path, code in (
        ("GET", "/admin/adapters/nobody", 404),
        ("DELETE", "/admin/adapters/nobody", 404),
        ("POST", "/admin/adapters/nobody/pin", 404),
        ("POST", "/admin/adapters/nobody/unpin", 404),
        ("GET", "/admin/adapters/%00", 404),
        ("PUT", "/admin/adapters/a", 405),
    ):
        answer = httpx.request(method, live.url + path)
        assert answer.status_code == code, (path, answer.text)
        assert answer.json()["error"]["message"]
    bad = live.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"})
    assert bad.status_code == 400
    nobody = live.post("/v1/unload_lora_adapter", {"lora_name": "nobody"})
    assert nobody.status_code == 404
    after = listing(live)
    assert after["adapters"] == before["adapters"]


def test_requests_that_cannot_be_answered_name_the_field(
    live: Server, folders: dict[str, Path], oracle: Oracle
) -> None:
    def ref(**fields: Any) -> dict[str, Any]:
        return {"adapters": [{"name": "a", **fields}]}

    pack = {"name": "pack"}
    for change, code, param in (
        ({"model": "nobody"}, 404, "model"),
        ({"model": "a@9"}, 404, "model"),
        ({"model": "a@"}, 404, "model"),
        (ref(name="nobody"), 404, "adapters.0.name"),
        (ref(name="a@9"), 404, "adapters.0.name"),
        (ref(weight=11), 400, "adapters.0.weight"),
        (ref(weight=-10.5), 400, "adapters.0.weight"),
        (ref(weight="1"), 400, "adapters.0.weight"),
        (ref(weight=True), 400, "adapters.0.weight"),
        (ref(weight=None), 400, "adapters.0.weight"),
        (ref(top_k=1), 400, "adapters.0.top_k"),
        (ref(temperature=2), 400, "adapters.0.temperature"),
        (ref(scale=2), 400, "adapters.0.scale"),
        ({"adapters": [{**pack, "top_k": 4}]}, 400, "adapters.0.top_k"),
        ({"adapters": [{**pack, "top_k": 0}]}, 400, "adapters.0.top_k"),
        ({"adapters": [{**pack, "top_k": 1.5}]}, 400, "adapters.0.top_k"),
        ({"adapters": [{**pack, "temperature": 0}]}, 400, "adapters.0.temperature"),
        ({"adapters": [{**pack, "temperature": -1}]}, 400, "adapters.0.temperature"),
        ({"adapters": [{"name": "a"}, {"name": "a", "weight": 0.5}]}, 400, "adapters.1"),
        ({"model": "a", "adapters": [{"name": "a"}]}, 400, "adapters.0"),
        ({"adapters": [{"name": "a@1"}, {"name": "a"}]}, 400, "adapters.1"),
        ({"adapters": ["a"]}, 400, "adapters.0"),
        ({"adapters": {"name": "a"}}, 400, "adapters"),
        ({"adapters": "a"}, 400, "adapters"),
        ({"model": "a", "use_beam_search": True, "n": 2}, 400, "use_beam_search"),
        (ref(name="a") | {"use_beam_search": True, "n": 2}, 400, "use_beam_search"),
    ):  # fmt: skip
        for stream in (False, True):
            body = {**Kind().body({}), **change, "stream": stream}
            answer = live.post("/v1/completions", body)
            assert answer.status_code == code, (change, answer.text)
            error = answer.json()["error"]
            assert error["param"] == param, (change, error)
    nan = json.dumps({**Kind().body({}), **ref(weight=12345)}).replace("12345", "NaN")
    answer = httpx.post(f"{live.url}/v1/completions", content=nan,
                        headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == 400 and "not valid JSON" in answer.text
    assert "steering" not in ask(live, {**MIXED.body({})})
    exact(live, MIXED.body({}), oracle(MIXED))


def test_too_much_rank_together_is_refused_with_the_numbers(
    live: Server, models: Path, folders: dict[str, Path]
) -> None:
    big = make_lora(folders["a"].parent / "rank18", models / "base", seed=6, r=18)
    answer = submit(live, "rank18", big)
    assert answer.status_code == 202
    assert settled(live, "rank18")["state"] == "ready"
    refs = [{"name": name} for name in ("rank18", "a", "b")]
    refused = live.post("/v1/completions", {**Kind().body({}), "adapters": refs})
    assert refused.status_code == 400, refused.text
    assert "adapters: " in refused.text and "26" in refused.text and "24" in refused.text
    assert record_of(live, "rank18")["here"]["version"] == "1"
    unload(live, "rank18")


def test_an_adapter_that_names_another_base_is_served_with_a_warning(
    live: Server, folders: dict[str, Path], oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = shutil.copytree(folders["v0"], folders["v0"].parent / "of-another-base")
    config = json.loads((other / "adapter_config.json").read_text())
    assert load(live, "warned", folders["v0"])["warnings"] == []
    config["base_model_name_or_path"] = "someone/another-model"
    (other / "adapter_config.json").write_text(json.dumps(config))
    record = load(live, "warned", other, replace=True)
    [warning] = record["warnings"]
    assert "made for someone/another-model" in warning
    body = V0.body({"v0": "warned"}, as_model=True)
    exact(live, body, oracle(V0))
    shown = next(one for one in listing(live)["adapters"] if one["name"] == "warned")
    assert shown["warnings"] == [warning]
    monkeypatch.setenv("COXSWAIN_URL", live.url)
    assert run(["adapters", "list"]) == 0
    assert f"warned: warning: {warning}" in capsys.readouterr().err
    unload(live, "warned")
