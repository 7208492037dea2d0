"""The series that tell how the server stands at the moment when `/metrics` is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

from server.adapting.service import Adapters
from server.operation.metrics import PRIVATE, phases
from server.serving import Serving, StreamCounters

MOST_ADAPTERS = 1000
"""Adapters with a series of their own, in the order of their names."""

STATES = ("pending", "downloading", "loading", "ready", "failed", "unloading")
"""States of an adapter in the registry (`adapters.registry.record.State`)."""


class Present(Collector):
    """The series of `/metrics` that show the present state.

    Its parts belong to the event loop, and the page is made in a thread: `look` takes everything
    down on the loop first.
    """

    def __init__(self) -> None:
        self._families: list[Metric] = []
        REGISTRY.register(self)

    def look(self, parts: Serving) -> None:
        """Takes down how the server stands now; on the event loop."""
        families = [*_server(parts), *_streams(parts.counters)]
        if parts.adapters is not None:
            families += [*_residency(parts.adapters), *_registry(parts.adapters)]
            families += _for_routers(parts.adapters, parts.config.name)
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        yield from self._families


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"coxswain_{name}", text, value=value)


def _labelled(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    labels: list[str],
    samples: Iterable[tuple[list[str], float]],
) -> Metric:
    family = kind(f"coxswain_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _server(parts: Serving) -> Iterator[Metric]:
    state = parts.state
    yield phases(state)
    yield _gauge("in_flight", "Inference requests whose answer is not complete.", state.in_flight)
    yield _gauge(
        "in_flight_limit", "How many there may be (`server.max_in_flight`).",
        parts.config.server.max_in_flight,
    )  # fmt: skip
    yield _gauge("start_seconds", "How long the start took, in seconds.", state.start_s)
    yield _gauge(
        "rates_local", "1 while callers are counted in this replica alone, because Redis is away.",
        float(parts.rates.away),
    )  # fmt: skip
    yield _gauge(
        "engine_silent_seconds", "Time since the engine answered last, in seconds.", state.silent_s
    )


def _streams(counters: StreamCounters) -> Iterator[Metric]:
    for name, text, values in (
        ("stream_tokens", "Tokens that a stream has run.", counters.tokens),
        ("stream_passes", "Forward passes of a stream.", counters.passes),
    ):
        samples = [([stream], float(value)) for stream, value in values.items()]
        yield _labelled(CounterMetricFamily, name, text, ["stream"], samples)
    yield CounterMetricFamily(
        "coxswain_steps", "Steps that the engine has taken.", value=counters.steps
    )


def _residency(adapters: Adapters) -> Iterator[Metric]:
    loaded, records = adapters.manager.loaded, adapters.manager.records
    samples = Counter[tuple[str, str, str]]()
    for name in sorted(loaded)[:MOST_ADAPTERS]:
        level = "engine" if adapters.loader.resident(loaded[name].content) else "store"
        record = records.get(name)
        pinned = str(bool(record and record.pinned)).lower()
        samples[PRIVATE if adapters.private(name) else name, level, pinned] += 1
    yield _labelled(
        GaugeMetricFamily, "adapter_resident",
        "1 for each adapter that answers here; `private`: how many private ones. Level `engine`: "
        "the engine holds it; `store`: it is loaded when a request comes.",
        ["adapter_name", "level", "pinned"],
        [(list(labels), float(count)) for labels, count in samples.items()],
    )  # fmt: skip
    residency = adapters.loader.residency
    yield _gauge("adapter_slots", "Sets of adapters that the engine can hold.", residency.slots)
    yield _gauge("adapter_slots_taken", "Sets that it holds.", len(residency.held))
    yield _gauge("adapter_bytes", "Bytes of the sets that it holds.", residency.bytes)
    for name, text, value in (
        ("adapter_loads", "Sets brought into the engine.", residency.loads),
        ("adapter_evictions", "Sets taken out of it.", residency.evictions),
    ):
        yield CounterMetricFamily(f"coxswain_{name}", text, value=value)


def _for_routers(adapters: Adapters, model: str) -> Iterator[Metric]:
    """What routers read that place requests by adapter, under the names that vLLM's own series of
    residency are to have (https://github.com/vllm-project/vllm/pull/54830).
    """
    loaded, records = adapters.manager.loaded, adapters.manager.records
    family = GaugeMetricFamily(
        "vllm:lora_adapter_loaded",
        "1 for each adapter that the engine holds; those private to some API keys are `private`.",
        labels=["model_name", "adapter_name", "level", "pinned"],
    )  # fmt: skip
    held = [name for name in sorted(loaded) if adapters.loader.resident(loaded[name].content)]
    samples = set()
    for name in held[:MOST_ADAPTERS]:
        record = records.get(name)
        pinned = str(bool(record and record.pinned)).lower()
        samples.add((PRIVATE if adapters.private(name) else name, pinned))
    for name, pinned in sorted(samples):
        family.add_metric([model, name, "gpu", pinned], 1.0)
    yield family
    residency = adapters.loader.residency
    for series, text, value in (
        ("num_gpu_loaded_lora_adapters", "Sets of adapters that it holds.", len(residency.held)),
        ("max_gpu_lora_adapters", "How many it can hold.", residency.slots),
    ):
        gauge = GaugeMetricFamily(f"vllm:{series}", text, labels=["model_name"])
        gauge.add_metric([model], value)
        yield gauge


def _registry(adapters: Adapters) -> Iterator[Metric]:
    manager = adapters.manager
    states = Counter[str](record.state for record in manager.records.values())
    yield _labelled(
        GaugeMetricFamily, "registry_adapters", "Adapters in the registry by state.", ["state"],
        [([state], float(states[state])) for state in STATES],
    )  # fmt: skip
    feed = manager.feed
    yield _gauge("registry_up", "1 if the registry answers, else 0.", feed.away is None)
    yield CounterMetricFamily(
        "coxswain_registry_losses",
        "How often Redis had lost the registry, or its last writes.", value=feed.losses,
    )  # fmt: skip
    yield _gauge(
        "registry_lag_seconds", "Age of this replica's view of the registry, in seconds.",
        feed.age_s,
    )  # fmt: skip
    yield _gauge(
        "registry_behind", "Adapters that serve elsewhere, or should, and not yet here.",
        len(adapters.missing()),
    )  # fmt: skip
