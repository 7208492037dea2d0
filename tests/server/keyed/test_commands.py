"""`coxswain adapters|profiles|status` in a shell of their own, against a real server."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from server.main import run
from tests.server.keyed.conftest import ADMIN, FULL
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

MIX = {"method": "mix", "weights": {"base": 1, "chat": 0.5}, "description": "A little chat."}


class Shell:
    """Runs commands as a shell with the admin key would."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def out(self, *argv: str, status: int = 0) -> str:
        """What the command printed; on standard error, if it failed."""
        assert run([*argv]) == status
        out, err = self._capsys.readouterr()
        return err if status else out

    def json(self, *argv: str) -> Any:
        """What the command printed for programs."""
        return json.loads(self.out(*argv, "--json"))


@pytest.fixture
def shell(
    keyed: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    monkeypatch.setenv("COXSWAIN_URL", keyed.url)
    monkeypatch.setenv("COXSWAIN_ADMIN_KEY", ADMIN)
    return Shell(capsys)


def test_status_tells_what_the_admin_api_tells(shell: Shell, keyed: Server) -> None:
    told = shell.out("status")
    for words in ("status         ready", "base           big", "chat", "tokens run"):
        assert words in told
    found = shell.json("status")
    assert found["status"] == "ready" and found["adapters"] == ["a", "pack", "secret"]
    want = [one["name"] for one in keyed.get("/admin/streams").json()["streams"]]
    assert [one["name"] for one in found["streams"]] == want == ["base", "chat", "plain", "twin"]


def test_profiles_are_put_shown_listed_and_deleted(shell: Shell, keyed: Server) -> None:
    assert shell.out("profiles", "put", "mild", json.dumps(MIX)) == "mild: mix\n"
    assert "weights         base: 1, chat: 0.5" in shell.out("profiles", "show", "mild")
    record = shell.json("profiles", "show", "mild")
    # The end that `chat` has and the base has not.
    assert record == {"name": "mild", "origin": "admin", **MIX, "stop_token_ids": [6]}
    rows = shell.out("profiles", "list").splitlines()
    assert rows[0].split() == ["profile", "origin", "method", "options"]
    assert [row.split()[:3] for row in rows[2:]] == [
        ["big-chat", "config", "proxy_tuning"], ["own", "config", "proxy_tuning"],
        ["mild", "admin", "mix"],
    ]  # fmt: skip
    assert [one["name"] for one in shell.json("profiles", "list")["profiles"]][-1] == "mild"
    answer = keyed.post("/v1/completions", {"model": "mild", "prompt": "x", "max_tokens": 2})
    assert answer.status_code == 200
    assert "mild is gone" in shell.out("profiles", "delete", "mild")
    assert "404: " in shell.out("profiles", "show", "mild", status=1)


def test_a_profile_comes_from_a_file_or_a_pipe(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(MIX))
    assert shell.json("profiles", "put", "filed", f"@{file}")["method"] == "mix"
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(MIX)))
    assert shell.json("profiles", "put", "piped", "@-")["name"] == "piped"
    for name in ("filed", "piped"):
        assert shell.json("profiles", "delete", name) == {"name": name, "deleted": True}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("put", "p", "{"), "not JSON"),
        (("put", "p", "@/no/such/file"), "/no/such/file: No such file"),
        (("put", "p", '{"method": "mix", "weights": {"nobody": 1}}'), "weights.nobody"),
        (("put", "own", json.dumps(MIX)), "409: "),
        (("delete", "own"), "409: "),
        (("delete", "nobody"), "404: "),
    ],
)
def test_what_cannot_be_is_one_line(shell: Shell, argv: tuple[str, ...], words: str) -> None:
    told = shell.out("profiles", *argv, status=1)
    assert told.startswith("coxswain: ") and told.count("\n") == 1 and words in told


def test_adapters_are_loaded_listed_pinned_and_unloaded(
    shell: Shell, folders: dict[str, Path]
) -> None:
    record = shell.json("adapters", "load", "b", str(folders["b"]), "--version", "7")
    assert record["state"] == "ready" and record["version"] == "7"
    rows = {row.split()[0]: row for row in shell.out("adapters", "list").splitlines()[2:6]}
    assert (
        rows.keys() == {"a", "b", "pack", "secret"}
        and "lora" in rows["b"]
        and "meteora" in rows["pack"]
    )
    assert shell.out("adapters", "pin", "b") == "b is pinned\n"
    assert shell.json("adapters", "show", "b")["pinned"] is True
    assert shell.json("adapters", "unpin", "b")["pinned"] is False
    assert "b is unloading" in shell.out("adapters", "unload", "b")
    told = shell.out("adapters", "load", "z", "/etc", status=1)
    assert told.startswith("coxswain: ") and told.count("\n") == 1


@pytest.mark.parametrize(("key", "words"), [(FULL, "403: "), ("nonsense", "401: "), (None, "401")])
def test_other_keys_open_nothing(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, key: str | None, words: str
) -> None:
    if key is None:
        monkeypatch.delenv("COXSWAIN_ADMIN_KEY")
    else:
        monkeypatch.setenv("COXSWAIN_ADMIN_KEY", key)
    for argv in (("status",), ("profiles", "list"), ("adapters", "list"), ("drain", "--no-wait")):
        assert words in shell.out(*argv, status=1)
