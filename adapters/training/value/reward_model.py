"""A sequence classifier as a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from adapters.training.errors import BadRecipe

Conversation = str | list[dict[str, str]]


class RewardModel:
    """A checkpoint of `transformers`' sequence classifiers, safetensors, in float32.

    It reads the conversation by its own chat template if it has one and the prompt is of messages;
    else the prompt and the reply as a pair of texts, messages joined by line ends.

    Args:
        folder: with its tokenizer.
        device: torch's name of it.

    Raises:
        BadRecipe: it is no such checkpoint, or has more than two labels.
    """

    def __init__(self, folder: Path, device: str) -> None:
        def refuse(message: str, value: object, allowed: str) -> BadRecipe:
            return BadRecipe(message, field=f"--reward {folder}", value=value, allowed=allowed)

        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise refuse("no model", None, "a folder with config.json and *.safetensors")
        config = AutoConfig.from_pretrained(folder)
        kinds = config.architectures or [""]
        if not kinds[0].endswith("ForSequenceClassification"):
            raise refuse("not a classifier of sequences", kinds[0], "…ForSequenceClassification")
        if config.num_labels not in (1, 2):
            raise refuse("labels cannot be used", config.num_labels, "1 or 2 labels")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        # The tokenizer knows of positions that the model keeps for itself.
        positions = getattr(config, "max_position_embeddings", self._tokenizer.model_max_length)
        self._longest = min(positions, self._tokenizer.model_max_length)
        self._device = device
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
        # One text at a time and no padding: the score is read at the last token, whatever its id.
        model.config.pad_token_id = None
        self._model: Any = model.to(device).eval()

    @torch.inference_mode()
    def score(self, prompt: Conversation, reply: str, where: str) -> float:
        """The logit of the one label, or of two the second's less the first's (its log-odds).

        Raises:
            BadRecipe: the texts are longer than the model reads; `where` names them.
        """
        ids = self._ids(prompt, reply)
        size = ids["input_ids"].shape[1]
        if size > self._longest:
            raise BadRecipe(
                "longer than the reward model reads",
                field=where,
                value=f"{size} tokens",
                allowed=f"≤ {self._longest}",
            )
        logits = self._model(**ids).logits[0].double()
        return float(logits[-1] - logits[0] if len(logits) == 2 else logits[0])

    def _ids(self, prompt: Conversation, reply: str) -> Any:
        if isinstance(prompt, list) and self._tokenizer.chat_template is not None:
            text = self._tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": reply}], tokenize=False
            )
            found = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            if isinstance(prompt, list):
                prompt = "\n".join(message["content"] for message in prompt)
            found = self._tokenizer(prompt, reply, return_tensors="pt")
        return found.to(self._device)
