"""The registry's record of one adapter, and the allowed transitions of its state.

    submit ──► pending ──► downloading ──► loading ──► ready
                  │             │             │          │
                  └─────────────┴──► failed ◄─┘          │      (unload from every state)
    any state ────────────────► unloading ──► (no record)

The state is that of the last request. `serving` is what answers meanwhile: while a replacement
is fetched, and after it failed, the old content goes on serving.
Needs msgspec only.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from adapters.errors import BadSource, Conflict, RegistryAway

State = Literal["pending", "downloading", "loading", "ready", "failed", "unloading"]

SCHEMA = "2"
"""Version of everything stored; another one is refused, never guessed at."""

_PART = r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}"
NAME = re.compile(f"{_PART}(/{_PART})?")
VERSION = re.compile(_PART)
"""Names and versions: they appear in URLs and, joined by `@`, as `model` in requests. Names may be
those of a hub, `owner/name`."""

WORKING: frozenset[State] = frozenset({"pending", "downloading", "loading"})
"""States in which some replica is at work; without a living owner another takes over."""

_FOLLOWS: dict[State, frozenset[State]] = {
    "pending": frozenset({"downloading", "failed", "unloading", "pending"}),
    "downloading": frozenset({"loading", "failed", "unloading", "pending"}),
    "loading": frozenset({"ready", "failed", "unloading", "pending"}),
    "ready": frozenset({"unloading", "pending"}),
    "failed": frozenset({"unloading", "pending"}),
    "unloading": frozenset(),
}


class Facts(msgspec.Struct, frozen=True, gc=False):
    """Facts about an adapter, found while it was loaded.

    Args:
        kind: `lora`, `dora`, … or `meteora` (`adapters.formats.artefact.Kind`).
        base: the model it was made for, as its own config says it; empty: it does not say.
        size_bytes: bytes of its tensors.
        warnings: what a person should know of it, though it is served.
    """

    kind: str
    base: str = ""
    size_bytes: int = 0
    warnings: tuple[str, ...] = ()


class Content(msgspec.Struct, frozen=True, gc=False):
    """One content under one name. Two artefacts with the same digest have the same bytes.

    Args:
        name: what requests call it.
        version: a label, free to choose; `name@version` finds the adapter only while it fits.
        source: where it came from (`adapters.sources.source`).
        stream: the stream whose layers it adapts.
        digest: hex SHA-256 of its files; None until they are fetched.
        facts: None until it is loaded.
        visible_to: the groups of API keys that alone see it; empty: all do.
    """

    name: str
    version: str
    source: str
    stream: str = "base"
    digest: str | None = None
    facts: Facts | None = None
    visible_to: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str | None]:
        """Identifies the content to load; labels do not matter."""
        return self.stream, self.digest

    def same_request(self, other: Content) -> bool:
        """Whether two records request the same content, regardless of their state."""
        mine = (self.name, self.version, self.source, self.stream, self.visible_to)
        return mine == (
            other.name, other.version, other.source, other.stream, other.visible_to
        )  # fmt: skip


class Record(msgspec.Struct, frozen=True, gc=False):
    """One adapter in the registry. Immutable; a change makes a new one.

    Args:
        want: what was asked for last.
        state: how far that is.
        reason: why it failed; None otherwise.
        error: the class of that, a name in `adapters.errors`; None otherwise.
        serving: what answers requests now; None: nothing.
        owner: the replica that works on it, or did.
        job: a random word per piece of work; who has another one has been superseded.
        attempts: how often that work was begun; it is not begun a fourth time.
        pinned: never evicted.
        loaded_by: who asked, e.g. the fingerprint of an admin key.
        created_s, changed_s: Unix times, seconds.
        token: of the write that made it (`adapters.registry.store`); set by the store.
    """

    want: Content
    state: State
    created_s: float
    changed_s: float
    reason: str | None = None
    serving: Content | None = None
    owner: str | None = None
    job: str = ""
    attempts: int = 0
    pinned: bool = False
    loaded_by: str = ""
    error: str | None = None
    token: str = ""

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.want.name

    def digests(self) -> frozenset[str]:
        """The contents that must stay in the store."""
        digests = (self.want.digest, self.serving.digest if self.serving else None)
        return frozenset(digest for digest in digests if digest)

    def to(self, state: State, *, now_s: float, **changes: object) -> Record:
        """The record after a transition.

        Raises:
            Conflict: `state` cannot follow the present one.
        """
        if state not in _FOLLOWS[self.state]:
            raise Conflict(f"{self.name!r} is {self.state} and cannot become {state}", field="name")
        fields = {"reason": None, "error": None, **changes, "state": state, "changed_s": now_s}
        return msgspec.structs.replace(self, **fields)


def check_name(text: str, field: str) -> str:
    """The name itself.

    Raises:
        BadSource: it has characters that we do not put into URLs.
    """
    return _checked(text, field, NAME, "letters, digits, . _ : - and one /; at most 128 characters "
                    "on either side of it")  # fmt: skip


def check_version(text: str, field: str) -> str:
    """The version itself.

    Raises:
        BadSource: it has characters that we do not put into URLs.
    """
    return _checked(text, field, VERSION, "letters, digits, . _ : -; at most 128 characters")


def _checked(text: str, field: str, form: re.Pattern[str], allowed: str) -> str:
    if not form.fullmatch(text):
        raise BadSource("not a usable name", field=field, value=text, allowed=allowed)
    return text


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    """The record as it is stored; its token is stored beside it."""
    return _encoder.encode(msgspec.structs.replace(record, token=""))


def decode(raw: bytes, token: str) -> Record:
    """The record that was stored.

    Raises:
        RegistryAway: the bytes are not a record of this schema.
    """
    try:
        return msgspec.structs.replace(_decoder.decode(raw), token=token)
    except msgspec.MsgspecError as error:
        raise RegistryAway(f"the registry holds a record that is none: {error}") from error
