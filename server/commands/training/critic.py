"""`coxswain train critic`: classifiers for collaborative decoding of critical tokens."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from adapters.training.critic.settings import CriticSettings
from server.commands.training.flags import (
    add_common,
    add_settings,
    add_template,
    device,
    read_settings,
    served_by,
    template_of,
)

_DESCRIPTION = """\
Trains a classifier that reads a reply as it is written and says, before each token, how likely it
is to be critical: one that the pretrained model should choose, because it knows the facts that
tuning has blurred (collaborative decoding, arXiv 2402.17982).

  1. replies are sampled from a running server, from the aligned model exactly as it is served
     (or come ready-made with --data);
  2. a rule of yours marks the characters in them that are critical;
  3. a classifier learns to foretell that: a probe on the aligned model's own hidden states, which
     costs nothing to serve (--probe), or a model of its own (LoRA with --rank).

Kill the command whenever you like: the same command again continues where it was, in the samples,
the labels or the training, and ends with the same bits.
"""

_EPILOG = """\
rules, for --label:
  names             numbers, and capitalised words that do not begin a sentence
  FILE.py:FUNCTION  your own: function(prompt, reply) → [[start, end], …], characters of the reply;
                    prompt is the text or the list of messages. Runs in a process of its own.
  http(s)://…       POST {"prompt": …, "reply": "…"} → [[start, end], …]
  data              the `spans` of each line of --data

files, one JSON object per line:
  --prompts  {"prompt": "…"}  or  {"messages": [{"role": "user", "content": "…"}]}
  --data     the same with "completion": "…" and, for --label data, "spans": [[start, end], …]

example: a probe on a base that is served with the LoRA adapter `tuned`
  coxswain train critic --server http://127.0.0.1:8000 --prompts prompts.jsonl \\
      --request '{"adapters": [{"name": "tuned"}]}' --label facts.py:spans \\
      --body models/base --adapter adapters/tuned --probe --hidden 64 --out models/critic

then, in the server's configuration:
  streams:
    critic: {on: base, head: classifier, path: ./models/critic}

If recall is low: more replies, --pos-weight auto (it raises all probabilities), or --hidden.
Samples and labels stay in FOLDER.training: copy that folder to OTHER.training, and --out OTHER
trains on them again with other settings.

The key is read from COXSWAIN_API_KEYS (the first of them) where --key is not given.
More: docs/guide/train-critic.md
"""

_GROUPS = {
    "what goes in and out": ("label", "label_timeout_s", "body", "adapter", "out"),
    "the replies": ("prompts", "data", "samples", "max_tokens", "temperature", "top_p"),
    "the classifier": ("probe", "hidden", "rank"),
    "the training": (
        "epochs", "batch", "rate", "pos_weight", "held_out", "warm_up", "weight_decay", "seed",
        "save_every", "dtype",
    ),
}  # fmt: skip


def add(recipes: Any) -> None:
    """Adds the recipe to the sub-commands of `coxswain train`."""
    parser = recipes.add_parser(
        "critic",
        help="a classifier of critical tokens, for collaborative decoding",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, CriticSettings, _GROUPS)
    add_template(parser)
    add_common(parser, samples=True)


def run(args: argparse.Namespace) -> int:
    """Runs the recipe.

    Returns:
        The exit status.

    Raises:
        AdapterError: something given cannot be used.
    """
    from adapters.training.critic.measures import table
    from adapters.training.critic.train import train
    from adapters.training.errors import BadRecipe

    for key, default in (("prompts", None), ("model", None), ("request", "{}")):
        if args.data is not None and (value := getattr(args, key)) != default:
            raise BadRecipe(
                "replies are sampled or ready, not both",
                field=f"--{key}",
                value=str(value),
                allowed="not with --data",
            )
    served = served_by(args) if args.data is None else None
    settings = read_settings(CriticSettings, args, served=served, device=device(args))
    report = train(settings, template_of(args), say=lambda line: print(line, file=sys.stderr))
    if report["held_out"] is not None:
        print(table(report["held_out"]))
    place = f"model: {args.body}, head: classifier, path: {args.out}"
    if args.probe:
        place = f"on: STREAM, head: classifier, path: {args.out}"
    elif args.rank is None:
        place = f"model: {args.out}, head: classifier"
    print(f"serve it as a stream: {{{place}}}")
    return 0
