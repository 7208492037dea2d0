"""Fetches one adapter from its source into the store: every byte counted, nothing trusted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from adapters.errors import BadAdapter, BadSource, SourceAway, StoreFull, TooLarge
from adapters.formats import meteora, peft, vectors
from adapters.formats.config import read_object
from adapters.formats.control_vector import MAX_BYTES as MOST_OF_GGUF
from adapters.formats.inspect import read_artefact
from adapters.sources.local import LocalFolder
from adapters.sources.origin import (
    HEAD,
    AbsentError,
    Clock,
    Limits,
    Opened,
    Origin,
    check_beginning,
    persistently,
)
from adapters.sources.source import CONVERT, Allowed, Source
from adapters.sources.store import ContentStore, room

_MAX_CONFIG = 1 << 20
"""Bytes of a JSON file."""

_BARE = (vectors.TENSORS, vectors.GGUF)
"""Files that are an adapter by themselves."""

_CONFIGS = (peft.CONFIG, meteora.CONFIG, vectors.CONFIG, *_BARE)

_TASK = re.compile(r"\w[\w.-]{0,99}")

Report = Callable[[int], None]
"""Called with the bytes fetched so far, often; ends the fetch by raising."""


@dataclass(frozen=True)
class Fetched:
    """An adapter in the store.

    Args:
        digest: hex SHA-256 of its files.
        folder: where they are, read-only.
        kind: `lora`, `dora`, … or `meteora` (`adapters.formats.artefact.Kind`).
        size_bytes: of all its files.
    """

    digest: str
    folder: Path
    kind: str
    size_bytes: int


@dataclass(frozen=True)
class Fetcher:
    """Blocking; may be used by several threads.

    Args:
        store: where adapters end up.
        allowed: the operator's places.
        limits: sizes and times.
        s3_endpoint: URL of an S3-compatible server; None: AWS.
        s3_anonymous: whether buckets are public.
        hub_endpoint: URL of another hub; None: huggingface.co.
    """

    store: ContentStore
    allowed: Allowed
    limits: Limits = field(default_factory=Limits)
    s3_endpoint: str | None = None
    s3_anonymous: bool = False
    hub_endpoint: str | None = None

    def fetch(self, source: Source, report: Report = lambda done: None) -> Fetched:
        """The adapter, whole and checked in form, in the store.

        Raises:
            BadSource: the source is not allowed, or leads out of what is.
            BadAdapter: no adapter, a pickle, an archive, broken tensors, too large (`TooLarge`).
            SourceAway: it did not answer in time, also when asked again.
            StoreFull: no room; the store is as it was.
        """
        self.allowed.check(source)
        clock = Clock.start(self.limits)
        with self.store.staging() as folder:
            origin = self._reach(source, clock)
            try:
                work = _Transfer(origin, folder, self.store.root, self.limits, clock, report)
                size = work.one(source.file) if source.file else work.run()
            finally:
                origin.close()
            kind = read_artefact(folder).kind
            digest, path = self.store.keep(folder)
        return Fetched(digest, path, kind, size)

    def present(self, source: Source) -> bool:
        """Whether a place has an adapter: its config, or its one file of vectors.

        Raises:
            BadSource: the source is not allowed.
            SourceAway: it did not answer.
        """
        self.allowed.check(source)
        try:
            origin = self._reach(source, Clock.start(self.limits))
            try:
                names = (source.file,) if source.file else _CONFIGS
                return any(_opens(origin, name) for name in names)
            finally:
                origin.close()
        except BadSource:
            return False  # no such folder or repository, or it is not ours to read

    def _reach(self, source: Source, clock: Clock) -> Origin:
        origins: list[Origin] = []
        persistently(lambda: origins.append(self._origin(source)), self.limits.tries, clock)
        return origins[0]

    def _origin(self, source: Source) -> Origin:
        # Imported when needed: the two libraries are slow to import and most servers use neither.
        match source.kind:
            case "local":
                return LocalFolder(source, self.allowed.roots)
            case "web":
                from adapters.sources.web import WebFolder

                return WebFolder(source, self.limits)
            case "s3":
                from adapters.sources.remote import Bucket

                return Bucket(source, self.limits, endpoint=self.s3_endpoint,
                              anonymous=self.s3_anonymous)  # fmt: skip
            case "hub":
                from adapters.sources.remote import HubFolder

                return HubFolder(source, self.limits, endpoint=self.hub_endpoint)


def _opens(origin: Origin, name: str) -> bool:
    try:
        with origin.open(name):
            return True
    except AbsentError:
        return False


class _Transfer:
    """One fetch: which files, and their bytes. Lives in one thread."""

    def __init__(
        self, origin: Origin, folder: Path, store: Path, limits: Limits, clock: Clock,
        report: Report,
    ) -> None:  # fmt: skip
        self._origin, self._folder, self._store, self._limits = origin, folder, store, limits
        self._clock, self._report = clock, report
        self._done = 0

    def run(self) -> int:
        """Fetches all files; their bytes."""
        if self._optional(meteora.CONFIG):
            names = self._pack(json.loads((self._folder / meteora.CONFIG).read_bytes()))
        elif self._optional(peft.CONFIG):
            names = self._weights()
        elif self._optional(vectors.CONFIG):
            names = [vectors.TENSORS]
        elif any(self._optional(name) for name in _BARE):
            names = []
        else:
            self._refuse_pyreft()
            allowed = f"a folder with {', '.join(_CONFIGS)}"
            raise BadAdapter("no adapter here", field="source", allowed=allowed)
        for name in names:
            if not (self._folder / name).is_file():
                self._needed(name)
        return self._done

    def one(self, name: str) -> int:
        """Fetches the one file of vectors, under the name that our format has for it; its bytes."""
        stored = vectors.GGUF if name.lower().endswith(".gguf") else vectors.TENSORS

        def fetch() -> None:
            self._file(name, stored)

        try:
            persistently(fetch, self._limits.tries, self._clock)
        except AbsentError:
            raise BadAdapter("the file is missing", field=name) from None
        return self._done

    def _refuse_pyreft(self) -> None:
        """Names the converter where a folder is pyreft's, whose weights are pickles."""
        if self._optional("config.json"):
            config = read_object(self._folder / "config.json")
            if "intervention_types" in config:
                raise BadAdapter("a folder of pyreft, whose weights are pickles, which can run "
                                 f"code when loaded; {CONVERT}", field="config.json")  # fmt: skip

    def _weights(self) -> list[str]:
        """The other files of a PEFT adapter: one, or those of an index."""
        if self._optional(peft.WEIGHTS) or not self._optional(peft.INDEX):
            return [peft.WEIGHTS]
        names = list(peft.shards(self._folder))
        if len(names) + 2 > self._limits.max_files:
            raise TooLarge("too many files", field=peft.INDEX,
                           allowed=f"at most {self._limits.max_files} files")  # fmt: skip
        return names

    def _pack(self, config: object) -> list[str]:
        """The other files of a MeteoRA pack; the format's own reader checks the rest later."""
        if not isinstance(config, dict) or config.get("layout") != "native":
            return [meteora.RELEASED]
        tasks = config.get("tasks")
        if not isinstance(tasks, list) or 2 * len(tasks) + 2 > self._limits.max_files:
            raise TooLarge("tasks is no list, or too long a one", field=meteora.CONFIG,
                           allowed=f"at most {self._limits.max_files} files")  # fmt: skip
        for task in tasks:
            if not isinstance(task, str) or not _TASK.fullmatch(task):
                raise BadAdapter("not the name of a folder", field=f"{meteora.CONFIG}: tasks",
                                 value=task)  # fmt: skip
        parts = (peft.CONFIG, peft.WEIGHTS)
        return [meteora.GATES, *(f"{task}/{part}" for task in tasks for part in parts)]

    def _optional(self, name: str) -> bool:
        try:
            persistently(lambda: self._file(name), self._limits.tries, self._clock)
        except AbsentError:
            return False
        return True

    def _needed(self, name: str) -> None:
        if self._optional(name):
            return
        if name.endswith(peft.WEIGHTS) and self._has(name.replace(".safetensors", ".bin")):
            raise BadAdapter("the weights are a pickle (.bin), which can run code when loaded; "
                             "convert them to safetensors", field=name)  # fmt: skip
        raise BadAdapter("the file is missing", field=name)

    def _has(self, name: str) -> bool:
        try:
            with self._origin.open(name):
                return True
        except (AbsentError, SourceAway):
            return False

    def _file(self, name: str, stored: str | None = None) -> None:
        """Fetches a file, and stores it under its own name or another one."""
        path = self._folder / (stored or name)
        by_kind = {".safetensors": self._limits.max_file_bytes, ".gguf": MOST_OF_GGUF}
        most = min(by_kind.get(path.suffix, _MAX_CONFIG), self._limits.max_file_bytes,
                   self._limits.max_bytes - self._done)  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        before = self._done
        try:
            with self._origin.open(name) as opened:
                if opened.size is not None:
                    self._refuse_size(name, opened.size, most)
                with room(self._store), path.open("wb") as file:
                    count = self._copy(name, opened, file, most)
                if opened.size not in (None, count):
                    raise SourceAway(f"broke off after {count} of {opened.size} bytes", field=name)
        except BaseException:
            self._done = before
            path.unlink(missing_ok=True)
            raise
        if name.endswith(".json"):
            read_object(path)

    def _refuse_size(self, name: str, size: int, most: int) -> None:
        if size > most:
            raise TooLarge("the file is too large", field=name, value=size,
                           allowed=f"at most {most} bytes")  # fmt: skip
        free = shutil.disk_usage(self._folder).free
        if size > free:
            raise StoreFull(f"the store {self._store} has no room: {free} bytes are free, {name} "
                            f"has {size}", field="adapters.store")  # fmt: skip

    def _copy(self, name: str, opened: Opened, file: BinaryIO, most: int) -> int:
        count, head = 0, b""
        for chunk in opened.chunks:
            self._clock.check()
            if len(head) < HEAD:
                head = (head + chunk)[:HEAD]
                if len(head) == HEAD:
                    check_beginning(name, head)
            count += len(chunk)
            if count > most:
                raise TooLarge("the file is too large", field=name,
                               allowed=f"at most {most} bytes")  # fmt: skip
            file.write(chunk)
            self._done += len(chunk)
            self._report(self._done)
        check_beginning(name, head)
        return count
