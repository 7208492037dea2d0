"""What a request says about adapters, and what it stands for here and now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import NoAdapter
from adapters.formats.artefact import TEMPERATURES, Artefact
from adapters.registry.manager import Manager
from adapters.registry.record import Content
from server.adapting.loader import EngineLoader
from server.operation.auth import access
from steering.adapters import Chosen
from steering.plan import AdapterUse

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class AdapterWish(BaseModel):
    """One adapter of a request."""

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


@dataclass(frozen=True)
class Picked:
    """An adapter that a request uses.

    Args:
        content: what the name stood for when the request came.
        artefact: its files.
        chosen: for the plan.
    """

    content: Content
    artefact: Artefact
    chosen: Chosen

    def describe(self, use: AdapterUse) -> dict[str, object]:
        """What a report says of it."""
        content = self.content
        found: dict[str, object] = {
            "name": content.name, "version": content.version, "digest": content.digest,
            "stream": content.stream, "weight": use.weight,
        }  # fmt: skip
        if self.artefact.gates:
            found |= {"top_k": use.top_k, "temperature": use.temperature}
        return found


def pick(
    model: str | None, wishes: Sequence[AdapterWish], manager: Manager, loader: EngineLoader
) -> list[Picked]:
    """The adapters that a request names.

    Args:
        model: the adapter that it names as its model, or None.
        wishes: its `adapters` field.
        manager: what the names stand for.
        loader: what is in their files.

    Raises:
        HttpError: 403, the key may not use one.
        NoAdapter: one is not ready here.
    """
    asked = [("model", "model", AdapterWish(name=model))] if model else []
    asked += [(f"adapters.{i}", f"adapters.{i}.name", wish) for i, wish in enumerate(wishes)]
    return [_pick(field, where, wish, manager, loader) for field, where, wish in asked]


def _pick(
    field: str, where: str, wish: AdapterWish, manager: Manager, loader: EngineLoader
) -> Picked:
    name, version = split(wish.name)
    access.get().check_adapter(name)
    try:
        content = manager.lookup(name, version).content
    except NoAdapter as error:
        raise NoAdapter(error.message, field=where, value=wish.name,
                        allowed=error.allowed) from error  # fmt: skip
    artefact = loader.artefact(content)
    assert content.digest is not None
    chosen = Chosen(artefact, content.digest, content.stream, wish.weight, wish.top_k,
                    wish.temperature, field)  # fmt: skip
    return Picked(content, artefact, chosen)


def split(model: str) -> tuple[str, str | None]:
    """(name, version) of `name` or `name@version`."""
    name, at, version = model.partition("@")
    return name, version if at else None
