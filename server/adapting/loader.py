"""Puts the registry's contents into the engine: checked first, taken out when unused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

from adapters.errors import DoesNotFit
from adapters.formats.artefact import Artefact
from adapters.formats.base import BaseShapes
from adapters.formats.inspect import elements, inspect
from adapters.formats.peft import CONFIG
from adapters.registry.record import Content, Facts
from adapters.sets import AdapterSet, Member
from server.adapting.checks import Target
from server.adapting.leases import Leases
from server.adapting.residency import Residency, Slots


class EngineLoader:
    """The registry's `Loader` for one engine; on its event loop.

    Args:
        engine: with LoRA on.
        targets: by stream.
        slots: sets that the engine holds at most.
        max_rank: rank indices of a set.
        max_bytes: of the sets in the engine, together.
        element_bytes: bytes of one number there.
    """

    def __init__(
        self,
        engine: Slots,
        targets: Mapping[str, Target],
        *,
        slots: int,
        max_rank: int,
        max_bytes: int,
        element_bytes: int,
    ) -> None:
        self.targets, self.max_rank = targets, max_rank
        self.leases = Leases()
        self.residency = Residency(
            engine, slots=slots, max_bytes=max_bytes, bytes_of=self._bytes, pinned=self._is_pinned
        )
        self.pinned: frozenset[str] = frozenset()
        """Digests of the adapters that are pinned."""
        self._element_bytes = element_bytes
        self._artefacts: dict[tuple[str, str | None], Artefact] = {}
        self._sizes: dict[str, int] = {}
        self._names: dict[tuple[str, str | None], set[str]] = {}

    async def load(self, content: Content, folder: Path) -> Facts:
        """Checks a content against its stream's model and brings it into the engine.

        Raises:
            BadAdapter: it is no adapter that can be served.
            DoesNotFit: it does not fit the model, or this server's room; or there is no such
                stream.
            NoRoom: everything in the engine is pinned.
        """
        assert content.digest is not None
        target = self.targets.get(content.stream)
        if target is None:
            raise DoesNotFit("this server has no such stream", field="stream",
                             value=content.stream, allowed=", ".join(self.targets))  # fmt: skip
        artefact, size, base = await asyncio.to_thread(_look, folder, target.shapes, self.max_rank)
        self._sizes[content.digest] = size
        self.residency.check(size * self._element_bytes, "size")
        await self.residency.admit(self._alone(content, artefact))
        self._artefacts[content.key] = artefact
        self._names.setdefault(content.key, set()).add(content.name)
        return Facts(artefact.kind, base, size * self._element_bytes)

    async def unload(self, content: Content) -> None:
        """Gives the memory back once the requests that run on a content are done."""
        names = self._names.get(content.key, set())
        names.discard(content.name)
        if names or content.digest is None:
            return  # the same bytes answer under another name too
        await self.leases.free(content.digest)
        if not self._names.get(content.key):
            self._names.pop(content.key, None)
            self._artefacts.pop(content.key, None)
            if not any(digest == content.digest for _, digest in self._names):
                await self.residency.remove(content.digest)
                self._sizes.pop(content.digest, None)

    def artefact(self, content: Content) -> Artefact:
        """What was found in a content that is loaded."""
        return self._artefacts[content.key]

    def resident(self, content: Content) -> bool:
        """Whether the engine holds a content now, for requests that name it alone."""
        artefact = self._artefacts.get(content.key)
        return artefact is not None and self._alone(content, artefact) in self.residency.held

    async def admit(self, content: Content) -> None:
        """Brings a loaded content back into the engine."""
        await self.residency.admit(self._alone(content, self._artefacts[content.key]))

    def _alone(self, content: Content, artefact: Artefact) -> AdapterSet:
        """The set of requests that name this content only."""
        assert content.digest is not None
        owner = self.targets[content.stream].owner
        return AdapterSet.of([Member.of(artefact, content.digest, owner)])

    def _bytes(self, found: AdapterSet) -> int:
        return sum(self._sizes[member.digest] for member in found.members) * self._element_bytes

    def _is_pinned(self, found: AdapterSet) -> bool:
        return len(found.members) == 1 and found.members[0].digest in self.pinned


def _look(folder: Path, shapes: BaseShapes, max_rank: int) -> tuple[Artefact, int, str]:
    """What is in a folder, its numbers, and the model that it says it was made for."""
    artefact = inspect(folder, shapes, max_rank=max_rank)
    base = ""
    if CONFIG in artefact.files:
        said = json.loads((folder / CONFIG).read_bytes()).get("base_model_name_or_path")
        base = said if isinstance(said, str) else ""
    return artefact, elements(artefact), base
