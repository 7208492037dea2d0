"""The result of the checks: facts about the streams, and each problem in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.checks.checkpoints import Checkpoint, Unusable
from server.console import table
from steering.errors import SteeringError
from steering.heads import HeadError
from steering.plan import BASE
from steering.plugins import PluginError, Registry


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """One line of the table.

    Args:
        name: the stream's name; `base` for the base.
        source: folder or id, or `same as base`.
        checkpoint: its files; the base's for a stream that shares the base's weights.
        shared: ids that mean the same token as in the base.
        kv_bytes: bytes of its key-value cache per token.
        owns_weights: False if it shares another stream's.
    """

    name: str
    source: str
    checkpoint: Checkpoint
    shared: int
    kv_bytes: int
    owns_weights: bool = True

    def describe(self) -> dict[str, Any]:
        """For `/admin/streams`."""
        point = self.checkpoint
        return {
            "source": self.source,
            "architecture": point.architecture,
            "parameters": point.parameters,
            "vocabulary": point.vocabulary,
            "shared_ids": self.shared,
            "context": point.context,
            "kv_bytes_per_token": self.kv_bytes,
        }


@dataclass
class Diagnosis:
    """Everything that was found."""

    problems: list[str] = field(default_factory=list)
    streams: dict[str, StreamFacts] = field(default_factory=dict)
    overlaps: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: Registry | None = None

    def guard(self, field: str, check: Callable[[], None]) -> None:
        """Runs one check; what it raises becomes a line that starts with the field."""
        try:
            check()
        except SteeringError as error:
            self.problems.append(str(error))
        except (Unusable, PluginError, HeadError) as error:
            self.problems.append(f"{field}: {error}")
        except Exception as error:  # a tokenizer or config that its library cannot read
            first = str(error).strip().split("\n")[0] or "no details"
            self.problems.append(f"{field}: {type(error).__name__}: {first}")

    def table(self) -> str:
        """The streams in columns."""
        head = ("stream", "architecture", "parameters", "vocabulary", "shared ids", "context",
                "KV bytes/token")  # fmt: skip
        rows = [
            (
                fact.name,
                fact.checkpoint.architecture,
                _short(fact.checkpoint.parameters) if fact.owns_weights else "(shared)",
                f"{fact.checkpoint.vocabulary}",
                f"{fact.shared}",
                f"{fact.checkpoint.context or '?'}",
                f"{fact.kv_bytes}",
            )
            for fact in self.streams.values()
        ]
        return table([head, *rows])


def _short(count: float) -> str:
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} G"


def where(name: str) -> str:
    """The setting that a stream comes from."""
    return "model" if name == BASE else f"streams.{name}"
