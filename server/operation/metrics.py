"""Our Prometheus series, beside vLLM's. All labels are bounded; `server.routes.collector` has
those that are read when `/metrics` is asked. docs/deploy/operations.md lists them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

from server.context import NONE, RequestContext
from server.operation.state import Phase, ServerState

OTHER = "other"
"""Profile and adapter of requests that came when there were `MOST` combinations already."""

PRIVATE = "private"
"""The adapter of requests that use one which is private to some groups of keys: whoever reads the
metrics learns neither its name nor, where there are several, how much which is used."""

MOST = 300
"""Combinations of method, profile and adapter that get series of their own: names of profiles and
adapters come and go, and each would stay in Prometheus's memory for ever."""

REASONS = (
    "unauthenticated", "forbidden", "starting", "draining", "dead", "head_too_large",
    "head_timeout", "body_too_large", "body_timeout", "queue_full", "requests_per_minute",
    "tokens_per_minute",
)  # fmt: skip
"""Why the gate lets a request not pass."""

_WHO = ("method", "profile", "adapter")
_FAST = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)

REQUESTS = Counter(
    "coxswain_requests",
    "Inference requests by steering method, profile, adapter and HTTP status (499: the client "
    "left; of an answer that broke off: the error's).",
    [*_WHO, "status"],
)
SECONDS = Histogram(
    "coxswain_request_seconds",
    "Time from the first byte of an inference request to the last of its answer, in seconds.",
    _WHO,
    buckets=(0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
FIRST_TOKEN = Histogram(
    "coxswain_first_token_seconds",
    "Time from the first byte of an inference request to its first token, in seconds.",
    _WHO,
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
TOKENS = Counter(
    "coxswain_tokens",
    "Tokens of inference requests: `prompt`, given to the engine, and `output`, drawn.",
    [*_WHO, "kind"],
)
REFUSALS = Counter(
    "coxswain_refusals", "Requests that the gate did not let pass, by reason.", ["reason"]
)
MEASURED = Counter(
    "coxswain_measured_tokens",
    "Tokens whose steering was measured: of requests with a report, and of the share "
    "`metrics.report_share` of the others.",
    ["method", "profile"],
)
CHANGED = Counter(
    "coxswain_changed_tokens",
    "Measured tokens at which the most likely id was another than the base's.",
    ["method", "profile"],
)
KL = Counter(
    "coxswain_kl_nats",
    "Sum over the measured tokens of the KL divergence of the steered from the base's "
    "distribution, in nats.",
    ["method", "profile"],
)
PASSES = Counter(
    "coxswain_measured_passes",
    "Forward passes of a stream for the measured tokens.",
    ["method", "profile", "stream"],
)
DRAFTED = Counter(
    "coxswain_drafted_tokens", "Drafts that were verified for measured requests.", ["method"]
)
ACCEPTED = Counter(
    "coxswain_accepted_tokens", "Drafts that became measured tokens.", ["method"]
)  # fmt: skip
LOAD_SECONDS = Histogram(
    "coxswain_adapter_load_seconds",
    "Time in which a set of adapters was brought into the engine, in seconds.",
    buckets=_FAST,
)
EVICT_SECONDS = Histogram(
    "coxswain_adapter_evict_seconds",
    "Time in which a set of adapters was taken out of the engine, in seconds.",
    buckets=_FAST,
)
WAIT_SECONDS = Histogram(
    "coxswain_adapter_wait_seconds",
    "Time that a request waited until the engine held its adapters, in seconds.",
    buckets=_FAST,
)
WAITING = Gauge(
    "coxswain_adapter_waiting",
    "Requests that wait until the engine holds their adapters; `vllm:num_requests_waiting` does "
    "not know of them yet.",
)

for _reason in REASONS:
    # A counter that appears with its first event shows no rise to Prometheus.
    REFUSALS.labels(_reason)


class Names:
    """Combinations of labels, each with series of its own until there are too many.

    Args:
        most: so many.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._known: set[tuple[str, str, str]] = set()

    def of(self, context: RequestContext) -> tuple[str, str, str]:
        """The labels method, profile, adapter of a request."""
        adapter = PRIVATE if context.private else context.adapter
        labels = (context.method, context.profile, adapter)
        if labels in self._known:
            return labels
        if len(self._known) >= self._most:
            profile, adapter = (NONE if name == NONE else OTHER for name in labels[1:])
            return context.method, profile, adapter
        self._known.add(labels)
        return labels


names = Names()


def observe(context: RequestContext) -> None:
    """Counts an inference request that has ended.

    Args:
        context: what is known of it.
    """
    who = names.of(context)
    REQUESTS.labels(*who, str(context.status)).inc()
    SECONDS.labels(*who).observe(context.seconds)
    if context.first_token_s is not None:
        FIRST_TOKEN.labels(*who).observe(context.first_token_s)
    TOKENS.labels(*who, "prompt").inc(context.prompt_tokens)
    TOKENS.labels(*who, "output").inc(context.output_tokens)


def measured(context: RequestContext, report: Mapping[str, Mapping[str, Any]]) -> None:
    """Counts what the worker measured for one prompt of a request.

    Args:
        context: of the request.
        report: by choice.
    """
    method, profile, _ = names.of(context)
    for choice in report.values():
        MEASURED.labels(method, profile).inc(choice["tokens"])
        # Neither is known where the base did not run.
        kl, changed = choice["kl_sum"], choice["changed"]
        CHANGED.labels(method, profile).inc(changed if math.isfinite(changed) else 0)
        # Rounding may leave the sum a little below zero, and counters only rise.
        KL.labels(method, profile).inc(kl if math.isfinite(kl) and kl > 0 else 0)
        for stream, count in choice["passes"].items():
            PASSES.labels(method, profile, stream).inc(count)
        DRAFTED.labels(method).inc(choice["drafted"])
        ACCEPTED.labels(method).inc(choice["accepted"])


def phases(state: ServerState) -> Metric:
    """The series that says in which phase the server is."""
    family = GaugeMetricFamily(
        "coxswain_phase", "1 for the phase in which the server is, else 0.", labels=["phase"]
    )
    for phase in get_args(Phase):
        family.add_metric([phase], float(phase == state.phase))
    return family


class _Phases(Collector):
    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        yield phases(self._state)


def page_without_engine(state: ServerState) -> bytes:
    """What `/metrics` shows while there is no application yet: the phase, and what this process
    counts by itself.
    """
    alone = CollectorRegistry()
    alone.register(_Phases(state))
    return generate_latest(REGISTRY) + generate_latest(alone)
