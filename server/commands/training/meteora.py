"""`coxswain train meteora`: its flags, and the run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from server.commands.training.flags import add_running, device, template_of

_DESCRIPTION = """\
Trains the gates of a MeteoRA pack (arXiv 2405.13053) over LoRA adapters that you already have: in
every adapted layer a small matrix that decides, token by token, which k adapters answer. Served as
a pack, the adapters then need not be chosen by whoever asks.

  loss = language model's cross-entropy + 50 × mean over the gates of CE(gate scores, adapter)

The result is a folder that `coxswain serve` loads like any adapter. Kill the command whenever you
like: the same command again continues after the last checkpoint and ends with the same bits.
"""

_EPILOG = """\
data, one JSON object per line, either of
  {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
  {"prompt": "…", "completion": "…"}
a few hundred lines per adapter, of what that adapter is for. Held-out lines are yours to keep.

example:
  coxswain train meteora --base models/big --out adapters/pack \\
      --adapter sum=adapters/sum --data sum=data/sum.jsonl \\
      --adapter sort=adapters/sort --data sort=data/sort.jsonl --turns 4

If the pack answers worse than the adapters chosen by hand: more --steps, or a higher --rate with
--gate-std 0.02; then --adapters-rate 1e-3 --gate-factor 1, which trains the adapters with the
gates, as the authors did. Conversations that change the subject need --turns.

More: docs/train-meteora.md
"""


def add(recipes: Any) -> None:
    """Adds the recipe to the sub-commands of `coxswain train`."""
    parser = recipes.add_parser(
        "meteora",
        help="gates that choose among LoRA adapters, per token",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_inputs(parser)
    _add_gates(parser)
    _add_training(parser)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what goes in and out")
    option = group.add_argument
    option("--base", type=Path, required=True, metavar="FOLDER", help="the base model, safetensors")
    option(
        "--adapter",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        type=_named,
        help="a PEFT LoRA adapter; once for each, in the order of the gates' rows",
    )
    option(
        "--data",
        action="append",
        required=True,
        metavar="NAME=FILE",
        type=_named,
        help="JSONL with examples of what the adapter NAME is for",
    )
    option(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the pack; checkpoints lie beside it in FOLDER.training until it is complete",
    )
    option(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template for messages (default: the base's own)",
    )


def _add_gates(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("the gates").add_argument
    option(
        "--top-k",
        type=int,
        default=2,
        metavar="K",
        help="adapters per token, in training and as the pack's default (default: 2)",
    )
    option(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="the pack's default T when it is served; more evens the k shares out "
        "(default: 1; the paper takes 15 to 30 for conversations of many tasks)",
    )
    option(
        "--gate-factor",
        type=float,
        default=50.0,
        metavar="X",
        help="weight of the gates' loss beside the language model's (default: 50)",
    )
    option(
        "--gate-std",
        type=float,
        default=1.0,
        metavar="X",
        help="the gates start as N(0, X²); less than the paper's 1 learns sooner (default: 1)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("the training").add_argument
    option(
        "--steps",
        type=int,
        default=2000,
        metavar="N",
        help="optimizer steps (default: 2000; the paper: 15000)",
    )
    option("--batch", type=int, default=16, metavar="N", help="examples per step (default: 16)")
    option(
        "--turns",
        type=int,
        default=1,
        metavar="N",
        help="joins up to N examples into one conversation, so that gates learn to change in "
        "its midst; needs messages (default: 1)",
    )
    option(
        "--rate",
        type=float,
        default=5e-4,
        metavar="X",
        help="learning rate of the gates (default: 5e-4, the paper's)",
    )
    option(
        "--adapters-rate",
        type=float,
        metavar="X",
        help="trains the adapters too, at this rate (default: they stay as they are)",
    )
    option(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest example (default: the base's positions, 1024 at most)",
    )
    add_running(option, warm_up=0.005, weight_decay=0.01, save_every=100)


def _named(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"not NAME=PATH (got {text!r})")
    return name, Path(path)


def run(given: argparse.Namespace) -> int:
    """Trains.

    Returns:
        The exit status.

    Raises:
        AdapterError: something given cannot be used.
    """
    from adapters.training.meteora.settings import Settings
    from adapters.training.meteora.train import train

    adapters, data = _unique("adapter", given.adapter), _unique("data", given.data)
    same = (
        "base",
        "out",
        "top_k",
        "temperature",
        "gate_factor",
        "gate_std",
        "steps",
        "batch",
        "turns",
        "rate",
        "adapters_rate",
        "warm_up",
        "weight_decay",
        "max_tokens",
        "seed",
        "save_every",
        "dtype",
    )
    settings = Settings(
        adapters=adapters,
        data=data,
        device=device(given),
        **{key: getattr(given, key) for key in same},
    )
    pack = train(settings, template_of(given), say=lambda line: print(line, file=sys.stderr))
    width = sum(pack.ranks) + len(pack.members)
    print(
        f"{settings.out}: {len(pack.members)} adapters, {len(pack.gates)} gates; "
        f"serving it takes adapters.max_rank ≥ {width}"
    )
    return 0


def _unique(key: str, pairs: list[tuple[str, Path]]) -> dict[str, Path]:
    from adapters.training.errors import BadRecipe

    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise BadRecipe("given twice", field=f"--{key} {name}", allowed="each name once")
    return dict(pairs)
