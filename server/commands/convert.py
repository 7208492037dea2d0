"""`coxswain convert-vectors`: steering vectors as other projects keep them, as our own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Writes steering vectors of other projects as folders that a server takes (safetensors and a config).
A server never opens a pickle; this command reads them with torch.load(weights_only=True).

  vec_layer_<n>….pt, or a folder of them    CAA: behind decoder layer n, counted from 0
  FILE.pt                                   a tensor (with --layers n), or tensors by layer
  FILE.svec                                 IBM activation-steering: what acts at the input of its
                                            layer n acts here behind layer n − 1
  FILE.svec --condition FILE.svec           CAST: acts where a condition is met
  a folder of pyreft's                      LoReFT, with --positions as it was trained
  FILE_head_wise.npy                        ITI: activations [n, L, H D], with --labels and --heads
  directions.safetensors, or .npy           ITI: directions [L, H, D] and sigma [L, H]
  a checkpoint with attn_A and attn_v       LoFiT
"""

_EPILOG = """\
examples:
  coxswain convert-vectors vec_layer_13_Llama-2-7b-chat-hf.pt vectors/sycophancy
  coxswain convert-vectors refusal.svec vectors/refusal --layers 15-23 --scale 1.5
  coxswain convert-vectors refusal.svec vectors/guard --layers 15-23 --scale 1.5 \
      --condition harmful.svec --condition-layers 7 --above 0.016
  coxswain convert-vectors ./reft_to_share vectors/reft --positions f7+l7
  coxswain convert-vectors llama_tqa_head_wise.npy vectors/honest --labels llama_tqa_labels.npy \\
      --heads 14:1,14:18,12:5 --model models/llama --scale 15
  coxswain convert-vectors ./llama2_7B_base_lofit_truthfulqa vectors/truthful
  coxswain adapters load sycophancy ./vectors/sycophancy

GGUF control vectors and safetensors need no conversion. More: docs/guide/vectors.md
"""


def add(commands: Any) -> None:
    """Adds the command to the command line's grammar."""
    parser = commands.add_parser(
        "convert-vectors", help="steering vectors from pickles into our format",
        description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a file or folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that is made")
    parser.add_argument(
        "--layers", metavar="N-M", help="as the source counts them, e.g. 13 or 15-23 (default: all)"
    )
    parser.add_argument("--positions", metavar="f7+l7",
                        help="of pyreft's folders: the prompt's positions they change")  # fmt: skip
    parser.add_argument("--scale", type=float, default=1.0, metavar="X",
                        help="what weight 1 of a request stands for (default: 1)")  # fmt: skip
    heads = parser.add_argument_group("heads of ITI and LoFiT")
    heads.add_argument("--heads", metavar="L:H,…",
                       help="to change, layer:head from 0, or a .npy file [K, 2]")  # fmt: skip
    heads.add_argument("--labels", metavar="FILE.npy", type=Path,
                       help="ITI: 1 or 0 for each row of the activations in SOURCE")  # fmt: skip
    heads.add_argument("--activations", metavar="FILE.npy", type=Path,
                       help="ITI: to find sigma along the directions in SOURCE")  # fmt: skip
    heads.add_argument("--model", metavar="FOLDER", type=Path,
                       help="the checkpoint that they are for")  # fmt: skip
    when = parser.add_argument_group("a condition (CAST)")
    when.add_argument("--condition", metavar="SOURCE", type=Path,
                      help="the condition's vectors, as SOURCE")  # fmt: skip
    when.add_argument("--condition-layers", metavar="N-M",
                      help="as the source counts them; one that is met is enough")  # fmt: skip
    when.add_argument("--above", type=float, metavar="X",
                      help="met above this similarity ('smaller' in their code)")  # fmt: skip
    when.add_argument("--below", type=float, metavar="X",
                      help="met below it ('larger' in their code)")  # fmt: skip
    when.add_argument("--gate", choices=("prompt", "token"), default="prompt",
                      help="what decides: the prompt, for the whole reply; or each token for "
                      "itself (default: prompt)")  # fmt: skip
    when.add_argument("--read", choices=("mean", "last"), default="mean",
                      help="which of a prompt's states (default: mean of all)")  # fmt: skip
    when.add_argument("--similarity", choices=("projected", "cosine"), default="projected",
                      help="as the paper has it (default), or the cosine")  # fmt: skip


def _when(args: argparse.Namespace) -> Any:
    """The condition that is asked for, or None."""
    from adapters.convert import When, read_layers
    from adapters.errors import BadSource

    if args.condition is None:
        for name in ("condition_layers", "above", "below"):
            if getattr(args, name) is not None:
                raise BadSource("needs --condition", field=f"--{name.replace('_', '-')}")
        return None
    if args.condition_layers is None:
        raise BadSource("says no layer of the condition", field="--condition-layers",
                        allowed="e.g. 7")  # fmt: skip
    layers = read_layers(args.condition_layers)
    return When(args.condition, layers, args.above, args.below, args.gate, args.read,
                args.similarity)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Converts.

    Returns:
        The exit status: 1 where something cannot be converted; the reason is on standard error.
    """
    from adapters.convert import Request, convert, read_layers
    from adapters.convert_heads import HeadFiles
    from adapters.errors import AdapterError

    try:
        layers = None if args.layers is None else read_layers(args.layers)
        beside = HeadFiles(args.labels, args.activations, args.heads, args.model)
        request = Request(
            args.source, args.out, layers, args.positions, args.scale, beside, _when(args)
        )
        made = convert(request)
    except (AdapterError, OSError) as error:
        print(f"coxswain: {error}", file=sys.stderr)
        return 1
    for folder in made:
        print(folder)
    return 0
