"""`coxswain train value`: its flags, and the run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from server.commands.training.flags import (
    add_held_out,
    add_running,
    add_sampling,
    device,
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
More: docs/train-value.md
"""


def add(recipes: Any) -> None:
    """Adds the recipe to the sub-commands of `coxswain train`."""
    parser = recipes.add_parser(
        "value",
        help="a value model for value-augmented sampling, from your own reward",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_inputs(parser)
    option = parser.add_argument_group("the samples").add_argument
    add_sampling(option, samples=16, max_tokens=64)
    _add_training(parser)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("what goes in and out").add_argument
    option("--prompts", type=Path, required=True, metavar="FILE", help="JSONL, see below")
    option(
        "--reward",
        required=True,
        metavar="REWARD",
        help="FILE.py:FUNCTION, a classifier's folder, or an address",
    )
    option(
        "--reward-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that a function or a server may take for one reward (default: 30)",
    )
    option(
        "--body",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the language model that becomes the value model; its tokenizer is the base's",
    )
    option(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the value model; work lies beside it in FOLDER.training",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("the fit").add_argument
    option(
        "--rank",
        type=int,
        metavar="R",
        help="trains a LoRA of this rank on the body (default: the whole body)",
    )
    option("--alpha", type=float, metavar="X", help="the LoRA's α (default: 2 × rank)")
    option(
        "--lambda",
        type=float,
        default=0.95,
        metavar="X",
        dest="lambda_",
        help="λ; 1 learns from the rewards alone (default: 0.95, the authors')",
    )
    option(
        "--gamma",
        type=float,
        default=1.0,
        metavar="X",
        help="γ; below 1 a reward counts less the later it comes (default: 1)",
    )
    option(
        "--epochs", type=int, default=2, metavar="N", help="passes over the replies (default: 2)"
    )
    option("--batch", type=int, default=32, metavar="N", help="replies per step (default: 32)")
    option("--rate", type=float, default=1e-4, metavar="X", help="learning rate (default: 1e-4)")
    add_held_out(option)
    add_running(
        option,
        warm_up=0.05,
        weight_decay=0.0,
        save_every=100,
        written=", and the body's file decides what is written",
    )


_SAME = ("prompts", "reward", "body", "out", "rank", "alpha", "samples", "max_tokens",
         "temperature", "top_p", "lambda_", "gamma", "epochs", "batch", "rate", "warm_up",
         "weight_decay", "held_out", "seed", "save_every", "dtype")  # fmt: skip


def run(given: argparse.Namespace) -> int:
    """Trains.

    Returns:
        The exit status.

    Raises:
        AdapterError: something given cannot be used, or the server or the reward fails.
    """
    from adapters.training.value.fit import shown
    from adapters.training.value.settings import ValueSettings
    from adapters.training.value.train import train

    settings = ValueSettings(
        served=served_by(given),
        reward_timeout_s=given.reward_timeout,
        device=device(given),
        **{key: getattr(given, key) for key in _SAME},
    )
    found = train(settings, say=lambda line: print(line, file=sys.stderr))
    served = (
        f"{{model: {settings.out}, head: value}}"
        if settings.rank is None
        else f"{{model: {settings.body}, head: value, path: {settings.out}}}"
    )
    print(f"{shown(found)}\nserve it as a stream: {served}")
    return 0
