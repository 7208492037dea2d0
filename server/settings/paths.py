"""Types of settings that are paths. Relative ones are relative to the `folder` of pydantic's
validation context; without one they stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo


def resolved(value: str, folder: Path) -> Path:
    """A path made absolute.

    Raises:
        ValueError: it cannot be one.
    """
    try:
        path = (folder / Path(value).expanduser()).resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # Too long, a link to itself, somebody's home who is not here, a zero byte.
        why = getattr(error, "strerror", None) or str(error)[:200]
        raise ValueError(f"cannot be a path: {why}") from error
    return path


def located(value: str, folder: Path) -> str:
    """A path made absolute; a hub id, or a source elsewhere, left alone."""
    if not value:
        return value
    path = resolved(value, folder)
    return str(path) if value.startswith(("/", "./", "../", "~")) or path.exists() else value


def template(value: str, folder: Path) -> str:
    """A chat template: the text of a file, or the text itself.

    Raises:
        ValueError: it is neither.
    """
    if "{" in value or "\n" in value:
        return value
    path = resolved(value, folder)
    if not path.is_file():
        raise ValueError(f"neither a template text nor a file: {path}")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _folder(info: ValidationInfo) -> Path | None:
    return info.context["folder"] if info.context else None


def _located(value: str, info: ValidationInfo) -> str:
    folder = _folder(info)
    return value if folder is None else located(value, folder)


def _absolute(value: str, info: ValidationInfo) -> str:
    folder = _folder(info)
    return value if folder is None else str(resolved(value, folder))


def _template(value: str, info: ValidationInfo) -> str:
    folder = _folder(info)
    return value if folder is None else template(value, folder)


Located = Annotated[str, AfterValidator(_located)]
"""A folder or file, or a name of something elsewhere that looks like one."""

Absolute = Annotated[str, AfterValidator(_absolute)]
"""A folder or file."""

Template = Annotated[str, AfterValidator(_template)]
"""A chat template; or a file with one."""
