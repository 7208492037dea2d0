"""The request that tries every stream and head before the engine serves.

A damaged checkpoint gives NaN in every step, or an overflow does; vLLM would serve it. The request
runs all streams at once, and ends by name as any request does whose streams give no numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steering.plan import BASE, SteeringPlan

TOKENS = 8


def plan(sources: Mapping[str, Mapping[str, Any]]) -> SteeringPlan:
    """Sums the language models, and reads the heads.

    Args:
        sources: the streams beside the base, as `steering.engine_args.StreamSource` fields.
    """
    summed = sorted(name for name, s in sources.items() if "head" not in s)
    heads = tuple(sorted(name for name, s in sources.items() if "head" in s))
    bodies = {sources[name].get("on", name) for name in heads} - {BASE, *summed}
    weights = ((BASE, 1.0), *((name, 1.0) for name in summed))
    taps = tuple(name for name in summed if "layer" in sources[name])
    bodies |= {sources[name]["on"] for name in taps} - {BASE}
    return SteeringPlan(
        "probe", weights, report="summary", bodies=tuple(sorted(bodies)), heads=heads, taps=taps
    )


def prompt(size: int) -> list[int]:
    """Token ids from all over the first half of a vocabulary of `size`; padding lies behind."""
    return [size * i // (2 * TOKENS) for i in range(TOKENS)]
