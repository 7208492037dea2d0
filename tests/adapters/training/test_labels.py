"""The labelling rule: functions in a real process and behind a real address."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapters.training.critic.labels import Labeller
from adapters.training.critic.replies import Reply
from adapters.training.errors import BadRecipe

CHAT = [{"role": "user", "content": "Who?"}]

FILE = """
import os, time
from pathlib import Path

CALLS = Path(__file__).with_suffix(".calls")

def spans(prompt, reply):
    with CALLS.open("a") as file:
        file.write(f"{prompt!r} {reply}\\n")
    return [[i, i + 1] for i, c in enumerate(reply) if c.isdigit()]

def stumbles(prompt, reply):
    if reply == "at 7" and not Path(__file__).with_suffix(".mended").exists():
        raise ValueError("no such number")
    return spans(prompt, reply)

def hangs(prompt, reply):
    time.sleep(1000)

def outside(prompt, reply):
    return [[0, 50]]
"""


def replies() -> list[Reply]:
    """Five, the third to messages."""
    texts = ["in 12", "none", "at 7", "3 of 4", ""]
    given: list[Any] = ["What?", "What?", CHAT, "", "What?"]
    return [
        Reply(f"p:{i}, sample 1", prompt, (1,), (), text, True)
        for i, (prompt, text) in enumerate(zip(given, texts, strict=True), 1)
    ]


WANTED = [[(3, 4), (4, 5)], [], [(3, 4)], [(0, 1), (5, 6)], []]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def test_a_function_gets_prompt_and_reply(file: Path, tmp_path: Path) -> None:
    labeller = Labeller(f"{file}:spans", 20)
    assert labeller.label(replies(), tmp_path / "labels.jsonl") == WANTED
    assert file.with_suffix(".calls").read_text().splitlines() == [
        f"{reply.given!r} {reply.text}" for reply in replies()
    ]


def test_after_a_fault_the_run_goes_on_where_it_was(file: Path, tmp_path: Path) -> None:
    labeller = Labeller(f"{file}:stumbles", 20)
    with pytest.raises(BadRecipe, match=r"p:3, sample 1: .*ValueError: no such number.*mine.py:"):
        labeller.label(replies(), tmp_path / "labels.jsonl")
    file.with_suffix(".mended").touch()
    assert labeller.label(replies(), tmp_path / "labels.jsonl") == WANTED
    shown = [line.split("' ")[-1] for line in file.with_suffix(".calls").read_text().splitlines()]
    assert len(shown) == len(set(shown)) == 5


def test_another_version_of_the_file_starts_again(file: Path, tmp_path: Path) -> None:
    first = Labeller(f"{file}:spans", 20)
    first.label(replies(), tmp_path / "labels.jsonl")
    file.write_text(FILE.replace("c.isdigit()", "c == '7'"))
    second = Labeller(f"{file}:spans", 20)
    assert second.identity != first.identity
    assert second.label(replies(), tmp_path / "labels.jsonl") == [[], [], [(3, 4)], [], []]
    assert first.label(replies(), tmp_path / "labels.jsonl") == WANTED


def test_a_function_that_hangs_or_leaves_the_reply_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"p:1, sample 1: .*no answer within 0.5 s.*--label-timeo"):
        Labeller(f"{file}:hangs", 0.5).label(replies(), tmp_path / "labels.jsonl")
    with pytest.raises(BadRecipe, match=r"p:1, sample 1: .*outside\[0\]: not in the reply.*≤ 5"):
        Labeller(f"{file}:outside", 20).label(replies(), tmp_path / "labels.jsonl")


def test_a_rule_that_cannot_be_loaded_is_refused_at_once(file: Path) -> None:
    with pytest.raises(BadRecipe, match=r"--label: .*mine.py has no function none"):
        Labeller(f"{file}:none", 20)
    file.write_text("import nowhere\n")
    with pytest.raises(BadRecipe, match=r"--label: .*ModuleNotFoundError: No module named 'nowhe"):
        Labeller(f"{file}:spans", 20)


class Handler(BaseHTTPRequestHandler):
    """Marks digits; has no room at first, and refuses a word."""

    busy = 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body.keys() == {"prompt", "reply"} and self.path == "/spans?of=digits"
        found: Any = [[i, i + 1] for i, c in enumerate(body["reply"]) if c.isdigit()]
        status = 400 if body["reply"] == "refuse" else 200
        if Handler.busy:
            Handler.busy -= 1
            status = 503
        text = json.dumps(found if status == 200 else {"error": {"message": "not this"}}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/spans?of=digits"
    server.shutdown()
    server.server_close()


def test_an_address_is_asked_until_it_has_room(url: str, tmp_path: Path) -> None:
    assert Labeller(url, 20).label(replies(), tmp_path / "labels.jsonl") == WANTED
    assert Handler.busy == 0


def test_an_address_that_refuses_is_named(url: str, tmp_path: Path) -> None:
    refused = Reply("p:9, sample 2", "What?", (1,), (), "refuse", True)
    with pytest.raises(BadRecipe, match=r"p:9, sample 2: http.* answers 400: not this"):
        Labeller(url, 20).label([refused], tmp_path / "labels.jsonl")
