"""vLLM's own Prometheus series, bounded."""

from __future__ import annotations

from typing import Any

from prometheus_client import Gauge
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from server.adapting.served_names import ServedNames

MOST = 64
"""Combinations of running and waiting sets of adapters that `vllm:lora_requests_info` shows. vLLM
keeps each for ever, some hundreds a minute where adapters come and go; only the newest one counts,
for the series' value is the time when it was so."""


class _Newest:
    """Stands for a gauge: of its series the newest `MOST` are kept.

    Args:
        gauge: with labels.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._kept: dict[tuple[str, ...], dict[str, str]] = {}

    def labels(self, **labels: Any) -> Gauge:
        """As the gauge's."""
        texts = {name: str(value) for name, value in labels.items()}
        key = tuple(texts.values())
        self._kept[key] = self._kept.pop(key, texts)
        while len(self._kept) > MOST:
            self._gauge.remove_by_labels(self._kept.pop(next(iter(self._kept))))
        return self._gauge.labels(**labels)


class BoundedSeries(PrometheusStatLogger):
    """vLLM's series of one engine; adapters are called there as clients call them."""

    gauge_lora_info: Any
    served: ServedNames

    @classmethod
    def naming(cls, served: ServedNames) -> type[BoundedSeries]:
        """The class for an engine; vLLM makes the object.

        Args:
            served: the names of the engine's adapters.
        """
        return type("BoundedSeries", (cls,), {"served": served})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.gauge_lora_info is not None:
            self.gauge_lora_info = _Newest(self.gauge_lora_info)

    def record(self, scheduler_stats: SchedulerStats | None, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, which lists contents, and running ones as waiting, too."""
        if scheduler_stats is not None and self.gauge_lora_info is not None:
            stats, names = scheduler_stats, self.served
            running = [set_name for set_name, n in stats.running_lora_adapters.items() if n]
            waiting = [set_name for set_name, n in stats.waiting_lora_adapters.items() if n]
            stats.running_lora_adapters = dict.fromkeys(names.of(running), 1)
            stats.waiting_lora_adapters = dict.fromkeys(names.of_waiting(waiting), 1)
        super().record(scheduler_stats, *args, **kwargs)
