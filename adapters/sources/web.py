"""Folders on web servers, over httpx: no redirect leaves the host, no compression is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, unquote

import httpx

from adapters.errors import BadSource, SourceAway
from adapters.sources.origin import AbsentError, Limits, Opened
from adapters.sources.source import Source

_MOST_REDIRECTS = 5


class WebFolder:
    """An `Origin`.

    Args:
        source: of kind web.
        limits: its time-outs.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        self._url = httpx.URL(f"{source.place}/{quote(unquote(source.folder))}".rstrip("/") + "/")
        times = httpx.Timeout(limits.read_s, connect=limits.connect_s)
        # Identity: a few compressed bytes could otherwise unfold to any size.
        headers = {"accept-encoding": "identity", "user-agent": "coxswain"}
        self._client = httpx.Client(timeout=times, headers=headers, follow_redirects=False)

    @contextmanager
    def open(self, name: str) -> Iterator[Opened]:
        """See `Origin`."""
        try:
            with self._answer(self._url.join(quote(name)), name) as answer:
                length = answer.headers.get("content-length", "")
                # As they come: with a chunk size a slow server's bytes would be gathered first, and
                # the deadline looked at too late.
                yield Opened(int(length) if length.isdigit() else None, answer.iter_raw())
        except httpx.TransportError as error:
            raise SourceAway(f"{type(error).__name__}: {error}", field=name) from error

    @contextmanager
    def _answer(self, url: httpx.URL, name: str) -> Iterator[httpx.Response]:
        for _ in range(_MOST_REDIRECTS + 1):
            with self._client.stream("GET", url) as answer:
                if not answer.has_redirect_location:
                    _check(answer, name)
                    yield answer
                    return
                url = self._next(url, answer, name)
        raise BadSource(f"more than {_MOST_REDIRECTS} redirects", field=name)

    def _next(self, url: httpx.URL, answer: httpx.Response, name: str) -> httpx.URL:
        try:
            following = url.join(answer.headers["location"])
        except httpx.InvalidURL as error:
            raise BadSource(f"redirects to no URL: {error}", field=name) from error
        if _place(following) != _place(self._url) or following.userinfo:
            redacted = following.copy_with(query=None, fragment=None, userinfo=b"")
            ours = f"{self._url.scheme}://{self._url.netloc.decode()}"
            raise BadSource("redirects to another host", field=name, value=str(redacted),
                            allowed=f"only {ours}")  # fmt: skip
        return following

    def close(self) -> None:
        """See `Origin`."""
        self._client.close()


def _place(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _check(answer: httpx.Response, name: str) -> None:
    status = answer.status_code
    if status in (404, 410):
        raise AbsentError(name)
    if status == 429 or status >= 500:
        raise SourceAway(f"the server answers {status}", field=name)
    if status != 200:
        raise BadSource(f"the server answers {status}", field=name)
    if (coding := answer.headers.get("content-encoding", "identity")) != "identity":
        raise BadSource("the server compresses although it was asked not to", field=name,
                        value=coding)  # fmt: skip
