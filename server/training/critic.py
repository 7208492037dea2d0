"""`coxswain train critic`: classifiers for collaborative decoding of critical tokens."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from server.adapters_command import URL
from server.training.served import served_by

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
    url = os.environ.get("COXSWAIN_URL", URL)
    option(
        "--server",
        default=url,
        metavar="URL",
        help=f"a running Coxswain to sample from (default: {url}, from COXSWAIN_URL if it is set)",
    )
    option("--key", metavar="KEY", help="an API key; better in COXSWAIN_API_KEYS")
    option("--prompts", type=Path, metavar="FILE", help="JSONL; what is sampled from")
    option("--model", metavar="NAME", help="model or profile to ask for (default: the base)")
    option(
        "--request",
        default="{}",
        metavar="JSON",
        help="further fields of each request, e.g. adapters and steering",
    )
    option(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)"
    )
    option("--samples", type=int, default=4, metavar="N", help="replies per prompt (default: 4)")
    option("--max-tokens", type=int, default=256, metavar="N", help="longest reply (default: 256)")
    option("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    option("--top-p", type=float, default=1.0, metavar="P", help="default: 1")
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
        "--warm-up",
        type=float,
        default=0.05,
        metavar="X",
        help="share of the steps in which the rate rises, then cosine (default: 0.05)",
    )
    option("--weight-decay", type=float, default=0.01, metavar="X", help="AdamW's (default: 0.01)")
    option(
        "--pos-weight",
        type=_weight,
        default=1.0,
        metavar="X",
        help="weight of critical tokens in the loss; auto: as many times as they are rarer. Other "
        "values than 1 shift all probabilities (default: 1)",
    )
    option(
        "--held-out",
        type=float,
        default=0.1,
        metavar="X",
        help="share of the prompts to measure on (default: 0.1)",
    )
    option("--seed", type=int, default=0, metavar="N", help="default: 0")
    option(
        "--save-every",
        type=int,
        default=200,
        metavar="N",
        help="steps between checkpoints (default: 200)",
    )
    option("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    option(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the body's arithmetic; what is trained stays float32 (default: float32)",
    )


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
    import torch

    from adapters.training.critic import train
    from adapters.training.critic_settings import CriticSettings
    from adapters.training.errors import BadRecipe
    from adapters.training.measures import table

    template = None
    if given.chat_template is not None:
        try:
            template = given.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadRecipe(f"cannot be read: {error}", field="--chat-template") from error
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
        device=given.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        **{key: getattr(given, key) for key in _SAME},
    )
    found = train(settings, template, say=lambda line: print(line, file=sys.stderr))
    if found["held_out"] is not None:
        print(table(found["held_out"]))
    place = f"model: {given.body}, head: classifier, path: {given.out}"
    if given.probe:
        place = f"on: STREAM, head: classifier, path: {given.out}"
    elif given.rank is None:
        place = f"model: {given.out}, head: classifier"
    print(f"serve it as a stream: {{{place}}}")
    return 0
