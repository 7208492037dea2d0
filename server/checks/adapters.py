"""Whether a configuration's adapters can be served; run before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.errors import AdapterError
from adapters.formats import vectors
from adapters.formats.base import BaseShapes, plain_shapes
from adapters.formats.inspect import inspect
from adapters.formats.peft import CONFIG
from adapters.registry.record import check_name, check_version
from adapters.sources.source import Allowed, Source, parse_source
from server.checks.diagnosis import Diagnosis
from server.settings.config import AdaptersConfig, Config, PreloadConfig
from steering.engine_args import slot_rank
from steering.plan import BASE


@dataclass(frozen=True)
class Target:
    """A stream that adapters may change.

    Args:
        owner: the stream whose weights it runs: itself, or the original of a twin.
        shapes: of those weights.
        names: what the model is called: where it was loaded from, as what it is served, and what
            its own configuration says.
    """

    owner: str
    shapes: BaseShapes
    names: tuple[str, ...] = ()

    def warning(self, base_model: str) -> str | None:
        """The warning for an adapter that was made for another model.

        Args:
            base_model: its `base_model_name_or_path`; may be empty.
        """
        names = {_called(name) for name in self.names if _called(name)}
        if not _called(base_model) or not names or _called(base_model) in names:
            return None
        return (f"made for {base_model}, says its {CONFIG}; here it changes {self.names[0]}, whose "
                "layers have the same shapes")  # fmt: skip


Layers = Mapping[str, Mapping[str, tuple[int, int]]]
"""Stream that owns its weights → module → (out, in), from an engine that is up."""


def targets(
    config: Config, diagnosis: Diagnosis, layers: Layers | None = None
) -> dict[str, Target]:
    """The streams that adapters may change. Reads the headers of the models' files.

    Args:
        config: the settings.
        diagnosis: of the models.
        layers: what the engine can adapt; None: no engine is up, so that only those layers are
            known whose weights are stored as they are.

    Raises:
        BadAdapter: a file is broken.
    """
    runs = {name: s for name, s in config.streams.items() if s.on is None}
    owners = {BASE: BASE} | {name: s.same_as or name for name, s in runs.items()}
    shapes, section = {}, config.adapters
    for owner in sorted(set(owners.values())):
        plain = plain_shapes(diagnosis.streams[owner].checkpoint.folder)
        shapes[owner] = replace(plain, vectors=section is not None and section.vectors)
        if layers is not None:
            shapes[owner] = replace(shapes[owner], layers=_pairs(layers[owner]), whole=True)
    names = {owner: _names(config, diagnosis, owner) for owner in shapes}
    return {name: Target(owner, shapes[owner], names[owner]) for name, owner in owners.items()}


def _names(config: Config, diagnosis: Diagnosis, owner: str) -> tuple[str, ...]:
    """What a stream's model is called."""
    source = config.model if owner == BASE else config.streams[owner].model
    folder = diagnosis.streams[owner].checkpoint.folder
    name_or_path = json.loads((folder / "config.json").read_bytes()).get("_name_or_path")
    served = config.name if owner == BASE else ""
    return tuple(
        name
        for name in (source, str(folder), served, name_or_path)
        if isinstance(name, str) and name
    )


def _called(name: str) -> str:
    """A model's own name, without where it lies: paths and organisations differ between machines.

    In the hub's cache it is part of a folder further up: `models--owner--name/snapshots/<hash>`.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    cached = next((part for part in parts if part.startswith("models--")), None)
    last = cached.rsplit("--", 1)[-1] if cached else parts[-1] if parts else ""
    return last.casefold()


def _pairs(layers: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """As they were before they came over the wire, where tuples become lists."""
    return {name: (out, into) for name, (out, into) in layers.items()}


def slot_bytes(
    config: Config, section: AdaptersConfig, shapes: list[BaseShapes], states: int = 0
) -> int:
    """Memory that the engine sets aside for adapters, used or not.

    Args:
        config: the settings.
        section: its adapters.
        shapes: of every model.
        states: the models' decoder layers times their widths, added up.
    """
    dtype = str(config.engine.get("dtype", "auto"))
    item = 4 if dtype in ("float32", "float") else 2
    sides = sum(
        sum(linear)
        for model in shapes
        for name in model.tensors
        if (linear := model.linear(name.removesuffix(".weight"))) is not None
    )
    sides += 2 * states if section.vectors else 0
    return sides * slot_rank(section.max_rank) * section.max_loaded * item


def adapter_problems(config: Config, section: AdaptersConfig, diagnosis: Diagnosis) -> list[str]:
    """The problems of the section `adapters`, one line each."""
    lines = [
        f"adapters.roots.{i}: no such directory: {root}"
        for i, root in enumerate(section.roots)
        if not Path(root).is_dir()
    ]
    streams: dict[str, Target] = {}
    # Without them: the weights are not here yet, or a stream is broken.
    with contextlib.suppress(AdapterError, KeyError):
        streams = targets(config, diagnosis)
    taken: dict[str, str] = {config.name: "the base", **dict.fromkeys(config.profiles, "a profile")}
    for i, preload in enumerate(section.preload):
        where = f"adapters.preload.{i}"
        if preload.name in taken:
            lines.append(f"{where}.name: taken by {taken[preload.name]} (got {preload.name!r})")
        taken[preload.name] = "another adapter"
        lines += [f"{where}.{line}" for line in _preload(section, preload, streams)]
    pins = sum(preload.pin for preload in section.preload)
    if pins >= section.max_loaded:
        lines.append(f"adapters.preload: {pins} are pinned; allowed: fewer than "
                     f"adapters.max_loaded, {section.max_loaded}")  # fmt: skip
    return lines


def _preload(
    section: AdaptersConfig, preload: PreloadConfig, streams: dict[str, Target]
) -> Iterator[str]:
    try:
        check_name(preload.name, "name")
        check_version(preload.version, "version")
        source = parse_source(preload.source)
        Allowed(tuple(map(Path, section.roots)), section.remotes).check(source)
    except AdapterError as error:
        yield str(error)
        return
    if not streams:
        return
    if preload.stream not in streams:
        yield f"stream: no such stream (got {preload.stream!r}); allowed: {', '.join(streams)}"
    elif source.kind == "local":
        try:
            with _folder_of(source) as folder:
                inspect(folder, streams[preload.stream].shapes, max_rank=section.max_rank)
        except AdapterError as error:
            yield f"source: {error}"
        except OSError as error:
            yield f"source: {error.strerror}: {preload.source}"


@contextlib.contextmanager
def _folder_of(source: Source) -> Iterator[Path]:
    """The folder of a local source; of a single file, one that has it under our format's name."""
    if not source.file:
        yield Path(source.place)
        return
    with tempfile.TemporaryDirectory() as folder:
        name = vectors.GGUF if source.file.lower().endswith(".gguf") else vectors.TENSORS
        shutil.copyfile(Path(source.place) / source.file, Path(folder) / name)
        yield Path(folder)
