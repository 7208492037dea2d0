"""Makes calls of a server's /openapi.json, sends them, holds the answers against it, and counts."""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.paths import is_admin
from tests.server.fuzz.sound import bodies, names
from tests.strange import spoiled, values

EXCLUDED = {
    "POST /admin/drain": "ends the server; the last test of this folder calls it",
}
"""Operations that are not called at random, and why."""

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
"""Two checks of schemathesis are left out. `negative_data_rejection`: vLLM's models read "1" as 1.
`positive_data_acceptance`: which tokens, streams and adapters there are, the schema cannot say."""

SHARES = {"POST /v1/completions": 6, "POST /v1/chat/completions": 6, "POST /v1/responses": 4,
          "POST /v1/messages": 4, "POST /v1/messages/count_tokens": 2, "POST /invocations": 2,
          "POST /tokenize": 2, "POST /detokenize": 2, "PUT /admin/profiles/{name}": 6,
          "POST /admin/adapters": 4, "POST /v1/load_lora_adapter": 3,
          "POST /v1/unload_lora_adapter": 2, "GET /v1/models/{name}": 2,
          "GET /admin/profiles/{name}": 3, "DELETE /admin/profiles/{name}": 3,
          "DELETE /admin/adapters/{name}": 3, "GET /admin/adapters/{name}": 3}  # fmt: skip
"""How often an operation is called, against 1 for each of the others."""

CLIENTS = 8
MORE_ROUNDS = 10
WAIT_S = 90.0
FIRST = 3
"""How many examples of each finding are kept."""


@dataclass
class Tally:
    """What came of the calls.

    Args:
        statuses: by operation.
        findings: what was wrong, by operation and kind, with the first few examples.
        found: how often.
    """

    statuses: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    findings: defaultdict[tuple[str, str], list[str]] = field(
        default_factory=lambda: defaultdict(list)
    )
    found: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        """How many there were."""
        return sum(sum(counts.values()) for counts in self.statuses.values())

    def good(self, label: str) -> bool:
        """Whether a call of the operation succeeded."""
        return any(status < 300 for status in self.statuses[label])

    def wrong(self, label: str, kind: str, what: str) -> None:
        """Notes a finding."""
        self.found[label, kind] += 1
        if len(self.findings[label, kind]) < FIRST:
            self.findings[label, kind].append(what)

    def __str__(self) -> str:
        seen = sorted({status for counts in self.statuses.values() for status in counts})
        rows = [["operation", "calls", *map(str, seen)]]
        total: Counter[int] = sum(self.statuses.values(), Counter())
        for label, counts in [*sorted(self.statuses.items()), ("all", total)]:
            shown = [str(counts[status] or "") for status in seen]
            rows.append([label, str(sum(counts.values())), *shown])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
            for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)


@dataclass
class Fuzzer:
    """Calls of one of the two APIs.

    Args:
        url: of the server.
        admin: which API.
        key: that its operations need.
        root: the folder that adapters may come from.
        seed: of the choices.
    """

    url: str
    admin: bool
    key: str
    root: str
    seed: int
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        document = requests.get(f"{self.url}/openapi.json", timeout=60).json()
        # Streams are read to their end.
        config = schemathesis.Config.from_dict(
            {"max-stream-events": 1000, "output": {"sanitization": {"enabled": False}}}
        )
        self.schema = schemathesis.openapi.from_dict(document, config=config)
        read = list(self.schema.get_all_operations())
        every = [found.ok() for found in read if isinstance(found, Ok)]
        assert len(every) == len(read), read
        assert EXCLUDED.keys() <= {operation.label for operation in every}
        self.operations = [
            operation
            for operation in every
            if is_admin(operation.path) == self.admin and operation.label not in EXCLUDED
        ]
        self._sound = bodies(self.root)
        self._sessions = threading.local()
        # Imports its module: in several threads at once Python 3.11 may fail to parse it.
        _ = self.schema.transport

    def run(self, calls: int) -> None:
        """Makes at least so many calls, a tenth of them at the edges of the schema.

        Operations that never succeeded by then, as chance has it, are called some more.

        Raises:
            requests.RequestException: the server broke a connection, or did not answer in time.
        """
        with ThreadPoolExecutor(CLIENTS) as pool:
            pending: list[Future[None]] = []
            sent = 0

            def send(case: Case[Any], headers: Mapping[str, str]) -> None:
                nonlocal sent
                sent += 1
                pending.append(pool.submit(self._call, case, headers))
                while len(pending) > 4 * CLIENTS:
                    pending.pop(0).result()

            right = self._headers(self.key)
            each = max(1, calls // 10 // len(self.operations))
            for operation in self.operations:
                for case in islice(self._edges(operation), each):
                    send(case, right)
            for part in range(100):
                if sent < calls:
                    self._generate(self.operations, calls - sent, part, send)
            for part in range(100, 100 + MORE_ROUNDS):
                while pending:
                    pending.pop(0).result()
                if never := [one for one in self.operations if not self.tally.good(one.label)]:
                    self._generate(never, 10 * len(never), part, send)
            for future in pending:
                future.result()

    def _edges(self, operation: Any) -> Iterator[Case[Any]]:
        """The values at the bounds of the schema, one after the other."""
        config = self.schema.config.generation_for(operation=operation, phase="coverage")
        found: Iterator[Case[Any]] = self.schema.iter_coverage_cases(
            operation, generation_modes=list(GenerationMode), generation_config=config
        )
        return found

    def _generate(
        self, operations: list[Any], count: int, part: int, send: Callable[..., None]
    ) -> None:
        headers = st.sampled_from([self.key] * 40 + ["", "nonsense"]).map(self._headers)

        @hypothesis.seed(f"{self.seed}.{part}")
        @hypothesis.settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @hypothesis.given(self._cases(operations), headers)
        def one(case: Case[Any], header: Mapping[str, str]) -> None:
            send(case, header)

        one()

    @staticmethod
    def _headers(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"} if key else {}

    def _cases(self, operations: list[Any]) -> st.SearchStrategy[Case[Any]]:
        weighted = [one for one in operations for _ in range(SHARES.get(one.label, 1))]
        made = {one.label: self._of(one) for one in operations}
        return st.sampled_from(weighted).flatmap(lambda one: made[one.label])

    def _of(self, operation: Any) -> st.SearchStrategy[Case[Any]]:
        """Calls of one operation: schemathesis's own, sound ones, and what lies between."""
        positive = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        inputs = operation.body or operation.path_parameters
        if not inputs:
            return positive
        negative = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        sound = self._sound.get(operation.label)
        path = operation.path
        if "{name" in path:
            named = st.fixed_dictionaries({"name": st.sampled_from(names(path))})
        else:
            named = st.just({})
        this = st.just(operation)
        if sound is None:
            return positive | negative | st.builds(_case, this, named)
        odd = spoiled(sound, values(), ("steering", "adapters", "x"))
        mixed = st.builds(_mixed, sound, positive, st.integers(1, 3), st.randoms())
        return (
            positive
            | negative
            | st.builds(_case, this, named, sound | sound | odd | mixed)
            | (st.builds(_case, this, named, sound))
        )

    def _call(self, case: Case[Any], headers: Mapping[str, str]) -> None:
        label = case.operation.label
        if not hasattr(self._sessions, "one"):
            self._sessions.one = requests.Session()
        answer = case.call(
            base_url=self.url, session=self._sessions.one, headers=dict(headers), timeout=WAIT_S
        )
        self.tally.statuses[label][answer.status_code] += 1
        try:
            case.validate_response(answer, checks=CHECKS, headers=dict(headers))
        except FailureGroup as group:
            for failure in group.exceptions:
                kind = f"{type(failure).__name__} {answer.status_code}"
                self.tally.wrong(label, kind, f"{failure}\n{case.as_curl_command()[:3000]}\n"
                                 f"{answer.text[:1000]}")  # fmt: skip
        if (broken := _broken_stream(answer)) is not None:
            self.tally.wrong(label, "error inside a stream", f"{broken}\n{case.as_curl_command()}")


def _case(operation: Any, path: dict[str, Any], body: Any = None) -> Case[Any]:
    """A call with a body of ours."""
    more = {} if body is None else {"body": body, "media_type": "application/json"}
    found: Case[Any] = operation.Case(path_parameters=dict(path), **more)
    return found


def _mixed(sound: dict[str, Any], case: Case[Any], count: int, dice: Any) -> dict[str, Any]:
    """A sound body with some fields of a made-up one."""
    body = case.body if isinstance(case.body, dict) else {}
    kept = dice.sample(sorted(body), min(count, len(body)))
    return {**sound, **{key: body[key] for key in kept}}


def _broken_stream(answer: Any) -> str | None:
    """The event of a stream that tells of a fault of the server's."""
    if not "".join(answer.headers.get("content-type", ())).startswith("text/event-stream"):
        return None
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            error = event.get("error") or (event if event.get("type") == "error" else None)
            kind = (error or {}).get("code"), (error or {}).get("type")
            if error and {"internal_error", "server_error", "api_error"} & set(kind):
                return line
    return None
