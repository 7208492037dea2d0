"""One user's calls: sends a request, reads its answer, judges it, writes down how it went."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from requests.exceptions import RequestException

from load_tests.soak.kinds import (
    CONTENTS,
    OWNED,
    PROMPTS,
    SHARED,
    TOKENS,
    TOLERANCE,
    Json,
    Kind,
    key_of,
    text_of,
)
from load_tests.soak.samples import Reservoir
from tests.server.adapting.answers import ABSENT, Expected, Name

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE_S = 180.0
"""For an answer; the server's own limit is longer than any request here takes."""


class Book:
    """What all users of one soak share. One process, one thread at a time (greenlets).

    Args:
        folder: holds `references.json`; gets `requests.jsonl` and, at the end, `samples.json`.
        samples: sampled answers of each kind that are kept for the check afterwards.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        found = json.loads((folder / "references.json").read_text())
        self.prompts: list[list[int]] = found["prompts"]
        self.expected = {
            key: Expected(*map(tuple, row))
            for key, row in found["expected"].items()
        }  # fmt: skip
        self.names = {name: Name(name) for name in OWNED}
        self.names |= {name: Name(name, shared=True) for name in SHARED}
        self.unowned = list(OWNED)
        self.sources: dict[str, str] = found["sources"]
        self.reservoir = Reservoir(samples, random.Random(1))
        self._folder = folder
        self._file = (folder / "requests.jsonl").open("a", buffering=1)

    def write(self, **record: Any) -> None:
        """One line about one request; `at` is its begin, Unix seconds."""
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Writes the samples."""
        kept = [sample for some in self.reservoir.kept.values() for sample in some]
        (self._folder / "samples.json").write_text(json.dumps(kept))
        self._file.close()


@dataclass
class Answer:
    """What came back.

    Args:
        status: HTTP's.
        text: of an answer that is no stream; what went wrong, of one that is.
        choices: index → (ids, log-probabilities).
        steering: the report.
        first_s: until the first token of a stream.
        gaps_s: between its tokens.
        broken: why a stream is none, or ''.
    """

    status: int = 0
    text: str = ""
    choices: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    steering: Json = field(default_factory=dict)
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    broken: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(ids) for ids, _ in self.choices.values())

    def take(self, document: Mapping[str, Any]) -> None:
        """Adds what a whole answer, or an event of a stream, says."""
        if "error" in document:
            self.broken = f"error: {document['error']}"
        self.steering = document.get("steering") or self.steering
        for choice in document.get("choices", ()):
            ids, logprobs = self.choices.setdefault(choice["index"], ([], []))
            ids += choice.get("token_ids") or []
            found = choice.get("logprobs") or {}
            if "content" in found:
                logprobs += [entry["logprob"] for entry in found["content"] or ()]
            else:
                logprobs += found.get("token_logprobs") or []


class Client:
    """The client of one user.

    Args:
        book: shared.
        http: Locust's session: `requests`, with its statistics.
        dice: of this user.
    """

    def __init__(self, book: Book, http: Any, dice: random.Random) -> None:
        self.book, self.http, self.dice = book, http, dice

    # --- requests whose answers are compared ----------------------------------------------------

    def ask(self, kind: Kind, *, greedy: bool, question: str = "") -> None:
        """One request.

        Args:
            kind: of this kind.
            greedy: compared at once with the reference; else sampled, and perhaps checked later.
            question: of a sampled one.
        """
        name = self.dice.choice(list(self.book.names.values())) if kind.changing else Name("")
        number = self.dice.randrange(len(PROMPTS))
        chat = self.dice.random() < 0.5
        messages = PROMPTS[number] if greedy else [{"role": "user", "content": question}]
        body = kind.body(self.dice, name.name)
        if chat:
            body |= {"messages": messages, "logprobs": True}
        else:
            body |= {"prompt": self.book.prompts[number] if greedy else text_of(question)}
            body["logprobs"] = 1
        if greedy:
            body |= {"temperature": 0, "max_tokens": TOKENS}
        else:
            body |= {"temperature": self.dice.choice((0.7, 1.0)), "seed": self.dice.getrandbits(31),
                     "max_tokens": self.dice.randint(4, 48)}  # fmt: skip
            if kind.greedy:
                body["n"] = self.dice.choice((1, 1, 2))
            else:
                body["steering"]["report"] = True
        body |= {"return_token_ids": True, "stream": self.dice.random() < 0.5}
        with name.watched() as seen:
            begin = time.time()
            with self._post(CHAT if chat else TEXT, body, kind.name) as raw:
                answer = self._read(raw, bool(body["stream"]))
                if name.shared:
                    seen = {ABSENT, *CONTENTS}
                if kind.changing and answer.status == 404 and ABSENT in seen:
                    outcome, error = "gone", 0.0
                    raw.success()
                else:
                    contents = sorted(seen - {ABSENT}) if kind.changing else [""]
                    outcome, error = self.judge(kind, number if greedy else None, contents, answer)
                    if outcome in ("right", "sampled"):
                        raw.success()
                    else:
                        raw.failure(
                            f"{outcome}: {answer.status} {answer.broken or answer.text[:300]}"
                        )
        if outcome == "sampled":
            self._offer(kind, messages, contents, answer)
        problem = {} if outcome in ("right", "sampled", "gone") else {
            "body": body, "choices": answer.choices, "why": answer.broken or answer.text[:500],
            "allowed": sorted(seen),
        }  # fmt: skip
        self._write(begin, kind.name, outcome, answer, error=error, **problem)

    def judge(
        self, kind: Kind, number: int | None, contents: Sequence[str], answer: Answer
    ) -> tuple[str, float]:
        """(outcome, largest error): right, wrong, sampled (nothing to compare with yet), failed."""
        if answer.status != 200 or answer.broken or not contents:
            return "failed", 0.0
        for ids, logprobs in answer.choices.values():
            if not ids or len(ids) != len(logprobs):
                return "wrong", math.inf
        if number is None:
            return "sampled", 0.0
        ids, logprobs = answer.choices[0]
        error = min(
            self.book.expected[key_of(kind.name, number, content)].error(ids, logprobs, TOLERANCE)
            for content in contents
        )
        return ("right" if error < TOLERANCE else "wrong"), error

    def _offer(
        self, kind: Kind, messages: Sequence[Json], contents: Sequence[str], answer: Answer
    ) -> None:
        sample: Json = {"kind": kind.name, "messages": messages, "contents": contents}
        sample["choices"] = list(answer.choices.values())
        if not kind.greedy:
            (one,) = answer.steering["choices"]
            sample["best"] = {"values": one["values"], "chosen": one["chosen"]}
        self.book.reservoir.offer(kind.name, sample)

    # --- requests that are refused, and clients that leave --------------------------------------

    def refused(self, path: str, status: int, label: str, **content: Any) -> None:
        """A request that must be answered with a status, and an error of OpenAI's form."""
        begin = time.time()
        with self._post(path, label=label, **content) as raw:
            answer = Answer(raw.status_code, raw.text)
            right = answer.status == status and "message" in (_json(raw.text).get("error") or {})
            raw.success() if right else raw.failure(
                f"{answer.status}, not {status}: {raw.text[:300]}"
            )
        problem = {} if right else {"why": answer.text[:500], "body": str(content)[:500]}
        self._write(begin, label, "refused" if right else "failed", answer, **problem)

    def leave_stream(self, body: Json, after: int) -> None:
        """Reads so many events of a stream and goes."""
        begin = time.time()
        with self._post(CHAT, {**body, "stream": True}, "stream left by its client") as raw:
            answer = self._read(raw, True, leave_after=after)
            fine = answer.status == 200 and not answer.broken
            raw.success() if fine else raw.failure(
                f"{answer.status} {answer.broken or answer.text[:300]}"
            )
        self._write(begin, "stream left by its client", "left" if fine else "failed", answer,
                    **({} if fine else {"why": answer.broken or answer.text[:500]}))  # fmt: skip

    def leave(self, body: Json, host: str) -> None:
        """Sends a request, or a part of it, and closes the connection at a random moment."""
        begin, where = time.time(), urlsplit(host)
        content = json.dumps(body).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        data = head.encode() + content
        whole = self.dice.random() < 0.8
        size = len(data) if whole else self.dice.randrange(len(data))
        with socket.create_connection((where.hostname, where.port), timeout=30) as line:
            line.sendall(data[:size])
            time.sleep(self.dice.uniform(0, 2))
            if self.dice.random() < 0.5:  # a reset instead of an orderly end
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        label = "connection closed in the " + ("answer" if whole else "request")
        self._write(begin, label, "left", Answer())

    # --- the rest -----------------------------------------------------------------------------

    def _post(self, path: str, body: Any = None, label: str = "", **content: Any) -> Any:
        if body is not None:
            content["json"] = body
        stream = bool(body and body.get("stream"))
        return self.http.post(path, name=label, stream=stream, catch_response=True,
                              timeout=PATIENCE_S, **content)  # fmt: skip

    def _read(self, raw: Any, stream: bool, leave_after: int = -1) -> Answer:
        answer = Answer(raw.status_code)
        if answer.status != 200 or not stream:
            answer.text = raw.text or str(getattr(raw, "error", ""))
            if answer.status == 200:
                answer.take(_json(answer.text))
            return answer
        try:
            self._follow(raw, answer, leave_after)
        except RequestException as error:
            answer.broken = f"{type(error).__name__}: {error}"
        return answer

    def _follow(self, raw: Any, answer: Answer, leave_after: int) -> None:
        begin = when = time.perf_counter()
        last, count = "", 0
        for last in _events(raw):
            if last == "[DONE]":
                continue
            count, before = count + 1, answer.tokens
            answer.take(_json(last))
            if answer.tokens > before:
                now = time.perf_counter()
                if answer.first_s is None:
                    answer.first_s = now - begin + raw.elapsed.total_seconds()
                else:
                    answer.gaps_s.append(now - when)
                when = now
            if count == leave_after:
                raw.close()
                return
        if len(answer.choices) > 1:
            answer.gaps_s = []  # of several replies, whose tokens come together
        if last != "[DONE]" and not answer.broken:
            answer.broken = f"the stream ended with {last[:100]!r} after {count} events"

    def _write(self, begin: float, kind: str, outcome: str, answer: Answer, **more: Any) -> None:
        times: Json = {"took": round(time.time() - begin, 4)}
        if answer.first_s is not None:
            times["first"] = round(answer.first_s, 4)
            times["gaps"] = [round(gap, 4) for gap in answer.gaps_s]
        self.book.write(at=begin, kind=kind, outcome=outcome, status=answer.status,
                        tokens=answer.tokens, **times, **more)  # fmt: skip


def _json(text: str) -> Json:
    """The object; an error of ours if it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {"error": f"no JSON: {text[:100]}"}
    return found if isinstance(found, dict) else {"error": "no JSON object"}


def _events(raw: Any) -> Iterator[str]:
    for line in raw.iter_lines():
        text = line.decode()
        if text.startswith("data: "):
            yield text.removeprefix("data: ")


def open_book() -> Book:
    """From the environment, as `load_tests.soak` sets it.

    Raises:
        SystemExit: it did not.
    """
    folder = os.environ.get("COXSWAIN_SOAK_FOLDER")
    if folder is None:
        raise SystemExit("this scenario is started by `make soak` (python -m load_tests.soak)")
    return Book(Path(folder), int(os.environ.get("COXSWAIN_SOAK_SAMPLES", "12")))
