"""The store: whole or absent, whatever happens in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import BadAdapter
from adapters.sources.store import ContentStore, digest_of
from tests.adapters.registry.kit import make_lora


def put(store: ContentStore, content: bytes) -> tuple[str, Path]:
    with store.staging() as folder:
        (folder / "sub").mkdir()
        (folder / "sub/file").write_bytes(content)
        return store.keep(folder)


def test_many_threads_with_few_contents_keep_each_once(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    seen = threading.Lock()
    wrong: list[str] = []

    def look() -> None:
        for digest in store.digests():
            if digest_of(store.root / digest) != digest:
                with seen:
                    wrong.append(digest)

    def work(i: int) -> str:
        digest, folder = put(store, b"%d" % (i % 5) * 100_000)
        assert (folder / "sub/file").read_bytes() == b"%d" % (i % 5) * 100_000
        look()
        return digest

    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(work, range(200)))
    assert not wrong
    assert len(digests) == 5 and store.digests() == digests
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_changed_files_are_noticed_and_taken_out(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    digest, folder = put(store, b"good")
    assert store.verify(digest) == folder
    (folder / "sub").chmod(0o755)
    (folder / "sub/file").chmod(0o644)
    (folder / "sub/file").write_bytes(b"evil")
    with pytest.raises(BadAdapter, match="changed"):
        store.verify(digest)
    assert store.folder(digest) is None
    assert put(store, b"good")[0] == digest
    store.verify(digest)


def test_a_content_that_is_there_already_is_read_before_it_is_used_again(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    digest, folder = put(store, b"good")
    (folder / "sub").chmod(0o755)
    (folder / "sub/file").chmod(0o644)
    (folder / "sub/file").write_bytes(b"evil")
    with pytest.raises(BadAdapter, match="changed"):
        put(store, b"good")
    assert put(store, b"good") == (digest, folder)
    assert (folder / "sub/file").read_bytes() == b"good"


def test_only_old_contents_that_nobody_uses_are_collected(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    used, old, new = (put(store, content)[0] for content in (b"used", b"old", b"new"))
    for digest in (used, old):
        os.utime(tmp_path / digest, (time.time() - 7200,) * 2)
    (tmp_path / "notes.txt").write_text("not ours")
    assert store.collect([used]) == [old]
    assert store.digests() == {used, new}
    os.utime(tmp_path / new, (time.time() - 7200,) * 2)
    assert put(store, b"new")[0] == new
    assert store.collect([used]) == [], "found again just now: a record is about to refer to it"
    assert (tmp_path / "notes.txt").exists()


def child(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from adapters.sources.store import ContentStore
        with ContentStore(Path(sys.argv[1])).staging() as folder:
            (folder / "half").write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)
    """
    store = ContentStore(tmp_path)
    process = child(code, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert store.sweep() == 0
    assert len(list((tmp_path / ".tmp").iterdir())) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert store.sweep() == 1
    assert list((tmp_path / ".tmp").iterdir()) == []
    assert store.digests() == frozenset()


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    """The kernel's own limit on file sizes stands in for the disk: write() fails the same way."""
    small = make_lora(tmp_path / "in/small")
    large = make_lora(tmp_path / "in/large", size=20_000)
    code = """
        import resource, signal, sys
        from pathlib import Path
        from adapters.errors import StoreFull
        from adapters.sources.fetch import Fetcher
        from adapters.sources.source import Allowed, parse_source
        from adapters.sources.store import ContentStore
        root = Path(sys.argv[1])
        fetcher = Fetcher(ContentStore(root / "store"), Allowed((root / "in",)))
        kept = fetcher.fetch(parse_source(sys.argv[2]))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            fetcher.fetch(parse_source(sys.argv[3]))
        except StoreFull as error:
            print("full", fetcher.store.verify(kept.digest).name, flush=True)
    """
    process = child(code, tmp_path, small, large)
    said, _ = process.communicate(timeout=60)
    store = ContentStore(tmp_path / "store")
    (digest,) = store.digests()
    assert said == f"full {digest}\n"
    assert list((tmp_path / "store/.tmp").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_really_is_full(tmp_path: Path) -> None:
    """The same on a file system of 256 KiB, in a mount namespace that ends with the process."""
    large = make_lora(tmp_path / "in/large", size=20_000)
    small = make_lora(tmp_path / "in/small")
    (tmp_path / "store").mkdir()
    code = """
        import sys, shutil
        from pathlib import Path
        from adapters.errors import StoreFull
        from adapters.sources import fetch
        from adapters.sources.source import Allowed, parse_source
        from adapters.sources.store import ContentStore
        root = Path(sys.argv[1])
        fetcher = fetch.Fetcher(ContentStore(root / "store"), Allowed((root / "in",)))
        kept = fetcher.fetch(parse_source(sys.argv[2]))
        for early in (True, False):
            if not early:
                # As when others fill the disk between the look and the write.
                fetch.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
            try:
                fetcher.fetch(parse_source(sys.argv[3]))
            except StoreFull as error:
                left = [p.name for p in (root / "store/.tmp").iterdir()]
                print("full", fetcher.store.digests() == {kept.digest}, left, flush=True)
        print(fetcher.store.verify(kept.digest).name == kept.digest)
    """
    mount = f'mount -t tmpfs -o size=256k tmpfs {tmp_path}/store && exec "$@"'
    process = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", textwrap.dedent(code),
         tmp_path, small, large],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "mount" in process.stderr or "unshare" in process.stderr:
        pytest.skip(f"no private mounts here: {process.stderr.strip()}")
    assert process.stdout == "full True []\nfull True []\nTrue\n", process.stderr
