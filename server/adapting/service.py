"""The adapters of a running server: opened with the engine, closed before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from adapters.errors import AdapterError, BadSource, Conflict, NoAdapter, kind_of
from adapters.registry.manager import Manager
from adapters.registry.record import Content, Record, State
from adapters.sets import AdapterSet
from server.access import Access
from server.adapting.loader import EngineLoader
from server.adapting.on_request import LoadOnRequest
from server.adapting.registry import registry_of
from server.adapting.resolve import owners_of, resolve_adapters, sees, split
from server.operation.auth import groups_of
from server.settings.config import AdaptersConfig, Config
from steering.adapter_ref import AdapterRef
from steering.adapters import ResolvedAdapter, adapt
from steering.plan import SteeringPlan

LOOK_S = 0.1
"""How often a start looks whether its adapters are there."""


PINS_S = 1.0
"""How often it is seen to that pinned adapters are in the engine."""


class PreloadFailed(Exception):
    """Adapters of the configuration that cannot be served; one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Adapters:
    """The operations on adapters for routes.

    Args:
        manager: the registry's side.
        loader: the engine's side.
        max_rank: rank indices of a request's adapters together.
        reserved: names of models that adapters must not have; asked at each request.
        groups: of this server's API keys.
        on_request: loads what requests name; None: nothing is loaded so.
    """

    manager: Manager
    loader: EngineLoader
    max_rank: int
    reserved: Callable[[], frozenset[str]]
    groups: frozenset[str] = frozenset()
    on_request: LoadOnRequest | None = None

    def names(self, access: Access | None = None) -> list[str]:
        """Adapters that answer here, sorted.

        Args:
            access: of a key that sees only some; None: all.
        """
        loaded = sorted(self.manager.loaded)
        return loaded if access is None else [n for n in loaded if sees(access, n, self.manager)]

    def known(self, model: str, access: Access | None = None) -> bool:
        """Whether a request's `model` names an adapter, ready or not; see `names`."""
        name = split(model)[0]
        return name in self.manager.records and (access is None or sees(access, name, self.manager))

    def private(self, name: str) -> bool:
        """Whether an adapter is private to some groups, so that others must not hear of it."""
        return any(owners_of(name, self.manager))

    async def load_missing(
        self, model: str | None, refs: Sequence[AdapterRef], access: Access
    ) -> None:
        """Has adapters loaded that a request names and that no one has registered, as far as the
        configuration says so and the key may use them; waits until they answer.

        Args:
            model: its `model`, unless that is the base or a profile.
            refs: its `adapters` field.
            access: what its key may use.

        Raises:
            AdapterError: one cannot be had, or not in time.
        """
        if self.on_request is None:
            return
        entries = [("model", model)] if model else []
        entries += [(f"adapters.{i}.name", ref.name) for i, ref in enumerate(refs)]
        await self._load_entries(entries, access)

    async def load_profile(self, profile: Sequence[tuple[str, AdapterRef]], access: Access) -> None:
        """As `load_missing`, for what a request's profile brings.

        Raises:
            AdapterError: as there.
        """
        anyone = replace(access, adapters=None)
        for field, ref in profile if self.on_request is not None else ():
            try:
                await self._load_entries([(field, ref.name)], anyone)
            except AdapterError as error:  # the caller may not know its name
                why = "an adapter of this profile could not be loaded"
                raise type(error)(why, field=field) from error

    async def _load_entries(self, entries: Sequence[tuple[str, str]], access: Access) -> None:
        assert self.on_request is not None
        for field, text in entries:
            name, _ = split(text)
            known = name in self.manager.loaded or name in self.reserved()
            if not known and access.sees_adapter(name, owners_of(name, self.manager)):
                await self.on_request.load(name, field)

    def resolve(
        self,
        plan: SteeringPlan,
        model: str | None,
        refs: Sequence[AdapterRef],
        weight: tuple[float, float],
        access: Access,
        held: ExitStack,
        profile: Sequence[tuple[str, AdapterRef]] = (),
    ) -> tuple[SteeringPlan, AdapterSet | None, list[ResolvedAdapter]]:
        """Puts a request's adapters into its plan; they stay loaded until `held` is closed.

        Raises:
            NoAdapter: one is not ready here, or not for this key.
            SteeringError: a number is out of range, or they do not go together.
        """
        resolved = resolve_adapters(model, refs, access, self.manager, self.loader, profile)
        owners = {name: target.owner for name, target in self.loader.targets.items()}
        plan, adapter_set = adapt(plan, resolved, owners, weight=weight, max_rank=self.max_rank)
        if adapter_set is not None:
            held.enter_context(self.loader.leases.lease(m.digest for m in adapter_set.members))
        return plan, adapter_set, resolved

    # The admin API.

    async def submit(
        self,
        name: str,
        source: str,
        *,
        version: str,
        stream: str,
        replace: bool,
        pin: bool,
        by: str,
        visible_to: Sequence[str] | None = None,
    ) -> Record:
        """Asks for an adapter; its record goes to ready or failed.

        Args:
            name: what requests call it.
            source: where it comes from.
            version: a label.
            stream: the stream that it changes.
            replace: replace what has this name.
            pin: never evict it.
            by: who asks.
            visible_to: the groups of API keys that it is private to, empty: none; None: as what
                has this name now, so that a replacement makes nothing public.

        Raises:
            AdapterError: the name, the source, the stream or a group cannot be used.
        """
        if name in self.reserved():
            raise Conflict("the name is taken by the base or by a profile", field="name",
                           value=name)  # fmt: skip
        if stream not in self.loader.targets:
            raise NoAdapter("no such stream", field="stream", value=stream,
                            allowed=", ".join(self.loader.targets))  # fmt: skip
        if visible_to is None:
            visible_to = await self._visible_to(name)
        else:
            self._check_groups(visible_to)
        return await self.manager.submit(name, source, version=version, stream=stream,
                                         replace=replace, pin=pin, by=by,
                                         visible_to=tuple(sorted(set(visible_to))),
                                         most_pins=self.most_pins)  # fmt: skip

    async def _visible_to(self, name: str) -> Sequence[str]:
        """Whom what has this name now is private to, by the registry and not by this view of it."""
        try:
            return (await self.manager.registry.get(name)).want.visible_to
        except NoAdapter:
            return ()

    def _check_groups(self, visible_to: Sequence[str]) -> None:
        """Raises BadSource: no key of this server would see the adapter."""
        for i, group in enumerate(visible_to):
            if group not in self.groups:
                raise BadSource("no API key of this server is in this group",
                                field=f"visible_to.{i}", value=group,
                                allowed=", ".join(sorted(self.groups)) or "(no keys)")  # fmt: skip

    async def pin(self, name: str, pinned: bool) -> Record:
        """Pins or unpins; a pinned adapter is brought into the engine at once.

        Raises:
            NoAdapter: there is none.
            Conflict: too many are pinned.
        """
        record = await self.manager.registry.pin(name, pinned, most=self.most_pins)
        await self.manager.look()
        loaded = self.manager.loaded.get(name)
        if pinned and loaded is not None:
            await self.loader.admit(loaded.content)
        return record

    @property
    def most_pins(self) -> int:
        """One slot stays free for everything that is not pinned."""
        return self.loader.residency.slots - 1

    def pinned(self) -> frozenset[str]:
        """Digests of the contents that are never evicted."""
        records = [self.manager.records[name] for name in self.manager.feed.pinned]
        contents = [record.serving for record in records if record.serving is not None]
        return frozenset(content.digest for content in contents if content.digest)

    def missing(self) -> list[str]:
        """Adapters that serve elsewhere, or did before, and are neither loaded nor failed here."""
        manager = self.manager
        names = []
        for name in manager.unsettled:
            record = manager.records.get(name)
            if record is None or record.serving is None or record.state == "unloading":
                continue
            here = manager.loaded.get(name)
            same = here is not None and here.content.key == record.serving.key
            if not same and manager.failure(name) is None:
                names.append(name)
        return names

    async def until(self, name: str) -> Record:
        """Waits until a submitted adapter answers here, or failed.

        Returns:
            Its record; the state is `ready` or `failed`.

        Raises:
            NoAdapter: it was unloaded meanwhile.
        """
        while True:
            record = self.manager.records.get(name)
            if record is None or record.state == "unloading":
                raise NoAdapter("unloaded meanwhile", field="name", value=name)
            if record.state == "failed" or self.manager.failure(name) is not None:
                return record
            here = self.manager.loaded.get(name)
            serving = record.serving
            if record.state == "ready" and here and serving and here.content.key == serving.key:
                return record
            await asyncio.sleep(LOOK_S)


def failed(record: Record, adapters: Adapters) -> AdapterError | None:
    """Why an adapter that `until` has waited for does not answer; None if it does."""
    if record.reason is not None:
        return kind_of(record.error or "")(record.reason)
    return adapters.manager.failure(record.name)


def described(record: Record, adapters: Adapters, progress_bytes: int = 0) -> dict[str, Any]:
    """A record as the admin API shows it.

    Args:
        record: the adapter's.
        adapters: how this replica stands to it.
        progress_bytes: fetched so far (`Manager.progress`).
    """
    manager, want = adapters.manager, record.want
    here = manager.loaded.get(record.name)
    facts, failure = want.facts, manager.failure(record.name)
    return {
        "name": record.name,
        "version": want.version,
        "source": want.source,
        "stream": want.stream,
        "state": _state(record, adapters),
        "reason": record.reason,
        "fault": kind_of(record.error).whose if record.error else None,
        "digest": want.digest,
        "kind": facts.kind if facts else None,
        "base": facts.base or None if facts else None,
        "warnings": list(facts.warnings) if facts else [],
        "size_bytes": facts.size_bytes if facts else None,
        "progress_bytes": progress_bytes,
        "pinned": record.pinned,
        "visible_to": list(want.visible_to),
        "loaded_by": record.loaded_by or None,
        "created": record.created_s,
        "changed": record.changed_s,
        "serving": _serving(record.serving),
        "here": {
            "version": here.content.version if here else None,
            "resident": adapters.loader.resident(here.content) if here else False,
            "failure": str(failure) if failure else None,
            "fault": failure.whose if failure else None,
        },
    }


def _state(record: Record, adapters: Adapters) -> State:
    """The record's state. What this replica has loaded is ready when requests here get it, a moment
    after the registry knows.
    """
    manager, want = adapters.manager, record.serving
    here = manager.loaded.get(record.name)
    switched = here is not None and want is not None and here.content.key == want.key
    mine = record.owner == manager.registry.replica
    if record.state == "ready" and mine and not switched and not manager.failure(record.name):
        return "loading"
    return record.state


def _serving(content: Content | None) -> dict[str, Any] | None:
    if content is None:
        return None
    return {"version": content.version, "digest": content.digest, "source": content.source}


@asynccontextmanager
async def opened(
    config: Config,
    loader: EngineLoader,
    reserved: Callable[[], frozenset[str]],
    stage: Callable[[str], None],
) -> AsyncIterator[Adapters]:
    """The adapters, once all that were ready before answer again, and those of the configuration.

    Raises:
        PreloadFailed: one of the configuration's cannot be served.
        RegistryAway: Redis does not answer.
    """
    section = config.adapters
    assert section is not None
    stage("opening the adapter registry")
    async with registry_of(config, loader) as manager:
        on_request = LoadOnRequest(manager, section) if section.load_on_request else None
        adapters = Adapters(
            manager, loader, section.max_rank, reserved, groups_of(config), on_request
        )
        loader.pinned, loader.mend = adapters.pinned, manager.mend
        keeping = asyncio.create_task(_keep_pinned(adapters))
        try:
            await manager.look()
            await _preload(section, adapters)
            await _settled(adapters, stage)
            yield adapters
        finally:
            keeping.cancel()


async def _keep_pinned(adapters: Adapters) -> None:
    """Pinned adapters are in the engine: also those that another replica pinned or replaced."""
    while True:
        await asyncio.sleep(PINS_S)
        for name in list(adapters.manager.feed.pinned):
            loaded = adapters.manager.loaded.get(name)
            if loaded is None or adapters.loader.resident(loaded.content):
                continue
            # Without room, or unloaded meanwhile: the next look finds it again, or no more.
            with contextlib.suppress(AdapterError, KeyError):
                await adapters.loader.admit(loaded.content)


async def _preload(section: AdaptersConfig, adapters: Adapters) -> None:
    """Asks for the configuration's adapters; what is registered otherwise is replaced."""
    problems = []
    for i, entry in enumerate(section.preload):
        options: Mapping[str, Any] = {"version": entry.version, "stream": entry.stream,
                                      "pin": entry.pin, "by": "the configuration",
                                      "visible_to": entry.visible_to}  # fmt: skip
        try:
            try:
                await adapters.submit(entry.name, entry.source, replace=False, **options)
            except Conflict:
                await adapters.submit(entry.name, entry.source, replace=True, **options)
        except AdapterError as error:
            problems.append(f"adapters.preload.{i} ({entry.name}): {error}")
    if problems:
        raise PreloadFailed(problems)
    for i, entry in enumerate(section.preload):
        record = await adapters.until(entry.name)
        why = failed(record, adapters)
        if why is not None:
            problems.append(f"adapters.preload.{i} ({entry.name}): {why}")
    if problems:
        raise PreloadFailed(problems)


async def _settled(adapters: Adapters, stage: Callable[[str], None]) -> None:
    """Waits until everything that serves elsewhere, or did before, is loaded or has failed here."""
    last_text = ""
    while True:
        missing = adapters.missing()
        if not missing:
            return
        here = len(adapters.manager.loaded)
        text = f"loading adapters: {here} of {here + len(missing)}"
        if text != last_text:
            stage(last_text := text)
        await asyncio.sleep(LOOK_S)
