"""The models that clients see: the base, the profiles and the adapters, by name."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission


class SteeredModels(OpenAIServingModels):
    """vLLM's list of models; what it does not know of are profiles and adapters.

    Args:
        engine: the engine client.
        name: what clients call the base.
        aliases: more names, which the resolver has looked up before anything here is asked.
    """

    def __init__(self, engine: Any, name: str, aliases: Collection[str] = ()) -> None:
        # vLLM would show the base's folder as its root: no business of clients.
        super().__init__(engine, [BaseModelPath(name, name)])
        self._asked: str | None = None
        self._aliases = aliases

    def for_request(self, model: str | None) -> SteeredModels:
        """The list as one request sees it.

        Args:
            model: the profile or adapter that it names as its model, and that is there: its answer
                carries that name. None: the base.
        """
        view = copy.copy(self)
        view._asked = model
        return view

    def is_base_model(self, model_name: str) -> bool:
        """Whether a name needs no adapter of vLLM's: ours travel with the plan."""
        ours = model_name == self._asked or model_name in self._aliases
        return ours or bool(super().is_base_model(model_name))

    def model_name(self, lora_request: Any = None) -> str:
        """The name that the current response carries."""
        return self._asked or str(super().model_name(lora_request))

    async def show(self, names: Sequence[str]) -> ModelList:
        """The base and further models.

        Args:
            names: of all of them, the base's first.
        """
        models = await super().show_available_models()
        for card in models.data:
            card.owned_by = "coxswain"
        models.data += [self.card(name) for name in names[1:]]
        return models

    def card(self, name: str) -> ModelCard:
        """A further model."""
        base = self.base_model_paths[0]
        return ModelCard(
            id=name,
            root=base.name,
            parent=base.name,
            max_model_len=self.model_config.max_model_len,
            permission=[ModelPermission()],
            owned_by="coxswain",
        )
