"""Whether answers tell of the other tenant's names."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx

from load_tests.tenants.findings import Finding
from load_tests.tenants.stage import (
    ADMIN_KEY,
    NAMES,
    NOBODY,
    Prompts,
    Tenant,
    adapter_of,
    key_of,
    profile_of,
)
from load_tests.tenants.statistics import compare
from load_tests.tenants.timing import LEVEL

PER_ANSWER = ("date", "x-request-id")
"""Headers that differ from answer to answer."""
_MESSAGES = [{"role": "user", "content": "What is the pet of Dorwyn Bramley?"}]
_IDS = re.compile(r"(chatcmpl|cmpl|resp|msg)[-_][0-9a-f-]+")


def attempts(name: str) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Everywhere that a name can be put: (what, path, body; None: a GET)."""
    chat: dict[str, Any] = {"messages": _MESSAGES, "max_tokens": 1}
    yield "GET /v1/models/NAME", f"/v1/models/{name}", None
    for path, more in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", {"prompt": "Roven", "max_tokens": 1}),
        ("/v1/responses", {"input": "Roven", "max_output_tokens": 16}),
        ("/tokenize", {"prompt": "Roven"}),
        ("/detokenize", {"tokens": [30, 40]}),
        ("/v1/messages", chat),
    ):
        yield f"{path}: model", path, {"model": name, **more}
    chat = {"model": "base", **chat}
    path = "/v1/chat/completions"
    yield "model with a version", path, {**chat, "model": f"{name}@1"}
    yield "steering: NAME", path, {**chat, "steering": name}
    yield "steering: {profile: NAME}", path, {**chat, "steering": {"profile": name}}
    yield "adapters: NAME", path, {**chat, "adapters": [{"name": name}]}
    yield "adapters: NAME@1", path, {**chat, "adapters": [{"name": f"{name}@1"}]}
    yield "adapters, streamed", path, {**chat, "adapters": [{"name": name}], "stream": True}
    weighted = [{"name": name, "weight": 1000}]
    yield "adapters: a weight out of range", path, {**chat, "adapters": weighted}


def call(tenant: Tenant, path: str, body: dict[str, Any] | None) -> httpx.Response:
    """One call."""
    return tenant.http.get(path) if body is None else tenant.post(path, body)


def seen(answer: httpx.Response, name: str) -> tuple[int, str, dict[str, str]]:
    """All that an answer shows, with the name that was asked for taken out."""
    headers = {k: v for k, v in answer.headers.items() if k not in PER_ANSWER}
    # Counted down from request to request: not the name's doing.
    headers = {k: v for k, v in headers.items() if not k.startswith("x-ratelimit")}
    return answer.status_code, _IDS.sub("ID", answer.text.replace(name, "NAME")), headers


def alike(me: Tenant, you: Tenant) -> Iterator[Finding]:
    """The other's names against names that nobody has."""
    for what, of in (("profile", profile_of), ("adapter", adapter_of)):
        for (where, path, body), (_, path_no, body_no) in zip(
            attempts(of(you.name)), attempts(of(NOBODY)), strict=True
        ):
            theirs = seen(call(me, path, body), of(you.name))
            nobody = seen(call(me, path_no, body_no), of(NOBODY))
            leak = ""
            if theirs != nobody:
                leak = f"{theirs[0]} {theirs[1][:90]} is not {nobody[0]} {nobody[1][:90]}"
            elif theirs[0] < 400:
                leak = f"it may be used: {theirs[0]}"
            yield Finding(f"{me.name} asks for {you.name}'s {what}, {where}",
                          f"status {theirs[0]}", leak)  # fmt: skip


def hidden(me: Tenant, you: Tenant) -> Iterator[Finding]:
    """The lists of names, and errors that propose some."""
    shown = {card["id"] for card in me.http.get("/v1/models").json()["data"]}
    mine = {"base", profile_of(me.name), adapter_of(me.name)}
    yield Finding(
        "GET /v1/models", f"{len(shown)} names", "" if shown == mine else f"{sorted(shown)}"
    )
    theirs = (profile_of(you.name), adapter_of(you.name))
    found = []
    for name in theirs:
        # One letter less: where an error proposes what may be meant, it must not propose this.
        for where, path, body in attempts(name[:-1]):
            text = call(me, path, body).text
            found += [where for known in theirs if known in text]
    count = sum(1 for _ in attempts("x")) * len(theirs)
    yield Finding(f"{me.name}: errors for names that are nearly {you.name}'s", f"{count} errors",
                  f"named by {found[0]}" if found else "")  # fmt: skip


def metrics(me: Tenant, you: Tenant) -> Iterator[Finding]:
    """What tenants, and those who run the server, read at `/metrics`."""
    status = me.http.get("/metrics").status_code
    yield Finding("/metrics with a tenant's key", f"status {status}",
                  "" if status in (401, 403) else "names of all profiles and adapters")  # fmt: skip
    body = {"model": profile_of(me.name), "prompt": "Roven", "max_tokens": 1}
    me.post("/v1/completions", body)  # a profile has series from its first request on
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    text = me.http.get("/metrics", headers=admin).text
    keys = [key_of(tenant.name) for tenant in (me, you)]
    hashes = [hashlib.sha256(key.encode()).hexdigest()[:8] for key in keys]
    private = adapter_of(NAMES[1])
    found = [what for what in (*keys, *hashes, "Dorwyn", "Roven", private) if what in text]
    shown = f"{text.count('coxswain_')} series of ours"
    # This tenant's profile is there: else nothing was read.
    blind = "" if profile_of(me.name) in text else "cannot be seen"
    yield Finding("/metrics with the admin key: keys, their hashes, words of prompts, a private "
                  "adapter's name", shown, f"{found[0]} is there" if found else blind)  # fmt: skip


def errors_in_time(me: Tenant, you: Tenant, rounds: int, seed: int) -> Finding:
    """How long it takes to be refused the other's adapter, and one that nobody has."""
    dice = random.Random(seed)
    names = {"other": adapter_of(you.name), "nobody": adapter_of(NOBODY)}
    times: dict[str, list[float]] = {kind: [] for kind in names}
    for _ in range(rounds):
        for kind in dice.sample(list(names), 2):
            body = {"model": names[kind], "prompt": "Roven", "max_tokens": 1}
            begin = time.perf_counter()
            me.post("/v1/completions", body)
            times[kind].append((time.perf_counter() - begin) * 1000)
    found = compare(times["other"], times["nobody"])
    shown = (f"medians {found.medians[0]:.2f} and {found.medians[1]:.2f} ms; faster with "
             f"probability {found.faster:.2f}; p = {found.p:.3f}; n = {rounds}")  # fmt: skip
    leak = "it is there" if found.p < LEVEL else ""
    return Finding("time of the error for the other's adapter against one of nobody", shown, leak)


def stored(me: Tenant, you: Tenant) -> Finding:
    """A response of the other's, by its id."""
    body = {"model": "base", "input": "Roven", "max_output_tokens": 16, "store": True}
    answer = you.post("/v1/responses", body)
    theirs = str(answer.json().get("id", "resp_" + "0" * 32))
    nobody = theirs[:5] + "".join(reversed(theirs[5:]))
    shown = [seen(me.http.get(f"/v1/responses/{one}"), one) for one in (theirs, nobody)]
    leak = "" if shown[0] == shown[1] and shown[0][0] >= 400 else f"{shown[0][0]}, {shown[1][0]}"
    return Finding("GET /v1/responses/ID of the other's", f"status {shown[0][0]}", leak)


def rates(me: Tenant, you: Tenant) -> Finding:
    """What is left of my rate, before and after the other used theirs; nobody else may ask."""

    def left() -> int:
        answer = me.post("/v1/completions", {"model": "base", "prompt": "Roven", "max_tokens": 1})
        return int(answer.headers["x-ratelimit-remaining-requests"])

    what = "x-ratelimit-remaining-requests, before and after the other's requests"
    try:
        before = left()
        for _ in range(5):
            you.ask("base", Prompts(7).new(8))
        used = before - left()
    except KeyError as missing:
        return Finding(what, "", f"cannot be seen: no header {missing}")
    return Finding(what, f"{used} used", "" if used == 1 else "the other's requests count")
