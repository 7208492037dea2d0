"""Whether the layers that taps read are there."""

from __future__ import annotations

from server.checks.diagnosis import Diagnosis
from server.settings.config import Config
from steering.plan import BASE


def tap_problems(config: Config, diagnosis: Diagnosis) -> list[str]:
    """What is wrong with the taps, in one line each."""
    models = [BASE, *(n for n, s in config.streams.items() if s.on is None and s.head is None)]
    lines = []
    for name, stream in config.streams.items():
        if stream.layer is None or stream.on is None:
            continue
        field = f"streams.{name}"
        if stream.on not in models:
            lines.append(f"{field}.on: not a language model that runs (got {stream.on!r}); "
                         f"allowed: one of: {', '.join(models)}")  # fmt: skip
        elif stream.on in diagnosis.streams:
            count = diagnosis.streams[stream.on].checkpoint.layers
            if stream.layer >= count:
                lines.append(f"{field}.layer: {stream.on} has {count} layers (got {stream.layer}); "
                             f"allowed: 0 to {count - 1}")  # fmt: skip
    return lines
