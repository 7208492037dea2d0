"""What the tests of this folder ask with."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.models import VOCAB_SIZE
from tests.server.live import Server

PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}
PROMPT = "Water boils at"
IMAGE = [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]}]  # fmt: skip
GREEDY = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
BAD = VOCAB_SIZE - 1
"""A token that breaks the stream `plain` of the server `fresh`: its next step gives no numbers."""

LONG = "Please answer the question in one short sentence. " * 3


def complete(server: Server, steering: Any = None, **more: Any) -> dict[str, Any]:
    body = {"model": "big", **GREEDY, **more}
    if steering is not None:
        body["steering"] = steering
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def text(answer: dict[str, Any], index: int = 0) -> str:
    found: str = answer["choices"][index]["text"]
    return found


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    with httpx.stream("POST", server.url + path, json=body, timeout=120) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        found.append(json.loads(line.removeprefix("data: ")))
    return found


def own(prompt: dict[str, Any]) -> dict[str, Any]:
    return {**PROXY, "prompts": {"chat": prompt}}
