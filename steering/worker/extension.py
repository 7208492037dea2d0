"""The worker's methods for the front end (`worker_extension_cls`, through collective_rpc).

vLLM mixes this class into its worker, so every name carries the project's prefix. Arguments and
results are plain data.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from steering.worker.adapting.answers import Answer, answer
from steering.worker.adapting.layers import adapted_layers


class WorkerExtension:
    """Calls into the steered model of this worker."""

    model_runner: Any

    def coxswain_bind(self) -> dict[str, Any]:
        """Hands the model its runner; once, after start-up and before the first request.

        Returns:
            `streams`, their names; `layers`: stream that owns its weights → module → (out, in), of
            the layers that adapters can change.
        """
        model = self.model_runner.get_model()
        model.bind(self.model_runner)
        return {"streams": list(model.names), "layers": adapted_layers(model)}

    # What loads adapters answers with what was wrong and never raises: where one of several ranks
    # raises, vLLM leaves the others' answers unread, and the next call takes them for its own.

    def coxswain_read_ahead(self, path: str, seconds: float) -> Answer:
        """Reads a part of a set of adapters between two steps; answers whether all of it is read.

        Loading a set holds up every request. Called until it answers True, this leaves only the
        copy into the slot to `coxswain_load`.

        Args:
            path: of the set's LoRA request.
            seconds: about how long to read.
        """
        return answer(lambda: self.model_runner.lora_manager.read_ahead(path, seconds))

    def coxswain_load(self, path: str) -> Answer:
        """Brings a set into a slot, or leaves nothing of it."""
        return answer(lambda: self.model_runner.lora_manager.load(path))

    def coxswain_unload(self, path: str) -> Answer:
        """Leaves nothing of a set: no id, no weights, nothing that was read ahead."""
        return answer(lambda: self.model_runner.lora_manager.unload(path))

    def coxswain_counters(self) -> dict[str, Any]:
        """Cumulative counts since start: steps, and per stream the passes and tokens run."""
        return asdict(self.model_runner.get_model().counters)

    def coxswain_report(self, tag: str, tokens: dict[str, int]) -> dict[str, Any]:
        """The report of a finished request, by choice; see `report.ReportBook.take`."""
        reports: dict[str, Any] = self.model_runner.get_model().reporter.take(tag, tokens)
        return reports
