"""The access log: ids, series, log lines, spans of requests; in front of a gate without engine."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from server.context import RequestContext, context_of
from server.launch import Run
from server.operation import metrics, tracing
from server.operation.access_log import AccessLog, with_ids
from server.operation.gate import Gate
from server.operation.logs import OneRecord, Text
from server.operation.metrics import Names
from server.settings.config import ConfigInvalid
from server.settings.operating import LoggingConfig, TracingConfig
from tests.server.operation.collector import Collector, attributes, grpc_collector
from tests.server.operation.gates import bearer, gate, parsed_config

ROOT = Path(__file__).resolve().parents[3]
BODY = {"prompt": "a secret", "model": "m"}


async def steered(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands for the application: finds out what a request asks for, and answers."""
    context = context_of(scope)
    context.method, context.profile, context.prompt = "mix", "p", BODY["prompt"]
    context.use_adapters([("one", "d1"), ("two", "d2")])
    context.prompt_tokens = 3
    context.count_drawn(2)
    headers = {k.decode(): v.decode() for k, v in scope["headers"]}
    await JSONResponse({key: headers.get(key) for key in ("x-request-id", "traceparent")})(
        scope, receive, send
    )


def observed(app: Gate | None = None, **options: Any) -> AccessLog:
    app = app or gate()
    app.inner = steered
    return AccessLog(app, **options)


def client(app: AccessLog) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(with_ids(app)), base_url="http://127.0.0.1"
    )


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_an_id_is_taken_over_returned_and_passed_on() -> None:
    async with client(observed()) as http:
        answer = await http.post("/v1/completions", json=BODY, headers={"x-request-id": "abc-1"})
        assert answer.headers["x-request-id"] == answer.json()["x-request-id"] == "abc-1"
        made = await http.get("/v1/models")
        assert len(made.headers["x-request-id"]) == 32
        gone = await http.get("/health")
        assert gone.headers["x-request-id"] != made.headers["x-request-id"]


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, 'a"b', "ä"])
async def test_ids_that_cannot_be_written_everywhere_are_replaced(given: str | None) -> None:
    headers = httpx.Headers([] if given is None else [(b"x-request-id", given.encode())])
    async with client(observed()) as http:
        answer = await http.get("/health", headers=headers)
        assert len(answer.headers["x-request-id"]) == 32
        kept = await http.get("/health", headers={"x-request-id": "ok:1.2_3-4"})
        assert kept.headers["x-request-id"] == "ok:1.2_3-4"


async def test_requests_are_counted_with_what_was_found_out_about_them() -> None:
    who = {"method": "mix", "profile": "p", "adapter": "several"}
    names = ("requests_total", "request_seconds_count", "first_token_seconds_count")
    more = [{"status": "200"}, {}, {}]
    before = [sample(f"coxswain_{n}", **who, **m) for n, m in zip(names, more, strict=True)]
    output = sample("coxswain_tokens_total", **who, kind="output")
    async with client(observed()) as http:
        await http.post("/v1/completions", json=BODY)
        await http.get("/v1/models")
    after = [sample(f"coxswain_{n}", **who, **m) for n, m in zip(names, more, strict=True)]
    assert after == [b + 1 for b in before]
    assert sample("coxswain_tokens_total", **who, kind="output") == output + 2


async def test_what_the_gate_refuses_is_counted_too() -> None:
    app = observed(gate(auth={"api_keys": ["k"]}, limits={"requests_per_minute": 1}))
    none = {"method": "none", "profile": "none", "adapter": "none"}
    before = {s: sample("coxswain_requests_total", **none, status=s) for s in ("401", "429")}
    reasons = ("unauthenticated", "requests_per_minute")
    refused = {r: sample("coxswain_refusals_total", reason=r) for r in reasons}
    async with client(app) as http:
        assert (await http.post("/v1/completions")).status_code == 401
        for expected in (200, 429):
            answer = await http.post("/v1/completions", headers=bearer("k"))
            assert answer.status_code == expected
    for status, count in before.items():
        assert sample("coxswain_requests_total", **none, status=status) == count + 1
    for reason, count in refused.items():
        assert sample("coxswain_refusals_total", reason=reason) == count + 1


@pytest.mark.parametrize("reason", metrics.REASONS)
def test_every_reason_has_a_series_from_the_start(reason: str) -> None:
    assert REGISTRY.get_sample_value("coxswain_refusals_total", {"reason": reason}) is not None


def test_names_that_come_and_go_do_not_make_series_without_end() -> None:
    names = Names(most=3)
    found = [
        names.of(RequestContext(method="mix", profile=f"p{i}", adapter="none")) for i in range(5)
    ]
    assert found[:3] == [("mix", f"p{i}", "none") for i in range(3)]
    assert found[3:] == [("mix", "other", "none")] * 2
    assert names.of(RequestContext(method="mix", profile="p0")) == ("mix", "p0", "none")


def test_a_report_that_is_infinite_or_rounds_below_zero_keeps_the_counter_rising() -> None:
    choice = {"tokens": 1, "changed": 0, "passes": {"base": 1}, "drafted": 0, "accepted": 0}
    before = sample("coxswain_kl_nats_total", method="odd", profile="none")
    for kl in (float("inf"), -1e-9, 0.25):
        metrics.measured(RequestContext(method="odd"), {"0": {**choice, "kl_sum": kl}})
    assert sample("coxswain_kl_nats_total", method="odd", profile="none") == before + 0.25


@pytest.mark.parametrize("prompts", [False, True])
async def test_a_request_s_line_has_its_prompt_only_if_asked(
    prompts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "coxswain.requests")
    app = observed(logging=LoggingConfig(requests=True, prompts=prompts))
    async with client(app) as http:
        await http.post("/v1/completions", json=BODY, headers={"x-request-id": "r"})
    (record,) = caplog.records
    fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
    assert (fields["request_id"], fields["status"]) == ("r", 200)
    assert fields["adapters"] == ["d1", "d2"]
    assert ("a secret" in str(fields)) == prompts


async def test_without_being_asked_there_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "coxswain.requests")
    async with client(observed()) as http:
        await http.post("/v1/completions", json=BODY)
    assert not caplog.records


_SAY = """
import logging, warnings
from server.console import Progress, say
from server.operation.logs import logger, setup
from server.settings.operating import LoggingConfig
from asgi_correlation_id import correlation_id
setup(LoggingConfig(format="{form}", requests=True))
say("coxswain: ready")
correlation_id.set("id-1")
logger.info("request", extra={{"fields": {{"status": 200}}}})
logging.getLogger("elsewhere").warning("odd")
try:
    raise ValueError("broken")
except ValueError:
    logging.getLogger("coxswain").exception("failed")
with Progress() as progress:
    progress.stage("loading")
"""


def said(form: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", _SAY.format(form=form)], cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert not done.stdout
    return done.stderr.splitlines()


def test_every_line_is_an_object_where_lines_are_json() -> None:
    ready, request, odd, failed, stage = [json.loads(line) for line in said("json")]
    assert (ready["level"], ready["logger"], ready["message"]) == ("INFO", "coxswain", "ready")
    assert (request["request_id"], request["status"]) == ("id-1", 200)
    assert (odd["level"], odd["message"], odd["request_id"]) == ("WARNING", "odd", "id-1")
    assert "ValueError: broken" in failed["exception"]
    assert stage["message"].startswith("loading …")


def test_text_is_for_people() -> None:
    lines = said("text")
    assert lines[0] == "coxswain: ready"
    assert lines[1] == "coxswain: request status=200"
    assert "    ValueError: broken" in lines
    assert "coxswain: WARNING elsewhere: odd" in lines
    assert lines[-1].startswith("coxswain: loading …")


FORGED = "x\r\n\x1b[2Kcoxswain: request status=200\u2028coxswain: ready\ncoxswain: a\rcoxswain: b"


@pytest.mark.parametrize("where", ["message", "field", "exception", "vllm"])
def test_no_text_of_a_client_passes_for_a_record(where: str) -> None:
    formatter: logging.Formatter = Text("coxswain: %(message)s")
    if where == "vllm":
        formatter = OneRecord(logging.Formatter("ERROR %(message)s"))
    record = logging.LogRecord(
        "coxswain", logging.ERROR, "f", 1, "%s",
        ("fine" if where in ("field", "exception") else FORGED,), None,
    )  # fmt: skip
    if where == "field":
        record.fields = {"http": f"POST /v1/{FORGED}", "model": 'a" status="200'}
    if where == "exception":
        record.exc_info = (ValueError, ValueError(FORGED), None)
    first, *more = formatter.format(record).split("\n")
    assert first.startswith("coxswain: ") or where == "vllm"
    assert all(line.startswith("    ") for line in more)
    assert where == "field" or more
    assert not set("\r\x1b\u2028") & set("".join([first, *more]))
    if where == "field":
        assert not more
        assert json.loads(first.split(" model=")[1]) == 'a" status="200'


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector().running() as found:
        yield found


async def test_a_span_goes_to_the_collector_with_what_was_found_out(collector: Collector) -> None:
    traces = tracing.start(TracingConfig(endpoint=collector.endpoint, protocol="http/protobuf"))
    above = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with client(observed(tracing=traces)) as http:
        headers = {"x-request-id": "t-1", "traceparent": above}
        answer = await http.post("/v1/completions", json=BODY, headers=headers)
        await http.get("/v1/models")
    assert traces is not None
    traces.close()
    (span,) = collector.find("t-1")
    assert answer.json()["traceparent"] == (
        f"00-0af7651916cd43dd8448eb211c80319c-{span.span_id.hex()}-01"
    )
    assert span.parent_span_id.hex() == "b7ad6b7169203331"
    found = attributes(span)
    assert found["coxswain.method"] == "mix"
    assert found["coxswain.adapter_digests"] == ["d1", "d2"]
    assert found["gen_ai.usage.output_tokens"] == 2
    assert len(collector.spans) == 1, "only inference is traced"


async def test_spans_go_over_grpc_too() -> None:
    with grpc_collector() as (endpoint, spans):
        traces = tracing.start(TracingConfig(endpoint=endpoint, service_name="here"))
        async with client(observed(tracing=traces)) as http:
            await http.post("/v1/completions", json=BODY)
        assert traces is not None
        traces.close()
    assert [span.name for span in spans] == ["POST /v1/completions"]


def test_without_the_packages_the_start_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    config = parsed_config(tracing={"endpoint": "http://127.0.0.1:4317"})
    with pytest.raises(ConfigInvalid) as caught:
        Run(config)
    (problem,) = caught.value.problems
    assert problem.startswith("tracing: needs opentelemetry.sdk.trace.export: pip install")


async def test_a_caller_s_decision_not_to_sample_holds(collector: Collector) -> None:
    traces = tracing.start(TracingConfig(endpoint=collector.endpoint, protocol="http/protobuf"))
    above = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    async with client(observed(tracing=traces)) as http:
        headers = {"x-request-id": "t-2", "traceparent": above}
        await http.post("/v1/completions", json=BODY, headers=headers)
    assert traces is not None
    traces.close()
    assert not collector.find("t-2")
