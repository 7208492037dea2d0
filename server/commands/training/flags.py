"""Command lines of recipes, made from their settings: each field is a flag, with the field's type,
default and description.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from adapters.training.checked import flag
from server.commands.admin_client import URL

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "direction": ("mean", "component"),
    "states": ("last", "mean"),
}

_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def add_settings(
    parser: argparse.ArgumentParser,
    settings: type[Any],
    groups: Mapping[str, Sequence[str]],
    named: Mapping[str, str] | None = None,
) -> None:
    """Adds a flag for each field that a group names.

    Args:
        parser: of the recipe.
        settings: a dataclass with types, defaults, and a sentence for each field in its docstring.
        groups: fields, by the heading under which `--help` shows them.
        named: flags of fields that are `{name: path}`, given once for each.
    """
    hints, sentences = get_type_hints(settings), _sentences(settings)
    by_name = {field.name: field for field in fields(settings)}
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            default = by_name[name].default
            needed, text = default is MISSING, sentences[name]
            if not needed and default is not None and default is not False:
                text += f" (default: {default:g})" if isinstance(default, float) else (
                    f" (default: {default})")  # fmt: skip
            group.add_argument(
                (named or {}).get(name, flag(name)), dest=name, required=needed,
                default=None if needed else default, help=text.replace("%", "%%"),
                **_form(hints[name], name),
            )  # fmt: skip


def _form(hint: Any, name: str) -> dict[str, Any]:
    """How argparse reads a type."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    union = get_origin(hint) in (Union, UnionType)
    words = tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
    kind = kinds[0] if union else hint
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is dict:
        return {"action": "append", "metavar": "NAME=PATH", "type": _named}
    if name in CHOICES:
        return {"choices": CHOICES[name]}

    def read(text: str) -> object:
        return text if text in words else kind(text)

    read.__name__ = " or ".join([kind.__name__, *words])  # argparse tells it of a wrong value
    return {"type": read, "metavar": _METAVARS[kind]}


def _named(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"not NAME=PATH (got {text!r})")
    return name, Path(path)


def _sentences(settings: type[Any]) -> dict[str, str]:
    """The docstring's sentence about each field."""
    _, _, section = (inspect.getdoc(settings) or "").partition("Args:\n")
    entries = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)[1:]
    texts = dict(zip(entries[::2], entries[1::2], strict=True))
    return {name: " ".join(text.split()).rstrip(".").replace("None: ", "default: ")
            for name, text in texts.items()}  # fmt: skip


def read_settings(settings: type[Any], args: argparse.Namespace, **more: Any) -> Any:
    """The settings that a command line gives.

    Args:
        settings: the dataclass.
        args: the flags.
        more: fields that are no flags.

    Raises:
        BadRecipe: a name is given twice.
    """
    values = {field.name: getattr(args, field.name) for field in fields(settings)
              if field.name not in more}  # fmt: skip
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = _unique(name, value)
    return settings(**values, **more)


def _unique(name: str, pairs: list[tuple[str, Path]]) -> dict[str, Path]:
    from adapters.training.errors import BadRecipe

    names = [entry for entry, _ in pairs]
    for entry in names:
        if names.count(entry) > 1:
            key = flag(name.removesuffix("s"))
            raise BadRecipe("given twice", field=f"{key} {entry}", allowed="each name once")
    return dict(pairs)


def add_common(parser: argparse.ArgumentParser, *, samples: bool) -> None:
    """Flags that are no settings: the device, and the server that replies are sampled from."""
    option = parser.add_argument_group("how it runs").add_argument
    option("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    if not samples:
        return
    option = parser.add_argument_group("the server that replies").add_argument
    option("--server", default=os.environ.get("COXSWAIN_URL", URL), metavar="URL",
           help=f"a running Coxswain (default: COXSWAIN_URL, else {URL})")  # fmt: skip
    option("--key", metavar="KEY", help="an API key; better in COXSWAIN_API_KEYS")
    option("--model", metavar="NAME",
           help="base, profile or adapter that replies (default: the base)")  # fmt: skip
    option("--request", metavar="JSON", default="{}",
           help="further fields of each request, e.g. '{\"steering\": {…}}'")  # fmt: skip
    option("--concurrency", type=int, default=8, metavar="N",
           help="requests at a time (default: 8)")  # fmt: skip


def add_template(parser: argparse.ArgumentParser) -> None:
    """`--chat-template`, for recipes that render messages."""
    parser.add_argument("--chat-template", type=Path, metavar="FILE",
                        help="Jinja template for messages (default: the model's own)")  # fmt: skip


def device(args: argparse.Namespace) -> str:
    """What --device names, or the best there is."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def template_of(args: argparse.Namespace) -> str | None:
    """The text of --chat-template; None where it is absent.

    Raises:
        BadRecipe: the file cannot be read.
    """
    from adapters.training.errors import BadRecipe

    if args.chat_template is None:
        return None
    try:
        text: str = args.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(f"cannot be read: {error}", field="--chat-template") from error
    return text


def served_by(args: argparse.Namespace) -> Any:
    """The `adapters.training.served.Served` that a command line names.

    Raises:
        BadRecipe: a flag cannot be used.
    """
    from adapters.training.errors import BadRecipe
    from adapters.training.served import Served

    try:
        fields = json.loads(args.request)
    except ValueError as error:
        raise BadRecipe(f"not JSON: {error}", field="--request", value=args.request) from error
    if not isinstance(fields, dict):
        raise BadRecipe(
            "not a JSON object", field="--request", value=args.request, allowed='{"steering": …}'
        )
    if args.concurrency < 1:
        raise BadRecipe(
            "cannot be used", field="--concurrency", value=args.concurrency, allowed="≥ 1"
        )
    key = args.key or os.environ.get("COXSWAIN_API_KEYS", "").partition(",")[0].strip() or None
    return Served(args.server, key, args.model, fields, args.concurrency)
