"""An adapter as a request or a profile names it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from adapters.formats.artefact import TEMPERATURES

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class AdapterRef(BaseModel):
    """One adapter of a request or of a profile."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="The adapter's name, or `name@version`.")
    weight: Number = Field(1.0, description="What it is multiplied by; 0 leaves it out.")
    top_k: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None, description="MeteoRA packs: adapters that each token is routed to; default: the "
        "pack's own.",
    )  # fmt: skip
    temperature: Annotated[Number, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])] | None = Field(
        None, description="MeteoRA packs: T of the gate's softmax (the paper's composite tasks "
        "use 15 to 30); default: the pack's own.",
    )  # fmt: skip
    where: str | dict[str, Any] | None = Field(
        None, description="At which positions it acts: `all`, `prompt`, `reply`, `last_prompt`, or "
        "an object with `prompt_first`, `prompt_last`, `from`, `first`, or with `after`, `until` "
        "(texts of the reply), `from`, `first`; default: where its file says, or at all.",
    )  # fmt: skip

    @property
    def adapter(self) -> str:
        """Its name without a version."""
        return self.name.partition("@")[0]
