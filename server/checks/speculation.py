"""Validates `steering.speculation`."""

from __future__ import annotations

from server.checks.capacity import context_length
from server.checks.diagnosis import Diagnosis
from server.settings.config import Config
from steering.plan import BASE

_FIELD = "steering.speculation"


def speculation_problems(config: Config, diagnosis: Diagnosis) -> list[str]:
    """The problems of `steering.speculation`, one line each."""
    section = config.steering.speculation
    if section is None:
        return []
    lines = []
    able = [
        name for name, s in config.streams.items() if s.model is not None and s.head is None
    ]  # fmt: skip
    if section.draft not in able:
        lines.append(
            f"{_FIELD}.draft: not a stream with a language model of its own "
            f"(got {section.draft!r}); allowed: {'one of: ' + ', '.join(able) if able else 'none'}"
        )
    length = context_length(config, diagnosis.streams[BASE].checkpoint)
    if length is not None and section.tokens + 2 > length:
        lines.append(f"{_FIELD}.tokens: {section.tokens} drafts do not fit into requests of "
                     f"{length} tokens; allowed: at most {length - 2}")  # fmt: skip
    return lines
