"""The adapters that a request names, resolved on this server."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from adapters.errors import AdapterError, NoAdapter
from adapters.registry.manager import Manager, no_adapter
from server.access import Access
from server.adapting.loader import EngineLoader
from steering.adapter_ref import AdapterRef
from steering.adapters import ResolvedAdapter
from steering.errors import BadValue
from steering.where import read_where


def resolve_adapters(
    model: str | None,
    refs: Sequence[AdapterRef],
    access: Access,
    manager: Manager,
    loader: EngineLoader,
    profile: Sequence[tuple[str, AdapterRef]] = (),
) -> list[ResolvedAdapter]:
    """The adapters that a request names, and those that its profile brings.

    Args:
        model: the adapter that it names as its model, or None.
        refs: its `adapters` field.
        access: what its key may use.
        manager: what the names stand for.
        loader: what is in their files.
        profile: where the profile names each, and how; its keys may use them by no other way.

    Raises:
        AdapterError: one is not ready here, or not for this key.
    """
    anyone, brought = replace(access, adapters=None), []
    for field, ref in profile:
        try:
            brought.append(_resolve(field, field, ref, anyone, manager, loader))
        except AdapterError as error:
            # The caller may not know its name.
            why = "an adapter of this profile is not ready here, or not for this key"
            raise type(error)(why, field=field) from error
    entries = [("model", "model", AdapterRef(name=model))] if model else []
    entries += [(f"adapters.{i}", f"adapters.{i}.name", ref) for i, ref in enumerate(refs)]
    named = [_resolve(field, where, ref, access, manager, loader) for field, where, ref in entries]
    return [*brought, *named]


def _resolve(
    field: str, where: str, ref: AdapterRef, access: Access, manager: Manager, loader: EngineLoader
) -> ResolvedAdapter:
    name, version = split(ref.name)
    try:
        if not sees(access, name, manager):
            raise no_adapter(name)
        content = manager.lookup(name, version).content
    except NoAdapter as error:
        raise NoAdapter(error.message, field=where, value=ref.name,
                        allowed=error.allowed) from error  # fmt: skip
    assert content.digest is not None
    place = None if ref.where is None else read_where(ref.where, f"{field}.where", BadValue)
    return ResolvedAdapter(
        loader.artefact(content), content.digest, content.stream, ref.weight, ref.top_k,
        ref.temperature, field, content.name, content.version, place,
    )  # fmt: skip


def owners_of(name: str, manager: Manager) -> list[Collection[str]]:
    """The groups that an adapter is private to: for what was asked for last, what serves, and what
    answers here. While it changes hands, who is in one of them only does not see it.
    """
    record, here = manager.records.get(name), manager.loaded.get(name)
    contents = [record.want, record.serving] if record is not None else []
    contents.append(here.content if here is not None else None)
    return [content.visible_to for content in contents if content is not None]


def sees(access: Access, name: str, manager: Manager) -> bool:
    """Whether a key may see an adapter."""
    return access.sees_adapter(name, owners_of(name, manager))


def split(model: str) -> tuple[str, str | None]:
    """(name, version) of `name` or `name@version`."""
    name, at, version = model.partition("@")
    return name, version if at else None
