"""`coxswain train critic`: classifiers for collaborative decoding of critical tokens."""

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
More: docs/train-critic.md
"""

_SAME = ("body", "out", "label", "data", "prompts", "adapter", "probe", "hidden", "rank", "samples",
         "max_tokens", "temperature", "top_p", "epochs", "batch", "rate", "warm_up",
         "weight_decay", "pos_weight", "held_out", "seed", "save_every", "dtype")  # fmt: skip


def add(recipes: Any) -> None:
    """Adds the recipe to the sub-commands of `coxswain train`."""
    parser = recipes.add_parser(
        "critic",
        help="a classifier of critical tokens, for collaborative decoding",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_files(parser)
    _add_replies(parser)
    _add_classifier(parser)
    _add_training(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("what goes in and out").add_argument
    option("--label", required=True, metavar="RULE", help="what is critical; see below")
    option(
        "--body",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the model that the classifier reads with, safetensors; with --probe the aligned one",
    )
    option(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="PEFT LoRA adapter that the aligned stream is served with; for --probe",
    )
    option(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the classifier; all work lies beside it in FOLDER.training until it is complete",
    )


def _add_replies(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("the replies").add_argument
    add_sampling(option, samples=4, max_tokens=256)
    option("--prompts", type=Path, metavar="FILE", help="JSONL; what is sampled from")
    option("--data", type=Path, metavar="FILE", help="JSONL of ready replies, in place of these")
    option(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template for messages in --data (default: the body's own)",
    )
    option(
        "--label-timeout",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds that the rule may take for one reply (default: 10)",
    )


def _add_classifier(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("the classifier").add_argument
    option("--probe", action="store_true", help="a linear head on the frozen body's hidden states")
    option("--hidden", type=int, metavar="N", help="with --probe: a hidden layer of N units")
    option(
        "--rank",
        type=int,
        metavar="N",
        help="without --probe: trains a LoRA of the body (default: all of its weights)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("the training").add_argument
    option(
        "--epochs",
        type=int,
        metavar="N",
        help="passes over the replies (default: 20 with --probe, else 3)",
    )
    option("--batch", type=int, default=16, metavar="N", help="replies per step (default: 16)")
    option(
        "--rate",
        type=float,
        metavar="X",
        help="highest learning rate (default: 1e-3 with --probe, 2e-4 with --rank, else 2e-5)",
    )
    option(
        "--pos-weight",
        type=_weight,
        default=1.0,
        metavar="X",
        help="weight of critical tokens in the loss; auto: as many times as they are rarer. Other "
        "values than 1 shift all probabilities (default: 1)",
    )
    add_held_out(option)
    add_running(option, warm_up=0.05, weight_decay=0.01, save_every=200)


def _weight(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a number or auto (got {text!r})") from error


def run(given: argparse.Namespace) -> int:
    """Runs the recipe.

    Returns:
        The exit status.

    Raises:
        AdapterError: something given cannot be used.
    """
    from adapters.training.critic.measures import table
    from adapters.training.critic.settings import CriticSettings
    from adapters.training.critic.train import train
    from adapters.training.errors import BadRecipe

    for key, default in (("prompts", None), ("model", None), ("request", "{}")):
        if given.data is not None and (value := getattr(given, key)) != default:
            raise BadRecipe(
                "replies are sampled or ready, not both",
                field=f"--{key}",
                value=str(value),
                allowed="not with --data",
            )
    settings = CriticSettings(
        served=served_by(given) if given.data is None else None,
        label_timeout_s=given.label_timeout,
        device=device(given),
        **{key: getattr(given, key) for key in _SAME},
    )
    found = train(settings, template_of(given), say=lambda line: print(line, file=sys.stderr))
    if found["held_out"] is not None:
        print(table(found["held_out"]))
    place = f"model: {given.body}, head: classifier, path: {given.out}"
    if given.probe:
        place = f"on: STREAM, head: classifier, path: {given.out}"
    elif given.rank is None:
        place = f"model: {given.out}, head: classifier"
    print(f"serve it as a stream: {{{place}}}")
    return 0
