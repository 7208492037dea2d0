"""The worker of a faulty server."""

from __future__ import annotations

import time

from steering.worker.answers import Answer
from steering.worker.extension import WorkerExtension
from tests.faulty import error_of, wish
from tests.injected import failing


class FaultyExtension(WorkerExtension):
    """Loads of adapters go wrong when the file says so."""

    def coxswain_load(self, path: str) -> Answer:
        """As the real one, or with a fault."""
        wished = wish()
        time.sleep(wished.get("slow_s", 0.0))
        if "point" not in wished:
            return super().coxswain_load(path)
        manager = self.model_runner.lora_manager
        manager._ahead.pop(path, None)  # else nothing is left to be read
        with failing(manager, wished["point"], wished["after"], error_of(wished["error"])):
            return super().coxswain_load(path)
