"""What the front end may call in the worker (`worker_extension_cls`, through collective_rpc).

vLLM mixes this class into its worker, so every name carries the project's prefix. Arguments and
results are plain data.
"""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Calls into the steered model of this worker."""

    model_runner: Any

    def coxswain_bind(self) -> dict[str, Any]:
        """Hands the model its runner; once, after start-up and before the first request."""
        runner = self.model_runner
        runner.get_model().bind(runner)
        return {"streams": list(runner.get_model().names)}

    def coxswain_read_ahead(self, path: str, seconds: float) -> bool:
        """Reads a part of a set of adapters between two steps; whether all of it is read.

        Loading a set holds up every request. Called until it answers True, this leaves only the
        copy into the slot to `add_lora`.

        Args:
            path: of the set's LoRA request.
            seconds: about how long to read.
        """
        done: bool = self.model_runner.lora_manager.read_ahead(path, seconds)
        return done

    def coxswain_counters(self) -> dict[str, Any]:
        """Cumulative counts since start: steps, and per stream the passes and tokens run."""
        model = self.model_runner.get_model()
        return {
            "steps": model.steps,
            "passes": dict(model.passes),
            "tokens": dict(model.tokens),
        }

    def coxswain_report(self, tag: str, drawn: dict[str, list[int]]) -> dict[str, Any]:
        """The report of a finished request, by choice; see `report.ReportBook.take`."""
        reports: dict[str, Any] = self.model_runner.get_model().reports.take(tag, drawn)
        return reports
