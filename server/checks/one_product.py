"""Validates `steering.one_product`: the streams' tables must fit side by side."""

from __future__ import annotations

from server.checks.capacity import ranks_of
from server.checks.diagnosis import Diagnosis
from server.settings.config import Config
from steering.plan import BASE

_FIELD = "steering.one_product"


def one_product_problems(config: Config, diagnosis: Diagnosis) -> list[str]:
    """The problems of `steering.one_product`, one line each."""
    lines = []
    if config.steering.one_product and ranks_of(config) > 1:
        lines.append(f"engine.tensor_parallel_size: refused (got {ranks_of(config)}): {_FIELD} "
                     "has not been run split")  # fmt: skip
    models = [n for n, s in config.streams.items() if s.head in (None, "q")]
    rows = diagnosis.streams[BASE].checkpoint.vocabulary
    for i, streams in enumerate(config.steering.one_product):
        for name in streams:
            if name not in models:
                lines.append(f"{_FIELD}[{i}]: not a stream with scores of its own (got {name!r}); "
                             f"allowed: {'one of: ' + ', '.join(models) or 'none'}")  # fmt: skip
                continue
            size = (
                diagnosis.streams[name].checkpoint.vocabulary if name in diagnosis.streams else rows
            )
            if size != rows:
                lines.append(
                    f"{_FIELD}[{i}]: {name} has a table of {size} rows, the base of {rows}"
                )
    return lines
