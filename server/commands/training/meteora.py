"""`coxswain train meteora`: its flags, and the run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from adapters.training.meteora.settings import Settings
from server.commands.training.flags import (
    add_common,
    add_settings,
    add_template,
    device,
    read_settings,
    template_of,
)

_DESCRIPTION = """\
Trains the gates of a MeteoRA pack (arXiv 2405.13053) over LoRA adapters that you already have: in
every adapted layer a small matrix that decides, token by token, which k adapters answer. Served as
a pack, the caller then need not choose the adapters.

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

More: docs/guide/train-meteora.md
"""


_GROUPS = {
    "what goes in and out": ("base", "adapters", "data", "out"),
    "the gates": ("top_k", "temperature", "gate_factor", "gate_std"),
    "the training": (
        "steps", "batch", "turns", "rate", "adapters_rate", "max_tokens", "warm_up",
        "weight_decay", "seed", "save_every", "dtype",
    ),
}  # fmt: skip


def add(recipes: Any) -> None:
    """Adds the recipe to the sub-commands of `coxswain train`."""
    parser = recipes.add_parser(
        "meteora",
        help="gates that choose among LoRA adapters, per token",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, Settings, _GROUPS, {"adapters": "--adapter", "data": "--data"})
    add_template(parser)
    add_common(parser, samples=False)


def run(args: argparse.Namespace) -> int:
    """Trains.

    Returns:
        The exit status.

    Raises:
        AdapterError: something given cannot be used.
    """
    from adapters.training.meteora.train import train

    settings = read_settings(Settings, args, device=device(args))
    pack = train(settings, template_of(args), say=lambda line: print(line, file=sys.stderr))
    width = sum(pack.ranks) + len(pack.members)
    print(
        f"{settings.out}: {len(pack.members)} adapters, {len(pack.gates)} gates; "
        f"serving it takes adapters.max_rank ≥ {width}"
    )
    return 0
