"""Puts the registry's contents into the engine: checked first, taken out when unused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from adapters.errors import DoesNotFit
from adapters.formats.artefact import Artefact
from adapters.formats.base import BaseShapes
from adapters.formats.inspect import elements, inspect
from adapters.formats.peft import CONFIG
from adapters.registry.record import Content, Facts
from adapters.sets import AdapterSet, Member
from server.adapting.leases import Leases
from server.adapting.residency import Residency, Slots
from server.checks.adapters import Target


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
        self._engine = engine
        self.residency = Residency(
            self, slots=slots, max_bytes=max_bytes, bytes_of=self._bytes, pinned=self._is_pinned
        )
        self.pinned: Callable[[], frozenset[str]] = frozenset
        """Gives the digests of the adapters that are pinned."""
        self.mend: Callable[[str], Awaitable[None]] = _trust
        """Sees to it that the files of a digest are whole, or raises AdapterError."""
        self._element_bytes = element_bytes
        self._artefacts: dict[tuple[str, str | None], Artefact] = {}
        self._sizes: dict[str, int] = {}
        self._names: dict[tuple[str, str | None], set[str]] = {}

    async def load(self, content: Content, folder: Path, *, now: bool = True) -> Facts:
        """Checks a content against its stream's model, and brings it into the engine: `now`, or if
        there is room to spare.

        Raises:
            BadAdapter: it is no adapter that can be served.
            DoesNotFit: it does not fit the model, or this server's room; or there is no such
                stream.
            ServerFault: the engine has no room, or failed; nothing of it is left there.
        """
        assert content.digest is not None
        target = self.targets.get(content.stream)
        if target is None:
            raise DoesNotFit("this server has no such stream", field="stream",
                             value=content.stream, allowed=", ".join(self.targets))  # fmt: skip
        artefact, size, bases = await asyncio.to_thread(
            _look, folder, target.shapes, self.max_rank, now
        )
        names = self._names.setdefault(content.key, set())
        names.add(content.name)  # an unload of the same bytes, under any name, leaves them now
        self._artefacts[content.key], self._sizes[content.digest] = artefact, size
        try:
            self.residency.check(size * self._element_bytes, "size")
            if now or self.residency.spare(self._alone(content, artefact)):
                await self.admit(content)
        except BaseException:
            names.discard(content.name)
            if not self.leases.used(content.digest) and self._forget(content):
                self.residency.drop(content.digest)  # the engine may be at it, or be done
            raise  # if it is used, an unload that waits forgets it
        texts = {target.warning(base): None for base in bases}
        warnings = tuple(text for text in texts if text is not None)
        base = bases[0] if bases else ""
        return Facts(artefact.kind, base, size * self._element_bytes, warnings)

    async def unload(self, content: Content) -> None:
        """Gives the memory back once the requests that run on a content are done."""
        assert content.digest is not None
        self._names.get(content.key, set()).discard(content.name)
        if self._names.get(content.key):
            return  # the same bytes answer under another name too
        await self.leases.free(content.digest)
        if self._forget(content):
            await self.residency.remove(content.digest)

    def _forget(self, content: Content) -> bool:
        """Whether a content's bytes are used under no name any more; then nothing knows them."""
        if self._names.get(content.key):
            return False
        self._names.pop(content.key, None)
        self._artefacts.pop(content.key, None)
        if any(digest == content.digest for _, digest in self._names):
            return False
        self._sizes.pop(content.digest or "", None)
        return True

    # What the residency loads and unloads. The engine reads the files each time a set comes, maybe
    # weeks after they were checked: what was changed since must not answer.

    async def load_set(self, adapter_set: AdapterSet) -> None:
        """Brings a set whose files are whole into the engine."""
        for member in adapter_set.members:
            await self.mend(member.digest)
        await self._engine.load_set(adapter_set)

    async def unload_set(self, adapter_set: AdapterSet) -> None:
        """Takes one out."""
        await self._engine.unload_set(adapter_set)

    def artefact(self, content: Content) -> Artefact:
        """The description of a loaded content."""
        return self._artefacts[content.key]

    def resident(self, content: Content) -> bool:
        """Whether the engine holds a content now, for requests that name it alone."""
        owner = self.targets[content.stream].owner if content.stream in self.targets else None
        return content.key in self._artefacts and (owner, content.digest) in self.residency.alone

    async def admit(self, content: Content) -> None:
        """Brings a loaded content into the engine; it cannot be unloaded meanwhile."""
        assert content.digest is not None
        with self.leases.lease([content.digest]):
            await self.residency.admit(self._alone(content, self._artefacts[content.key]))

    def _alone(self, content: Content, artefact: Artefact) -> AdapterSet:
        """The set of requests that name this content only."""
        assert content.digest is not None
        owner = self.targets[content.stream].owner
        return AdapterSet.of([Member.of(artefact, content.digest, owner)])

    def _bytes(self, adapter_set: AdapterSet) -> int:
        return sum(self._sizes[m.digest] for m in adapter_set.members) * self._element_bytes

    def _is_pinned(self, adapter_set: AdapterSet) -> bool:
        return len(adapter_set.members) == 1 and adapter_set.members[0].digest in self.pinned()


async def _trust(digest: str) -> None:
    """Takes files for whole: where nobody knows better."""


def _look(
    folder: Path, shapes: BaseShapes, max_rank: int, values: bool
) -> tuple[Artefact, int, list[str]]:
    """What is in a folder, its numbers, and the models that it says it was made for."""
    artefact = inspect(folder, shapes, max_rank=max_rank, values=values)
    bases = []
    for file in artefact.files:
        if Path(file).name == CONFIG:
            base = json.loads((folder / file).read_bytes()).get("base_model_name_or_path")
            bases += [base] if isinstance(base, str) and base else []
    return artefact, elements(artefact), bases
