"""`coxswain train vector`: its flags, and the run."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import Any

from adapters.training.vector.settings import VectorSettings
from server.commands.training.flags import (
    add_common,
    add_settings,
    device,
    read_settings,
    served_by,
)

_DESCRIPTION = """\
Trains a steering vector: what is added to the output of one decoder layer, from the difference that
a contrast makes there.

  1. pairs    your own (--pairs), or of replies sampled from a running server the best and the worst
              to each prompt by a reward (--prompts, --reward)
  2. states   read with transformers from the base's folder
  3. choice   of layer and weight: with a reward, the server tries the vectors on held-out prompts;
              without, the layer that tells held-out pairs apart best, at weight 1

Kill the command whenever you like: the same command again goes on where it was.
"""

_EPILOG = """\
pairs, one JSON object per line
  {"positive": "…", "negative": "…"}                     two prompts
  {"prompt": "…", "positive": "…", "negative": "…"}      two replies; or with "messages"
prompts and rewards: as of `coxswain train value`

example:
  coxswain train vector --body models/big --pairs pairs.jsonl --out vectors/sunny
  coxswain adapters load sunny ./vectors/sunny
and in a request
  {"adapters": [{"name": "sunny", "weight": 1.0, "where": "reply"}]}

The keys are read from COXSWAIN_API_KEYS (the first of them) and COXSWAIN_ADMIN_KEY where they are
not given. More: docs/guide/train-vector.md
"""

_GROUPS = {
    "what goes in and out": ("body", "out", "pairs", "prompts", "reward", "reward_timeout_s"),
    "the samples": ("samples", "max_tokens", "temperature", "top_p"),
    "the vector": ("direction", "states", "weights", "tried", "held_out", "seed", "dtype"),
    "the server that tries vectors": ("admin_key",),
}


def add(recipes: Any) -> None:
    """Adds the recipe to the sub-commands of `coxswain train`."""
    parser = recipes.add_parser(
        "vector",
        help="a steering vector from contrast pairs, or from a reward",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, VectorSettings, _GROUPS)
    add_common(parser, samples=True)


def run(args: argparse.Namespace) -> int:
    """Trains.

    Returns:
        The exit status.

    Raises:
        AdapterError: something given cannot be used, or the server or the reward fails.
    """
    from adapters.training.vector.train import train

    settings = read_settings(VectorSettings, args, served=served_by(args), device=device(args))
    if settings.admin_key is None:
        settings = replace(settings, admin_key=os.environ.get("COXSWAIN_ADMIN_KEY"))
    found = train(settings, say=lambda line: print(line, file=sys.stderr))
    print(f"layer {found['layer']}, weight {found['weight']:g}: {settings.out}/README.md")
    return 0
