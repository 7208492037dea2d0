"""Flags that several recipes share, and what they name."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from server.commands.admin_client import URL

Option = Callable[..., Any]
"""`add_argument` of a parser, or of a group of it."""


def add_sampling(option: Option, *, samples: int, max_tokens: int) -> None:
    """The server that replies are sampled from, and how.

    Args:
        option: where they are added.
        samples: default of --samples.
        max_tokens: default of --max-tokens.
    """
    option(
        "--server",
        default=os.environ.get("COXSWAIN_URL", URL),
        metavar="URL",
        help=f"a running Coxswain (default: COXSWAIN_URL, else {URL})",
    )
    option("--key", metavar="KEY", help="an API key; better in COXSWAIN_API_KEYS")
    option(
        "--model", metavar="NAME", help="base, profile or adapter that replies (default: the base)"
    )
    option(
        "--request",
        metavar="JSON",
        default="{}",
        help='further fields of each request, e.g. \'{"steering": {…}, "adapters": […]}\'',
    )
    option(
        "--samples",
        type=int,
        default=samples,
        metavar="N",
        help=f"replies for each prompt (default: {samples})",
    )
    option(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"the longest reply (default: {max_tokens})",
    )
    option("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    option("--top-p", type=float, default=1.0, metavar="P", help="default: 1")
    option(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)"
    )


def add_held_out(option: Option) -> None:
    """How much of the prompts is kept for measuring."""
    option(
        "--held-out",
        type=float,
        default=0.1,
        metavar="X",
        help="share of the prompts that is measured on, not trained on (default: 0.1)",
    )


def add_running(
    option: Option, *, warm_up: float, weight_decay: float, save_every: int, written: str = ""
) -> None:
    """How any recipe runs.

    Args:
        option: where they are added.
        warm_up: default of --warm-up.
        weight_decay: default of --weight-decay.
        save_every: default of --save-every.
        written: what decides the dtype of the result, for the help.
    """
    option(
        "--warm-up",
        type=float,
        default=warm_up,
        metavar="X",
        help=f"share of the steps in which the rate rises, then cosine (default: {warm_up:g})",
    )
    option(
        "--weight-decay",
        type=float,
        default=weight_decay,
        metavar="X",
        help=f"AdamW's (default: {weight_decay:g})",
    )
    option("--seed", type=int, default=0, metavar="N", help="default: 0")
    option(
        "--save-every",
        type=int,
        default=save_every,
        metavar="N",
        help=f"steps between checkpoints (default: {save_every})",
    )
    option("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    option(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help=f"of the arithmetic; what is trained stays float32{written} (default: float32)",
    )


def device(given: argparse.Namespace) -> str:
    """What --device names, or the best there is."""
    import torch

    return given.device or ("cuda" if torch.cuda.is_available() else "cpu")


def template_of(given: argparse.Namespace) -> str | None:
    """The text of --chat-template; None where it is absent.

    Raises:
        BadRecipe: the file cannot be read.
    """
    from adapters.training.errors import BadRecipe

    if given.chat_template is None:
        return None
    try:
        text: str = given.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(f"cannot be read: {error}", field="--chat-template") from error
    return text


def served_by(given: argparse.Namespace) -> Any:
    """The `adapters.training.served.Served` that a command line names.

    Raises:
        BadRecipe: a flag cannot be used.
    """
    from adapters.training.errors import BadRecipe
    from adapters.training.served import Served

    try:
        fields = json.loads(given.request)
    except ValueError as error:
        raise BadRecipe(f"not JSON: {error}", field="--request", value=given.request) from error
    if not isinstance(fields, dict):
        raise BadRecipe(
            "not a JSON object", field="--request", value=given.request, allowed='{"steering": …}'
        )
    if given.concurrency < 1:
        raise BadRecipe(
            "cannot be used", field="--concurrency", value=given.concurrency, allowed="≥ 1"
        )
    key = given.key or os.environ.get("COXSWAIN_API_KEYS", "").partition(",")[0].strip() or None
    return Served(given.server, key, given.model, fields, given.concurrency)
