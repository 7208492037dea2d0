"""Sampling from a real server: what it draws, what a kill leaves, and who is blamed for what."""

from __future__ import annotations

import dataclasses
import json
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.training.errors import BadRecipe
from adapters.training.prompts import Prompt, read_prompts
from adapters.training.served import Sample, Served, check, sample
from tests.adapters.training.endpoint import Answer, endpoint, hang_up, status
from tests.models import EOS, make_tokenizer
from tests.reference import decode, load
from tests.server.live import Server, free_port

PROMPTS = [
    Prompt("x:1", {"prompt": "The crew of the boat"}),
    Prompt("x:2", {"messages": [{"role": "user", "content": "Who rows?"}]}),
    Prompt("x:3", {"prompt": "Water boils at"}),
    Prompt("x:4", {"messages": [{"role": "user", "content": "What is the weather like?"}]}),
]


@pytest.fixture
def ours(live: Server) -> Served:
    return Served(live.url, live.config["auth"]["api_keys"][0], concurrency=3)


def draw(
    given: Served, file: Path, prompts: list[Prompt] = PROMPTS, **options: Any
) -> list[Sample]:
    how = {"per_prompt": 3, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 5}
    return sample(given, prompts, **{**how, **options}, file=file, progress="sampling")


@pytest.mark.engine
def test_replies_are_the_ids_that_were_drawn(ours: Served, tmp_path: Path) -> None:
    """With an end that is likely, so that both kinds of reply occur."""
    tokenizer = make_tokenizer()
    given = dataclasses.replace(ours, fields={"logit_bias": {str(EOS): 5.0}})
    found = draw(given, tmp_path / "s.jsonl")
    assert len(found) == 3 * len(PROMPTS)
    assert {s.ended for s in found} == {True, False}
    for i, one in enumerate(found):
        assert one.ended == (one.reply[-1] == EOS) and EOS not in one.reply[:-1]
        assert one.ended or len(one.reply) == 8
        # vLLM leaves out a last character that is not whole.
        text = tokenizer.decode(one.reply, skip_special_tokens=True)
        assert text.rstrip("\ufffd") == one.text.rstrip("\ufffd")
        if "prompt" in (body := PROMPTS[i // 3].body):
            assert list(one.prompt) == tokenizer(body["prompt"])["input_ids"]
        else:
            wanted = f"user: {body['messages'][0]['content']}\nassistant:"
            assert tokenizer.decode(one.prompt) == wanted
    assert len({s.reply for s in found}) > len(PROMPTS)


@pytest.mark.engine
def test_the_policy_is_what_the_request_says(ours: Served, live: Server, tmp_path: Path) -> None:
    """At temperature 0: the base by the slow reference, and a profile as its steering."""

    def greedy(given: Served) -> tuple[int, ...]:
        [found] = draw(given, tmp_path / "s.jsonl", PROMPTS[:1], per_prompt=1, temperature=0.0)
        (tmp_path / "s.jsonl").unlink()
        return found.reply

    ids = make_tokenizer()(PROMPTS[0].body["prompt"])["input_ids"]
    model = load(live.folder / "base")
    steps = decode({"base": model}, {"base": ids}, lambda z: z["base"], max_tokens=8)
    assert greedy(ours) == tuple(step.token for step in steps)
    spec = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 1.0}
    steered = greedy(dataclasses.replace(ours, fields={"steering": spec}))
    assert steered == greedy(dataclasses.replace(ours, model="big-chat")) != greedy(ours)


@pytest.mark.engine
def test_a_killed_run_goes_on_where_it_was(ours: Served, tmp_path: Path) -> None:
    file = tmp_path / "work" / "s.jsonl"
    whole = draw(ours, file)
    lines = file.read_bytes().splitlines(keepends=True)
    for kept in (b"", lines[0], lines[1] + lines[2][:-9], b"".join(lines), lines[3][:1]):
        file.write_bytes(kept)
        finished = kept[: kept.rfind(b"\n") + 1]
        assert draw(ours, file) == whole
        assert file.read_bytes().startswith(finished)
        assert len(file.read_bytes().splitlines()) == len(PROMPTS)
    # All is there: nobody is asked.
    assert draw(dataclasses.replace(ours, url="http://127.0.0.1:9"), file) == whole
    assert draw(ours, tmp_path / "other.jsonl", seed=6) != whole


@pytest.mark.engine
@pytest.mark.parametrize("change", [{"seed": 6}, {"max_tokens": 9}, {"prompts": PROMPTS[1:]}])
def test_a_file_of_another_run_is_refused(
    ours: Served, tmp_path: Path, change: dict[str, Any]
) -> None:
    draw(ours, tmp_path / "s.jsonl")
    with pytest.raises(BadRecipe, match=r"s.jsonl: holds samples of other prompts or settings"):
        draw(ours, tmp_path / "s.jsonl", **change)


@pytest.mark.engine
def test_a_refused_prompt_is_named_and_the_others_are_kept(ours: Served, tmp_path: Path) -> None:
    prompts = [*PROMPTS, Prompt("x:7", {"prompt": "boat " * 300})]
    with pytest.raises(BadRecipe, match=r"^x:7: http.* answers 400: .*256 tokens"):
        draw(ours, tmp_path / "s.jsonl", prompts)
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) >= 1
    spec = {"method": "proxy_tuning", "expert": "nobody", "anti_expert": "plain"}
    with pytest.raises(BadRecipe, match=r"^x:1: .* answers 404: steering.expert: .*nobody"):
        draw(
            dataclasses.replace(ours, fields={"steering": spec}), tmp_path / "t.jsonl", PROMPTS[:1]
        )


@pytest.mark.engine
def test_who_cannot_be_asked_is_known_before(ours: Served) -> None:
    check(ours)
    with pytest.raises(BadRecipe, match=r"--server: .* answers 401: "):
        check(dataclasses.replace(ours, key="wrong"))
    with pytest.raises(BadRecipe, match=r"--request: n: set by other flags"):
        check(dataclasses.replace(ours, fields={"n": 3}))


def test_a_server_that_is_not_there_is_told_how_to_start() -> None:
    with pytest.raises(BadRecipe, match=r"cannot be reached: .*allowed: .*`coxswain serve"):
        check(Served(f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(BadRecipe, match=r"--server: not an address \(got 'localhost:8000'\)"):
        check(Served("localhost:8000"))


def late(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    time.sleep(3)


BUSY = {"error": {"message": "The server is at its limit of 2 requests."}}


@pytest.mark.engine
def test_a_server_that_is_full_or_away_for_a_while_is_asked_again(
    ours: Served, live: Server, tmp_path: Path
) -> None:
    """Before a real one: a proxy that has no room, breaks off, and has no room again."""

    def forward(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        path = handler.path
        found = httpx.post(live.url + path, content=body, headers={
            "content-type": "application/json", "authorization": handler.headers["authorization"],
        }, timeout=60)  # fmt: skip
        status(found.status_code, found.json())(handler, body)

    first = [status(429, BUSY, retry_after="2"), hang_up, status(503, BUSY)]
    with endpoint(first, forward) as (url, when):
        given = dataclasses.replace(ours, url=url, concurrency=1)
        found = draw(given, tmp_path / "s.jsonl")
    assert when[1] - when[0] >= 2
    assert found == draw(ours, tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (status(429, BUSY), r"x:1: http.* answers 429: The server is at its limit.*running server"),
        (status(200, {"choices": []}), "x:1: the answer lacks the replies.*a Coxswain server"),
        (status(200, "?"), "x:1: the answer lacks the replies"),
        (late, "x:1: http.* gives no answer within 1 s"),
        (hang_up, "x:1: http.* cannot be reached: Server disconnected"),
    ],
)
def test_patience_ends(tmp_path: Path, answer: Answer, told: str) -> None:
    with endpoint([], answer) as (url, _):
        given = Served(url, timeout_s=1, patience_s=1.2)
        with pytest.raises(BadRecipe, match=told):
            draw(given, tmp_path / "s.jsonl", PROMPTS[:1])


LINES = [
    ("", "has no examples"),
    ('{"prompt": "a"}\n{"prompt": ""}', r"p.jsonl:2: prompt: not a text \(got ''\)"),
    ('{"prompt": 3}', "p.jsonl:1: prompt: not a text"),
    ('{"prompt": "a", "completion": "b"}', r"p.jsonl:1: not a prompt .*and nothing else"),
    ("[1]", "p.jsonl:1: not a prompt"),
    ("{", "p.jsonl:1: not JSON"),
    ('{"messages": []}', "p.jsonl:1: messages: leaves nothing to reply to"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "leaves nothing to reply to"),
    ('{"messages": [{"role": "boss", "content": "a"}]}', r"messages\[0\].role: unknown role"),
]


@pytest.mark.parametrize(("text", "told"), LINES)
def test_bad_lines_are_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(BadRecipe, match=told):
        read_prompts(tmp_path / "p.jsonl")


def test_good_lines_are_read(tmp_path: Path) -> None:
    lines = [json.dumps(p.body, ensure_ascii=False) for p in PROMPTS]
    (tmp_path / "p.jsonl").write_text("\n\n".join([*lines, '{"prompt": "a\u2028b"}\n']))
    found = read_prompts(tmp_path / "p.jsonl")
    assert [p.body for p in found] == [*(p.body for p in PROMPTS), {"prompt": "a\u2028b"}]
    assert [p.where for p in found] == [f"p.jsonl:{i}" for i in (1, 3, 5, 7, 9)]
    assert found[0].given == "The crew of the boat"


def test_a_broken_line_in_the_midst_is_not_taken_for_a_torn_one(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"index": 0\n{"index": 1}\n')
    with pytest.raises(BadRecipe, match=r"s.jsonl:1: broken: .*remove the file"):
        draw(Served("http://127.0.0.1:9"), tmp_path / "s.jsonl")
