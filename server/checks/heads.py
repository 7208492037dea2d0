"""Whether the heads of a configuration fit the streams that they read."""

from __future__ import annotations

from pathlib import Path

from server.checks.diagnosis import Diagnosis, where
from server.settings.config import Config
from server.settings.streams import StreamConfig
from steering.heads import HeadError, find_head
from steering.plan import BASE
from steering.vocabulary import Overlap


def check_heads(config: Config, diagnosis: Diagnosis) -> None:
    """Each head's problem, in one line."""
    for name, stream in config.streams.items():
        if stream.head is not None and stream.head != "q":
            diagnosis.guard(where(name), lambda n=name, s=stream: _check(config, diagnosis, n, s))  # type: ignore[misc]


def _check(config: Config, diagnosis: Diagnosis, name: str, stream: StreamConfig) -> None:
    assert stream.head is not None and stream.head != "q"
    body = stream.on or name
    if stream.on in config.streams and config.streams[stream.on].on is not None:
        kind = "head" if config.streams[stream.on].layer is None else "tap"
        raise HeadError(f"on: {stream.on} is a {kind} itself and has no hidden state")
    if stream.path is not None and not Path(stream.path).is_dir():
        raise HeadError(f"path: no such folder: {stream.path}")
    if body not in diagnosis.streams:
        return  # its own problem has a line already
    point = diagnosis.streams[body].checkpoint
    rows = diagnosis.streams[BASE].checkpoint.vocabulary if stream.path is None else None
    folder = Path(stream.path) if stream.path else point.folder
    find_head(folder, stream.head, point.hidden, rows)


def value_problems(config: Config, diagnosis: Diagnosis) -> list[str]:
    """The requirements of value streams; run after the vocabularies were compared."""
    values = [name for name, stream in config.streams.items() if stream.head == "value"]
    if not values:
        return []
    lines = []
    for name in values:
        wire = diagnosis.overlaps.get(name)
        if wire is not None and (lost := len(Overlap.from_wire(wire).differing)):
            lines.append(f"{where(name)}: lacks {lost} of the base's tokens; a value model must "
                         "know every token that it may be asked about")  # fmt: skip
    size, most = diagnosis.streams[BASE].checkpoint.vocabulary, config.steering.max_top_k
    if most > size:
        lines.append(f"steering.max_top_k: {most} is more than the base's vocabulary of {size}")
    return lines
