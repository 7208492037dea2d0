"""The worker of a faulty server."""

from __future__ import annotations

import time
from typing import ClassVar

from steering.worker.adapting.answers import Answer
from steering.worker.extension import WorkerExtension
from tests.faulty import error_of, note_broken, wish
from tests.injected import content, failing, filled


class FaultyExtension(WorkerExtension):
    """Loads of adapters go wrong when the file says so; what slots hold is looked at each time."""

    coxswain_sums: ClassVar[dict[int, float]] = {}
    """Set id → what was in its slot when it was there first. A set's content never changes."""

    def coxswain_load(self, path: str) -> Answer:
        """As the real one, or with a fault."""
        self._coxswain_look()
        wished = wish()
        time.sleep(wished.get("slow_s", 0.0))
        if "point" not in wished:
            return super().coxswain_load(path)
        manager = self.model_runner.lora_manager
        manager._ahead.pop(path, None)  # else nothing is left to be read
        with failing(manager, wished["point"], wished["after"], error_of(wished["error"])):
            return super().coxswain_load(path)

    def _coxswain_look(self) -> None:
        """A slot that no set is in must be empty; what is registered must be in one."""
        manager = self.model_runner.lora_manager
        held, slots, full = manager.list_adapters(), manager.slots, filled(manager)
        if not set(full) <= set(slots.values()) or held != slots.keys():
            note_broken(f"registered {held}, in slots {slots}, filled {full}")
        for set_id, slot in slots.items():
            found = content(manager, slot)
            if self.coxswain_sums.setdefault(set_id, found) != found:
                note_broken(f"slot {slot} holds something else than set {set_id}")
