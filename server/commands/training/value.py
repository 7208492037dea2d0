"""`coxswain train value`: its flags, and the run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from adapters.training.value.settings import ValueSettings
from server.commands.training.flags import (
    add_common,
    add_settings,
    device,
    read_settings,
    served_by,
)

_DESCRIPTION = """\
Trains a value model for the method value_augmented (arXiv 2405.06639): a small model that says, of
a prompt with any beginning of a reply, what reward the whole reply will get. The server then
prefers, among the base's likely tokens, those with a higher value, as strongly as a request says.

  1. sample   a running Coxswain replies to your prompts, so the policy is what is served
  2. reward   your function, classifier or server gives each reply a number r
  3. fit      loss = ½ · mean over t = 0 … L of (V(s_t) − G_t)²
              G_L = r,  G_t = γ ((1 − λ) V(s_{t+1}) + λ G_{t+1}),  V(s_L) := r in it
              s_t: the prompt with the reply's first t tokens; the last is the end of the text

Kill the command whenever you like: the same command again goes on where it was, in each of the
three, and the fit ends with the same bits.
"""

_EPILOG = """\
prompts, one JSON object per line, either of
  {"prompt": "…"}
  {"messages": [{"role": "user", "content": "…"}]}

rewards
  FILE.py:FUNCTION  called as FUNCTION(prompt, reply) in a process of its own; prompt is the text or
                    the messages, reply the text; returns a number
  FOLDER            a sequence classifier of transformers: the logit of its one label, or of two
                    labels the log-odds of the second
  http(s)://…       gets POST {"prompt": …, "reply": "…"}, answers {"reward": number}
Where a reward fails, what is finished is kept: mend it and give the command again.

example:
  coxswain serve server.yaml &
  coxswain train value --server http://127.0.0.1:8000 --prompts prompts.jsonl \\
      --reward rewards.py:brief --body models/small --rank 8 --out heads/brief
then, in server.yaml
  streams:
    brief: {model: models/small, head: value, path: heads/brief}     # without --rank:
    brief: {model: heads/brief, head: value}
and in a request
  {"steering": {"method": "value_augmented", "values": [{"stream": "brief", "strength": 2}],
                "eos_value": "model"}}

If it explains little of the held-out variance: more prompts, then a higher --rate or more --epochs.
Samples and rewards stay in FOLDER.training: copy that folder to OTHER.training, and
--out OTHER fits to them again with other settings.

The key is read from COXSWAIN_API_KEYS (the first of them) where --key is not given.
More: docs/guide/train-value.md
"""


_GROUPS = {
    "what goes in and out": ("prompts", "reward", "reward_timeout_s", "body", "out"),
    "the samples": ("samples", "max_tokens", "temperature", "top_p"),
    "the fit": (
        "rank", "alpha", "lambda_", "gamma", "epochs", "batch", "rate", "held_out", "warm_up",
        "weight_decay", "seed", "save_every", "dtype",
    ),
}  # fmt: skip


def add(recipes: Any) -> None:
    """Adds the recipe to the sub-commands of `coxswain train`."""
    parser = recipes.add_parser(
        "value",
        help="a value model for value-augmented sampling, from your own reward",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, ValueSettings, _GROUPS)
    add_common(parser, samples=True)


def run(args: argparse.Namespace) -> int:
    """Trains.

    Returns:
        The exit status.

    Raises:
        AdapterError: something given cannot be used, or the server or the reward fails.
    """
    from adapters.training.value.fit import shown
    from adapters.training.value.train import train

    settings = read_settings(ValueSettings, args, served=served_by(args), device=device(args))
    explained = train(settings, say=lambda line: print(line, file=sys.stderr))
    served = (
        f"{{model: {settings.out}, head: value}}"
        if settings.rank is None
        else f"{{model: {settings.body}, head: value, path: {settings.out}}}"
    )
    print(f"{shown(explained)}\nserve it as a stream: {served}")
    return 0
