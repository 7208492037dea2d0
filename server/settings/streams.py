"""The settings of one stream. Needs pydantic only."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from server.settings.operating import Section
from server.settings.paths import Located


class StreamConfig(Section):
    """One stream beside the base. Give exactly one of `model`, `same_as`, `on`."""

    model: Located | None = Field(
        None, description="Folder (relative to this file) or Hugging Face id of a companion model."
    )
    same_as: str | None = Field(
        None,
        description="Another stream whose weights are used again, with a key-value cache of its "
        "own: for another prompt, or without the adapter. At present only `base`.",
    )
    on: str | None = Field(
        None,
        description="The stream whose hidden state is read: the last one by a classifier head, the "
        "one after `layer` by a tap.",
    )
    head: Literal["value", "classifier", "q"] | None = Field(
        None,
        description="What the stream computes instead of token scores: the value of a text, a "
        "class, or (q) the value of each next token, one row of the unembedding for each. Absent: "
        "token scores.",
    )
    path: Located | None = Field(
        None,
        description="Folder with the head's tensors, where they are not in `model`. Beside `model` "
        "it may hold a PEFT LoRA of the body too, which is merged when it is loaded.",
    )

    layer: int | None = Field(
        None,
        ge=0,
        description="Makes it a tap: after how many of the layers of `on` it reads the hidden "
        "state, 0 (the embeddings) to one less than there are. The unembedding of `on` gives it "
        "scores, so it is a stream like others, which runs nothing.",
    )
    norm: bool | None = Field(
        None,
        description="Whether the final norm of `on` stands between a tap's hidden state and the "
        "unembedding; by default it does. Without it, DoLa and SLED are as published.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> StreamConfig:
        sources = [name for name in ("model", "same_as", "on") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(
                f"give exactly one of model, same_as, on; got {', '.join(sources) or 'none'}"
            )
        if self.layer is not None and (self.on is None or self.head or self.path):
            raise ValueError("`layer` goes with `on`, and neither with `head` nor with `path`")
        if self.norm is not None and self.layer is None:
            raise ValueError("`norm` goes with `layer`")
        if self.on is not None and self.layer is None and (self.head is None or self.path is None):
            raise ValueError("`on` needs `layer`, or `head` and `path`")
        if self.on is not None and self.head == "value":
            raise ValueError("a value head needs a `model` of its own: it reads candidate tokens")
        if self.head == "q" and (self.model is None or self.path is not None):
            raise ValueError("a q head is the unembedding of its `model`; give nothing else")
        if self.same_as is not None and self.head is not None:
            raise ValueError("`head` goes with `model` or `on`")
        if self.path is not None and self.head is None:
            raise ValueError("`path` goes with `head`")
        return self
