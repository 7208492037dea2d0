"""What a real server tells of itself: series, log lines, traces."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.monitoring import PROMETHEUS_LABELS, PROMETHEUS_OWN, selectors
from tests.server.live import Server
from tests.server.operation.collector import Collector, attributes
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

SECRET = "the word nobody may read in the log"
BODY: dict[str, Any] = {
    "model": "big", "prompt": SECRET, "max_tokens": 8, "temperature": 0, "ignore_eos": True,
}  # fmt: skip
STEERED = {**BODY, "model": "big-chat"}
ADAPTED = {**BODY, "model": "a"}


def samples(server: Server) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """`/metrics`, by name and labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def value(server: Server, name: str, **labels: str) -> float:
    """The sum of the samples that have some labels; reads their lines only."""
    wanted = [f'{label}="{text}"' for label, text in labels.items()]
    starts = (name + "{", name + " ")
    lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(starts)]
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if all(word in line for word in wanted)
    )


def complete(server: Server, body: dict[str, Any] = BODY, **options: Any) -> httpx.Response:
    answer = server.post("/v1/completions", body, **options)
    assert answer.status_code == 200, answer.text
    return answer


def with_id(server: Server, identifier: str) -> dict[str, dict[str, str]]:
    """Options of a request with an id."""
    return {"headers": {**server.key("/v1/x"), "x-request-id": identifier}}


def lines(server: Server, identifier: str) -> list[dict[str, Any]]:
    """The log's lines of a request."""
    found = [json.loads(line) for line in server.log.read_text().splitlines()]
    return [line for line in found if line.get("request_id") == identifier]


def test_requests_tokens_and_times_are_counted_by_method_profile_and_adapter(
    operated: Server,
) -> None:
    for body, who in (
        (BODY, {"method": "base", "profile": "none", "adapter": "none"}),
        (STEERED, {"method": "proxy_tuning", "profile": "big-chat", "adapter": "none"}),
        (ADAPTED, {"method": "base", "profile": "none", "adapter": "a"}),
        ({**BODY, "adapters": [{"name": "a", "weight": 0.5}, {"name": "b"}]},
         {"method": "base", "profile": "none", "adapter": "several"}),
    ):  # fmt: skip
        series = {
            name: (name, more) for name, more in (
                ("coxswain_requests_total", {"status": "200"}),
                ("coxswain_request_seconds_count", {}),
                ("coxswain_first_token_seconds_count", {}),
            )
        }  # fmt: skip
        before = {n: value(operated, n, **who, **more) for n, more in series.values()}
        tokens = {k: value(operated, "coxswain_tokens_total", **who, kind=k)
                  for k in ("prompt", "output")}  # fmt: skip
        usage = complete(operated, body).json()["usage"]
        for name, more in series.values():
            assert value(operated, name, **who, **more) == before[name] + 1, (name, who)
        for kind, key in (("prompt", "prompt_tokens"), ("output", "completion_tokens")):
            now = value(operated, "coxswain_tokens_total", **who, kind=kind)
            assert now == tokens[kind] + usage[key], (kind, who)


def test_a_streamed_reply_with_several_choices_counts_all_its_tokens(operated: Server) -> None:
    before = value(operated, "coxswain_tokens_total", kind="output")
    complete(operated, {**STEERED, "n": 3, "temperature": 1, "stream": True})
    assert value(operated, "coxswain_tokens_total", kind="output") == before + 24


def test_errors_are_counted_with_their_status(operated: Server) -> None:
    before = value(operated, "coxswain_requests_total", status="404")
    assert operated.post("/v1/completions", {**BODY, "model": "nope"}).status_code == 404
    assert value(operated, "coxswain_requests_total", status="404") == before + 1
    assert "nope" not in operated.get("/metrics").text


def test_steering_is_measured_without_a_report_and_the_reply_does_not_tell(
    operated: Server,
) -> None:
    who = {"method": "proxy_tuning", "profile": "big-chat"}
    before = {name: value(operated, f"coxswain_{name}_total", **who)
              for name in ("measured_tokens", "changed_tokens", "kl_nats")}  # fmt: skip
    passes = value(operated, "coxswain_measured_passes_total", stream="plain", **who)
    assert "steering" not in complete(operated, STEERED).json()
    report = complete(operated, {**STEERED, "steering": {"report": True}}).json()["steering"]
    now = {name: value(operated, f"coxswain_{name}_total", **who) - b for name, b in before.items()}
    assert now["measured_tokens"] == 16
    assert now["kl_nats"] == pytest.approx(2 * 8 * report["mean_kl"], rel=1e-3)
    assert now["changed_tokens"] == pytest.approx(2 * 8 * report["share_changed"])
    per_token = value(operated, "coxswain_measured_passes_total", stream="plain", **who) - passes
    assert per_token == pytest.approx(16 * report["forward_passes_per_token"]["plain"])


def test_where_adapters_are_and_what_moving_them_takes(operated: Server) -> None:
    moved = {name: value(operated, f"coxswain_adapter_{name}_total")
             for name in ("loads", "evictions")}  # fmt: skip
    for name in ("b", "c", "b"):  # two slots, one of them pinned: each makes the other leave
        complete(operated, {**BODY, "model": name})
    assert value(operated, "coxswain_adapter_loads_total") >= moved["loads"] + 2
    assert value(operated, "coxswain_adapter_evictions_total") >= moved["evictions"] + 2
    resident = [dict(has) for has in samples(operated)["coxswain_adapter_resident"]]
    assert {"adapter_name": "a", "level": "engine", "pinned": "true"} in resident
    assert {"adapter_name": "b", "level": "engine", "pinned": "false"} in resident
    assert {"adapter_name": "c", "level": "store", "pinned": "false"} in resident
    for name in ("load", "evict", "wait"):
        assert value(operated, f"coxswain_adapter_{name}_seconds_count") > 0
        assert value(operated, f"coxswain_adapter_{name}_seconds_sum") < 60


def test_the_registry_and_the_phase_are_told(operated: Server) -> None:
    assert value(operated, "coxswain_registry_adapters", state="ready") == 3
    assert value(operated, "coxswain_registry_up") == 1
    assert value(operated, "coxswain_registry_behind") == 0
    assert 0 <= value(operated, "coxswain_registry_lag_seconds") < 10
    assert value(operated, "coxswain_phase", phase="ready") == 1
    assert value(operated, "coxswain_phase", phase="draining") == 0
    assert value(operated, "coxswain_start_seconds") > 1


def test_a_request_s_id_is_taken_over_or_made_and_stands_in_its_line(operated: Server) -> None:
    answer = complete(operated, STEERED, **with_id(operated, "mine-1"))
    assert answer.headers["x-request-id"] == "mine-1"
    assert "mine-1" in answer.json()["id"]
    (line,) = until(lambda: lines(operated, "mine-1"))
    assert (line["level"], line["message"], line["status"]) == ("INFO", "request", 200)
    assert line["http"] == "POST /v1/completions"
    assert (line["method"], line["profile"]) == ("proxy_tuning", "big-chat")
    assert line["output_tokens"] == 8
    assert 0 < line["first_token_s"] <= line["seconds"] < 60
    made = complete(operated).headers["x-request-id"]
    assert until(lambda: lines(operated, made))
    odd = complete(operated, **with_id(operated, "a b")).headers["x-request-id"]
    assert odd != "a b"
    refused = httpx.get(f"{operated.url}/v1/models", headers={"x-request-id": "mine-2"})
    assert refused.status_code == 401
    assert refused.headers["x-request-id"] == "mine-2"


def test_two_requests_with_one_id_are_two_requests(operated: Server) -> None:
    options = with_id(operated, "twice")
    first, second = (complete(operated, STEERED, **options).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert len(until(lambda: found if len(found := lines(operated, "twice")) == 2 else None)) == 2


def test_every_line_is_json_and_none_has_a_prompt_or_a_key(operated: Server) -> None:
    complete(operated)
    found = operated.log.read_text()
    for line in found.splitlines():
        assert {"time", "level", "logger", "message"} <= json.loads(line).keys()
    assert "ready after" in found
    assert SECRET not in found
    assert "key-of" not in found


def test_a_trace_has_the_request_above_vllm_s_own_span(
    operated: Server, collector: Collector
) -> None:
    above = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {**operated.key("/v1/x"), "x-request-id": "traced", "traceparent": above}
    body = {**STEERED, "adapters": [{"name": "a"}]}
    assert operated.post("/v1/completions", body, headers=headers).status_code == 200
    both = until(lambda: found if len(found := collector.find("traced")) > 1 else None, 30)
    own, vllm = both[0], both[1]
    assert own.name == "POST /v1/completions"
    assert own.trace_id.hex() == vllm.trace_id.hex() == above.split("-")[1]
    assert own.parent_span_id.hex() == above.split("-")[2]
    assert vllm.name == "llm_request"
    told = attributes(own)
    assert told["gen_ai.request.model"] == told["coxswain.profile"] == "big-chat"
    assert told["coxswain.method"] == "proxy_tuning"
    assert told["coxswain.adapter"] == "a"
    (digest,) = told["coxswain.adapter_digests"]
    assert digest == operated.get("/admin/adapters/a").json()["digest"]
    assert told["gen_ai.usage.output_tokens"] == 8
    assert told["http.response.status_code"] == 200


ROUTERS_READ = {
    # https://github.com/kubernetes-sigs/gateway-api-inference-extension, model server protocol:
    # also what llm-d and the router of vLLM's production stack read.
    "vllm:num_requests_waiting": {"model_name"},
    "vllm:num_requests_running": {"model_name"},
    "vllm:kv_cache_usage_perc": {"model_name"},
    "vllm:cache_config_info": {"block_size", "num_gpu_blocks"},
    "vllm:lora_requests_info": {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
}


def test_routers_find_the_series_that_they_read(operated: Server) -> None:
    complete(operated, ADAPTED)
    found = samples(operated)
    for name, labels in ROUTERS_READ.items():
        assert name in found, name
        assert all(labels <= {label for label, _ in one} for one in found[name]), name
    assert set(found["coxswain_adapter_waiting"]) == {()}


def test_every_series_and_label_of_the_alerts_and_the_dashboard_is_there(
    operated: Server,
) -> None:
    complete(operated, STEERED)
    complete(operated, {**BODY, "model": "b"})
    complete(operated, {**BODY, "model": "c"})
    found = samples(operated)
    for one in selectors():
        if one.name in PROMETHEUS_OWN:
            continue
        assert one.name in found, f"{one.where} reads {one.name}, which is not there"
        labels = {label for has in found[one.name] for label, _ in has}
        assert one.labels <= labels | PROMETHEUS_LABELS, (one.where, one.name, one.labels - labels)
