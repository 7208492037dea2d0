"""Immutable folders, one per content: `<store>/<digest>/`, written elsewhere and renamed.

    <store>/<digest>/…      read-only; complete from the moment it is visible
    <store>/.tmp/<random>/  being written, with a lock that dies with its process

Any number of processes and machines may share a store on one file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import BadAdapter, StoreFull

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ContentStore:
    """The folders. Blocking calls; safe from several threads and processes.

    Args:
        root: made with mode 0700 if missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._tmp = self.root / ".tmp"
        self._tmp.mkdir(mode=0o700, parents=True, exist_ok=True)

    def folder(self, digest: str) -> Path | None:
        """The folder of a content, None if it is not here."""
        assert _DIGEST.fullmatch(digest), digest
        path = self.root / digest
        return path if path.is_dir() else None

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder to write into; gone afterwards unless `keep` took it.

        Raises:
            StoreFull: the disk became full, here or in the body.
        """
        work = self._tmp / secrets.token_hex(8)
        with room(self.root):
            work.mkdir(mode=0o700)
            lock = os.open(work / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (work / "files").mkdir()
            with room(self.root):
                yield work / "files"
        finally:
            _remove(work)
            os.close(lock)

    def keep(self, staged: Path) -> tuple[str, Path]:
        """Makes a staged folder visible under its digest; (digest, folder).

        The same content from elsewhere may be there already: then that is used, once its bytes
        have been read and found whole.
        """
        digest = digest_of(staged)
        target = self.root / digest
        with room(self.root):
            _settle(staged)
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            self.verify(digest)
        target.chmod(0o555)
        # Also an old folder found again is new: `collect` must not take it now.
        with contextlib.suppress(OSError):
            os.utime(target)
        _sync(self.root)
        return digest, target

    def verify(self, digest: str) -> Path:
        """The folder, its bytes read and found to be what the digest says.

        Raises:
            BadAdapter: it is missing, or was changed; then it is taken out of the store.
        """
        path = self.folder(digest)
        if path is None:
            raise BadAdapter("this content is not in the store", field=digest)
        actual = ""
        with contextlib.suppress(OSError):  # unreadable; or another takes it out just now
            actual = digest_of(path)
        if actual != digest:
            with contextlib.suppress(FileNotFoundError):
                self._discard(path)
            raise BadAdapter("the stored files were changed; they are taken out", field=digest)
        return path

    def digests(self) -> frozenset[str]:
        """All contents that are here."""
        return frozenset(e.name for e in os.scandir(self.root) if _DIGEST.fullmatch(e.name))

    def collect(self, used: Iterable[str], *, older_than_s: float = 3600.0) -> list[str]:
        """Deletes unused contents.

        Args:
            used: digests that records refer to or that are loaded.
            older_than_s: younger ones stay: a record may be about to refer to them.

        Returns:
            What was deleted.
        """
        deadline = time.time() - older_than_s
        gone = []
        for digest in sorted(self.digests() - frozenset(used)):
            path = self.root / digest
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime <= deadline:
                    self._discard(path)
                    gone.append(digest)
        return gone

    def sweep(self) -> int:
        """Deletes what killed processes left half-written; how many folders that was."""
        count = 0
        for work in list(self._tmp.iterdir()):
            try:
                lock = os.open(work / ".lock", os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                # Discarded contents have no lock; a folder just being made has none yet either.
                if _age_s(work) > 60.0:
                    _remove(work)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(work)
                count += 1
            except BlockingIOError:
                pass
            finally:
                os.close(lock)
        return count

    def _discard(self, path: Path) -> None:
        """Out of sight in one step, then deleted."""
        away = self._tmp / secrets.token_hex(8)
        path.chmod(0o755)
        os.rename(path, away)
        _remove(away)


def digest_of(folder: Path) -> str:
    """Hex SHA-256 over the names and contents of all files in a folder.

    The same sum as `adapters.formats.artefact.Artefact.digest` over the artefact's files.
    """
    total = hashlib.sha256()
    for name in sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()):
        with (folder / name).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        total.update(hashlib.sha256(name.encode()).digest() + content)
    return total.hexdigest()


@contextmanager
def room(store: Path) -> Iterator[None]:
    """Turns a full disk (or quota, or file size limit) into `StoreFull`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreFull(f"the store {store} has no room: {error.strerror}",
                        field="adapters.store") from error  # fmt: skip


def _settle(folder: Path) -> None:
    """Everything on disk and read-only; the folder itself stays writable until it is renamed."""
    paths = sorted(folder.rglob("*"), reverse=True)
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
        _sync(path)
    _sync(folder)


def _remove(tree: Path) -> None:
    """Deletes a tree, also one whose folders are read-only."""
    for folder, _, _ in os.walk(tree):
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(tree, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _age_s(path: Path) -> float:
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime
    return 0.0
