"""Buckets and the Hugging Face hub, through their fsspec file systems."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adapters.errors import BadSource, SourceAway
from adapters.sources.origin import AbsentError, Limits, Opened
from adapters.sources.source import Source

_PART = 8 << 20
"""Bytes per request to a bucket: fsspec holds each answer in memory."""


class Bucket:
    """An `Origin` over s3fs. Credentials: the AWS environment variables and files.

    Args:
        source: of kind s3.
        limits: its time-outs.
        endpoint: URL of an S3-compatible server; None: AWS, or what `AWS_ENDPOINT_URL` says.
        anonymous: without credentials, for public buckets.
    """

    def __init__(
        self, source: Source, limits: Limits, *, endpoint: str | None = None,
        anonymous: bool = False,
    ) -> None:  # fmt: skip
        import s3fs

        self._root = f"{source.place}/{source.folder}".rstrip("/")
        # Retries are the caller's; the instance cache would keep listings and dead sessions.
        times = {"connect_timeout": limits.connect_s, "read_timeout": limits.read_s,
                 "retries": {"max_attempts": 1}}  # fmt: skip
        self._system = s3fs.S3FileSystem(
            anon=anonymous, endpoint_url=endpoint, config_kwargs=times, use_listings_cache=False,
            skip_instance_cache=True,
        )  # fmt: skip
        self._system.retries = 1

    @contextmanager
    def open(self, name: str) -> Iterator[Opened]:
        """See `Origin`."""
        import botocore.exceptions

        try:
            with self._system.open(
                f"{self._root}/{name}", "rb", block_size=_PART, cache_type="readahead"
            ) as file:
                yield Opened(file.size, _chunks(file))
        except FileNotFoundError:
            raise AbsentError(name) from None
        except PermissionError as error:
            raise BadSource("the bucket refuses access", field=name) from error
        except (OSError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as e:
            raise SourceAway(_said(e), field=name) from e

    def close(self) -> None:
        """See `Origin`."""


class HubFolder:
    """An `Origin` over huggingface_hub, at one commit for all files.

    Where the hub keeps its files elsewhere it redirects; that is its own affair, and its client
    drops the token on the way. Token: `HF_TOKEN` or what `hf auth login` stored.

    Args:
        source: of kind hub.
        limits: its time-outs.
        endpoint: another hub; None: huggingface.co, or what `HF_ENDPOINT` says.
    """

    def __init__(self, source: Source, limits: Limits, *, endpoint: str | None = None) -> None:
        import httpx
        import httpx2
        from huggingface_hub import HfApi, HfFileSystem
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
        from huggingface_hub.errors import RevisionNotFoundError as NoRevision

        try:
            info = HfApi(endpoint=endpoint).model_info(
                source.place, revision=source.revision, timeout=limits.connect_s
            )
        except (RepositoryNotFoundError, NoRevision) as error:
            raise BadSource("no such repository or revision, or it is private", field="source",
                            value=source.text) from error  # fmt: skip
        except (HfHubHTTPError, httpx.HTTPError, httpx2.HTTPError, OSError) as error:
            raise SourceAway(_said(error), field="source") from error
        # The commit, not the branch: files of two commits must not be mixed.
        self._root = f"{source.place}@{info.sha}/{source.folder}".rstrip("/")
        self._system: Any = HfFileSystem(endpoint=endpoint, use_listings_cache=False,
                                         skip_instance_cache=True)  # fmt: skip

    @contextmanager
    def open(self, name: str) -> Iterator[Opened]:
        """See `Origin`."""
        import httpx
        import httpx2
        from huggingface_hub.errors import EntryNotFoundError

        path = f"{self._root}/{name}"
        try:
            size = self._system.info(path)["size"]
            with self._system.open(path, "rb", block_size=0) as file:
                yield Opened(size, _chunks(file))
        except (FileNotFoundError, EntryNotFoundError):
            raise AbsentError(name) from None
        except (OSError, httpx.HTTPError, httpx2.HTTPError) as error:
            raise SourceAway(_said(error), field=name) from error

    def close(self) -> None:
        """See `Origin`."""


def _chunks(file: Any) -> Iterator[bytes]:
    # Small steps: the deadline is looked at between them.
    return iter(lambda: file.read(1 << 16), b"")


def _said(error: Exception) -> str:
    """The first line: these libraries append request ids and hints."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
