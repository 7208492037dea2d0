"""The models that clients see: the base, and each profile under its own name."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission

from server.profiles import Profiles

asked_model: ContextVar[str | None] = ContextVar("asked_model", default=None)
"""The profile that the current request named as its model: its answer carries that name."""


class SteeredModels(OpenAIServingModels):
    """vLLM's list of models, with the profiles.

    Args:
        engine: the engine client.
        name: what clients call the base.
        profiles: the profiles; looked up at each request.
    """

    def __init__(self, engine: Any, name: str, profiles: Profiles) -> None:
        # vLLM would show the base's folder as its root: no business of clients.
        super().__init__(engine, [BaseModelPath(name, name)])
        self._profiles = profiles

    def is_base_model(self, model_name: str) -> bool:
        """Whether a name needs no adapter."""
        return model_name in self._profiles or bool(super().is_base_model(model_name))

    def model_name(self, lora_request: Any = None) -> str:
        """The name that the current response carries."""
        return asked_model.get() or str(super().model_name(lora_request))

    async def show_available_models(self) -> ModelList:
        """The base and all profiles."""
        found = await super().show_available_models()
        base = self.base_model_paths[0]
        found.data += [
            ModelCard(
                id=name,
                root=base.name,
                parent=base.name,
                max_model_len=self.model_config.max_model_len,
                permission=[ModelPermission()],
            )
            for name in self._profiles
        ]
        for card in found.data:
            card.owned_by = "coxswain"
        return found
