"""vLLM's slots for LoRA adapters, made so that nothing is left in one that no set is in.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from vllm.lora.model_manager import LRUCacheLoRAModelManager


class Slots(LRUCacheLoRAModelManager):
    """vLLM's slots; one that no set is in is empty, and one that a set is in has all of it."""

    def activate_adapter(self, lora_id: int) -> bool:
        """Fills a slot, or leaves neither the set nor a part of it."""
        try:
            return bool(super().activate_adapter(lora_id))
        except BaseException:
            self.remove_adapter(lora_id)
            raise

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id not in self.lora_index_to_id:
            return
        index = self.lora_index_to_id.index(lora_id)
        super()._deactivate_adapter(lora_id)
        for module in self.modules.values():
            module.reset_lora(index)
