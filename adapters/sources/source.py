"""Where an adapter comes from, as text, and which of these places a server allows.

    /folder or file:///folder            a folder under one of the allowed roots
    hf://owner/name[@revision][/folder]  a Hugging Face repository; `owner/name` for short
    s3://bucket/folder                   an S3-compatible bucket
    https://host/folder                  a folder on a web server (http:// too)

Steering vectors may also be named by their one file, `.gguf` or `.safetensors`, in any of the four.

Needs the standard library only.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from adapters.errors import BadSource

Kind = Literal["local", "hub", "s3", "web"]

_LONGEST = 2048
CONVERT = "convert steering vectors with `coxswain convert-vectors SOURCE OUT`"
"""What to do with pickles of vectors."""

_FORMS = "/folder, hf://owner/name, s3://bucket/folder, https://host/folder"
_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>[\w.-]{1,128}))?(?:/(?P<folder>.+))?",
    re.ASCII,
)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npz", ".joblib")
_VECTORS = (".gguf", ".safetensors")
_OF_FOLDERS = ("adapter_model", "model", "gates")
"""Tensors that say little without a config beside them."""


@dataclass(frozen=True, slots=True)
class Source:
    """A place, checked in form only: nothing was opened and nothing was looked up.

    Args:
        kind: which of the four.
        text: the one spelling of it; equal places have equal texts.
        place: local: the folder; hub: `owner/name`; s3: the bucket; web: scheme, host and port.
        folder: path inside the place without slashes at its ends; empty for local.
        revision: hub only; None: the repository's main branch.
        file: the one file in the folder that holds vectors; empty: a config says what is there.
    """

    kind: Kind
    text: str
    place: str
    folder: str = ""
    revision: str | None = None
    file: str = ""

    def __str__(self) -> str:
        return self.text


def parse_source(text: str, field: str = "source") -> Source:
    """The place that a text names.

    Raises:
        BadSource: it is none of the four forms, or has characters or parts that hide something.
    """
    _check_characters(text, field)
    lower = text.lower().rstrip("/")
    if lower.endswith(_ARCHIVES):
        raise BadSource("archives are not unpacked; give a folder", field=field, value=text)
    if lower.endswith(_PICKLES):
        raise BadSource("pickles can run code and are not loaded; give a folder with safetensors, "
                        f"or {CONVERT}", field=field, value=text)  # fmt: skip
    if lower.endswith(".safetensors") and lower.rpartition("/")[2].startswith(_OF_FOLDERS):
        raise BadSource("give the folder, not one file of it", field=field, value=text)
    return _file_of(_place(text, field))


def _place(text: str, field: str) -> Source:
    """Which of the four it is."""
    if text.startswith("/"):
        return _local(text, field)
    parts = _split(text, field)
    match parts.scheme.lower():
        case "file" if not parts.netloc:
            return _local(unquote(parts.path), field)
        case "hf":
            return _hub(text[5:].rstrip("/"), text, field)
        case "s3":
            return _s3(parts, text, field)
        case "http" | "https":
            return _web(parts, text, field)
        case "" if _HUB.fullmatch(text) and text.count("/") == 1:
            return _hub(text, text, field)
    raise BadSource("not a source that we know", field=field, value=text,
                    allowed=_FORMS)  # fmt: skip


def _file_of(source: Source) -> Source:
    """The folder and the file, where a source ends in one of vectors."""
    path = source.place if source.kind == "local" else source.folder
    folder, _, file = path.rpartition("/")
    if not file.lower().endswith(_VECTORS):
        return source
    if source.kind == "local":
        return replace(source, place=folder or "/", file=file)
    return replace(source, folder=folder, file=unquote(file) if source.kind == "web" else file)


def _check_characters(text: str, field: str) -> None:
    if not text or len(text) > _LONGEST:
        raise BadSource("empty or too long", field=field, value=text,
                        allowed=f"1 to {_LONGEST} characters")  # fmt: skip
    for character in (*text, *unquote(text, errors="replace")):
        # Cc control, Cf invisible, Cs surrogate, Zl and Zp line breaks: they forge log lines.
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
            raise BadSource("control characters are not allowed", field=field, value=text)
    if "\\" in text or "%2f" in text.lower() or "%5c" in text.lower():
        raise BadSource("backslashes and encoded slashes are not allowed", field=field, value=text)
    if any(part in (".", "..") for part in unquote(text).split("/")):
        raise BadSource("a path must not contain . or .. as a part", field=field, value=text)


def _split(text: str, field: str) -> SplitResult:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise BadSource(f"not a URL: {error}", field=field, value=text) from error
    if parts.username is not None or parts.password is not None:
        raise BadSource("credentials in a URL would be stored in the registry; set them in the "
                        "server's environment", field=field)  # fmt: skip
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise BadSource("a folder has no query and no fragment", field=field, value=text)
    return parts


def _local(path: str, field: str) -> Source:
    if not path.startswith("/"):
        raise BadSource("a path must be absolute", field=field, value=path)
    clean = "/" + "/".join(part for part in path.split("/") if part)
    return Source("local", clean, clean)


def _hub(spelled: str, text: str, field: str) -> Source:
    match = _HUB.fullmatch(spelled)
    if match is None or "//" in spelled:
        raise BadSource("not a repository", field=field, value=text,
                        allowed="hf://owner/name[@revision][/folder]")  # fmt: skip
    return Source("hub", f"hf://{spelled}", match["repo"], match["folder"] or "", match["revision"])


def _s3(parts: SplitResult, text: str, field: str) -> Source:
    if not _BUCKET.fullmatch(parts.netloc):
        raise BadSource("not a bucket", field=field, value=text, allowed="s3://bucket/folder")
    folder = _folder(parts, text, field)
    return Source("s3", f"s3://{parts.netloc}/{folder}".rstrip("/"), parts.netloc, folder)


def _web(parts: SplitResult, text: str, field: str) -> Source:
    if not parts.hostname:
        raise BadSource("a URL needs a host", field=field, value=text)
    scheme, host = parts.scheme.lower(), parts.hostname
    host = f"[{host}]" if ":" in host else host
    usual = {"http": 80, "https": 443}[scheme]
    port = f":{parts.port}" if parts.port not in (None, usual) else ""
    place, folder = f"{scheme}://{host}{port}", _folder(parts, text, field)
    return Source("web", f"{place}/{folder}".rstrip("/"), place, folder)


def _folder(parts: SplitResult, text: str, field: str) -> str:
    folder = parts.path.strip("/")
    if "//" in folder:
        raise BadSource("empty path segments are not allowed", field=field, value=text)
    return folder


@dataclass(frozen=True)
class Allowed:
    """The places that an operator trusts.

    Args:
        roots: folders that local adapters may lie in.
        remotes: beginnings of sources, e.g. `hf://acme`, `s3://models/loras`,
            `https://artefacts.example.com`; `hf://` allows the whole hub. A beginning ends at a
            `/` or `@`, so `hf://acme` does not allow `hf://acme2/x`.
    """

    roots: tuple[Path, ...] = ()
    remotes: tuple[str, ...] = ()

    def check(self, source: Source, field: str = "source") -> None:
        """Lets a source pass or raises; local folders are looked at again when they are opened.

        Raises:
            BadSource: it is not under any of the roots or beginnings.
        """
        if source.kind == "local":
            real = Path(source.place).resolve()
            if any(real.is_relative_to(root.resolve()) for root in self.roots):
                return
            allowed = ", ".join(map(str, self.roots)) or "(adapters.roots is empty)"
            raise BadSource("not under an allowed root", field=field, value=source.text,
                            allowed=allowed)  # fmt: skip
        if not any(_begins(source.text, remote) for remote in self.remotes):
            allowed = ", ".join(self.remotes) or "(adapters.remotes is empty)"
            raise BadSource("not an allowed place", field=field, value=source.text, allowed=allowed)


def _begins(text: str, beginning: str) -> bool:
    if beginning.endswith("://"):
        return text.startswith(beginning)
    beginning = beginning.rstrip("/")
    return text == beginning or text.startswith((f"{beginning}/", f"{beginning}@"))
