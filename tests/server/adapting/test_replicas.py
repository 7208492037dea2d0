"""Two servers and one Redis: what one loads, the other serves; also while Redis comes and goes.

The first has API keys. The second takes adapters as models only, and holds few bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.adapters.make import make_lora
from tests.redis_server import RedisServer
from tests.server.adapting.answers import TOLERANCE
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import (
    PATIENCE_S,
    ask,
    configuration,
    exact,
    listing,
    load,
    record_of,
    serving,
    settled,
    submit,
    tokens,
    unload,
)
from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]

ONE = {name: Kind(((name, 1.0, None, None),)) for name in ("a", "b", "v0", "v1", "v2")}
PACK = Kind((("pack", 1.0, 2, 1.0),))
KEYS = {"limited": "key-of-x-only", "free": "key-of-all", "admin": "key-of-admin"}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A redis-server of the operator's."""
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    found.start()
    yield found
    found.stop()


def replica(models: Path, state: Path, redis: RedisServer, **section: Any) -> dict[str, Any]:
    """A configuration with a store of its own and a common Redis."""
    config = configuration(models, state, store=str(state / "store"), **section)
    return config | {"registry": {"url": redis.url, "namespace": "fleet"}}


@pytest.fixture(scope="module")
def one(
    models: Path, folders: dict[str, Path], redis: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:  # fmt: skip
    """Loads `x` and the pack before there is another."""
    config = replica(models, tmp_path_factory.mktemp("one"), redis)
    limited = {"key": KEYS["limited"], "adapters": ["x"], "profiles": []}
    config["auth"] = {"api_keys": [KEYS["free"], limited], "admin_key": KEYS["admin"]}
    with serving(Server(models, config)) as found:
        load(found, "x", folders["v0"])
        load(found, "pack", folders["pack"])
        yield found


@pytest.fixture(scope="module")
def two(
    models: Path, one: Server, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Starts later."""
    size = record_of(one, "x")["size_bytes"]
    state = tmp_path_factory.mktemp("two")
    config = replica(models, state, redis, max_loaded_bytes=int(2.5 * size))
    config["steering"] = {"inline": False}
    with serving(Server(models, config)) as found:
        yield found


def answers(server: Server, oracle: Oracle, name: str, content: str) -> None:
    """A name answers with a content."""
    exact(server, ONE[content].body({content: name}, as_model=True), oracle(ONE[content]))


def becomes(server: Server, oracle: Oracle, name: str, *contents: str | None) -> float:
    """Seconds until a name answers with the last content; before, with one of the others.

    None stands for a name that is not found.
    """
    for content in contents:
        if content:
            oracle(ONE[content])  # computed before the clock runs
    begun = time.monotonic()

    def look() -> bool:
        # Only the name matters here, not the content's own.
        body = ONE["a"].body({"a": name}, as_model=True)
        answer = server.post("/v1/completions", body)
        if answer.status_code == 404:
            assert None in contents, answer.text
            return contents[-1] is None
        assert answer.status_code == 200, answer.text
        found = [
            content
            for content in contents
            if content and oracle(ONE[content]).error(*tokens(answer.json())) < TOLERANCE
        ]
        assert found, answer.text
        return found[0] == contents[-1]

    until(look, PATIENCE_S)
    return time.monotonic() - begun


def test_what_one_loads_the_other_serves_also_one_that_starts_later(
    one: Server, two: Server, folders: dict[str, Path], oracle: Oracle
) -> None:
    for server in (one, two):
        answers(server, oracle, "x", "v0")
    seconds = {}
    submit(two, "y", folders["b"])
    seconds["load"] = becomes(one, oracle, "y", None, "b")
    settled(two, "y")
    answers(two, oracle, "y", "b")
    assert submit(one, "x", folders["v1"], version="2", replace=True).status_code == 202
    seconds["replace"] = becomes(two, oracle, "x", "v0", "v1")
    settled(one, "x")
    answers(one, oracle, "x", "v1")
    assert record_of(one, "x")["digest"] == record_of(two, "x")["digest"]
    versioned = two.post("/v1/completions", ONE["v1"].body({"v1": "x@2"}, as_model=True))
    assert versioned.status_code == 200
    assert one.post("/admin/adapters/x/pin", {}).status_code == 200
    until(lambda: (shown := record_of(two, "x"))["pinned"] and shown["here"]["resident"], 30)
    assert one.post("/admin/adapters/x/unpin", {}).status_code == 200
    assert two.delete("/admin/adapters/y").status_code == 202
    seconds["unload"] = becomes(one, oracle, "y", "b", None)
    for server in (one, two):
        until(lambda s=server: s.get("/admin/adapters/y").status_code == 404, 30)  # type: ignore[misc]
    print("\nconvergence, seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in seconds.items()))
    # Hints travel at once; without one the next look comes after 3 s.
    assert max(seconds.values()) < 60


def test_both_serve_on_while_redis_is_away_and_converge_when_it_is_back(
    one: Server, two: Server, redis: RedisServer, folders: dict[str, Path], oracle: Oracle
) -> None:
    content = "v1" if record_of(one, "x")["version"] == "2" else "v0"
    over = threading.Event()
    wrong: list[BaseException] = []
    count = 0

    def ask_on() -> None:
        nonlocal count
        try:
            while not over.is_set():
                for server in (one, two):
                    answers(server, oracle, "x", content)
                    count += 1
        except BaseException as error:
            wrong.append(error)

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        redis.stop()
        for server in (one, two):
            refused = submit(server, "z", folders["v2"])
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert "Redis does not answer" in refused.text
            assert server.delete("/admin/adapters/x").status_code == 503
            assert server.post("/admin/adapters/x/pin", {}).status_code == 503
            until(lambda s=server: listing(s)["registry"]["away"], 30)  # type: ignore[misc]
            assert server.get("/ready").status_code == 200
        before = count
        until(lambda: count > before + 10, PATIENCE_S)
        redis.start()
        begun = time.monotonic()
        for server in (one, two):
            until(lambda s=server: listing(s)["registry"]["away"] is None, 60)  # type: ignore[misc]
        back_s = time.monotonic() - begun
        until(lambda: submit(two, "z", folders["v2"]).status_code == 202, 30)
        load_s = becomes(one, oracle, "z", None, "v2")
    finally:
        over.set()
        asking.join()
    assert not wrong, wrong
    print(f"\nRedis seen again after {back_s:.2f} s, then a load converged in {load_s:.2f} s; "
          f"{count} answers meanwhile")  # fmt: skip
    unload(one, "z")
    until(lambda: two.get("/admin/adapters/z").status_code == 404, 30)


def test_a_key_that_is_limited_to_some_adapters_gets_no_others(
    one: Server, folders: dict[str, Path]
) -> None:
    load(one, "y", folders["b"])
    base = Kind().body({})
    key = {"authorization": f"Bearer {KEYS['limited']}"}

    def status(headers: dict[str, str], **change: Any) -> int:
        return one.post("/v1/completions", {**base, **change}, headers=headers).status_code

    change: dict[str, Any]
    for change in (
        {"model": "y"},
        {"model": "y@1"},
        {"adapters": [{"name": "y"}]},
        {"adapters": [{"name": "y@1"}]},
        {"adapters": [{"name": "x"}, {"name": "y", "weight": 0}]},
        {"model": "x", "adapters": [{"name": "y"}]},
        {"model": "pack"},
        {"model": "y", "stream": True},
    ):
        assert status(key, **change) == 404, change
        assert status(one.key("/v1/"), **change) == 200, change
    for change in ({}, {"model": "x"}, {"adapters": [{"name": "x", "weight": 0.5}]}):
        assert status(key, **change) == 200, change
    models = one.get("/v1/models", headers=key).json()["data"]
    assert {model["id"] for model in models} == {"big", "x"}
    for headers, code in ((key, 403), (one.key("/v1/"), 403), ({}, 401)):
        for method, path in (
            ("GET", "/admin/adapters"),
            ("POST", "/admin/adapters"),
            ("DELETE", "/admin/adapters/y"),
            ("POST", "/admin/adapters/y/pin"),
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
        ):
            answer = httpx.request(method, one.url + path, headers=headers, timeout=60)
            assert answer.status_code == code, (path, answer.text)
    unload(one, "y")


def test_without_inline_adapters_are_models_only(two: Server, oracle: Oracle) -> None:
    refused = two.post("/v1/completions", {**Kind().body({}), "adapters": [{"name": "pack"}]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "adapters"
    exact(two, PACK.body({}, as_model=True) | {"adapters": []}, oracle(PACK))


def test_bytes_are_a_limit_too(
    one: Server, two: Server, models: Path, folders: dict[str, Path], oracle: Oracle
) -> None:
    """Of the second server: two adapters of the usual size fit."""
    names = ("v0", "v1", "v2")
    for name in names:
        load(two, name, folders[name])
    for name in names * 2:
        answers(two, oracle, name, name)
        engine = listing(two)["engine"]
        assert engine["bytes"] <= engine["max_bytes"] and engine["taken"] <= 2
    # Larger than all of the room: the first server holds it, the second says why it does not.
    load(one, "large", make_lora(folders["a"].parent / "large", models / "base", seed=7, r=16))

    def failure() -> str | None:
        found: str | None = record_of(two, "large")["here"]["failure"]
        return found

    assert "max_loaded_bytes" in until(failure, PATIENCE_S)
    refused = two.post("/v1/completions", {**Kind().body({}), "model": "large"})
    assert refused.status_code == 404 and "max_loaded_bytes" in refused.text
    assert ask(one, {**Kind().body({}), "model": "large"})
    # All of the room pinned: what does not fit beside it is refused, not waited for.
    for name in names[:2]:
        assert two.post(f"/admin/adapters/{name}/pin", {}).status_code == 200
    for stream in (False, True):
        body = {**ONE["v2"].body({}, as_model=True), "stream": stream}
        full = two.post("/v1/completions", body)
        assert full.status_code == 503, full.text
        assert "pinned" in full.text and int(full.headers["retry-after"]) > 0
    answers(two, oracle, "v0", "v0")
    assert two.post("/admin/adapters/v0/unpin", {}).status_code == 200
    answers(two, oracle, "v2", "v2")
    for name in (*names, "large"):
        unload(two, name)
