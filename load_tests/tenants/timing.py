"""Whether the time to the first token tells that the other tenant has sent a prompt before."""

from __future__ import annotations

import random
from collections.abc import Iterator

from load_tests.tenants.findings import Finding
from load_tests.tenants.stage import Prompts, Tenant
from load_tests.tenants.statistics import Comparison, compare

OWN, OTHER, NOBODY = "own", "other", "nobody"
LEVEL = 0.001
"""p-values below it are a difference: one run in a thousand finds one where there is none."""


def measured(
    me: Tenant, models: dict[str, str], you: Tenant, prompts: Prompts, rounds: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Asks for prompts that I sent before, that you sent before, that nobody did.

    The three are asked in random order, round by round, so that whatever else changes meanwhile
    changes all alike.

    Args:
        me: who asks.
        models: tenant → the model that it asks.
        you: the other.
        prompts: new ones.
        rounds: how many times each.
        seed: of the order.

    Returns:
        By who had sent them: milliseconds to the first token; the most cached tokens told.
    """
    dice = random.Random(seed)
    times: dict[str, list[float]] = {OWN: [], OTHER: [], NOBODY: []}
    cached = dict.fromkeys(times, 0)
    for _ in range(rounds):
        asked = {kind: prompts.new() for kind in times}
        before = [(me, asked[OWN]), (you, asked[OTHER])]
        dice.shuffle(before)
        for tenant, prompt in before:
            tenant.ask(models[tenant.name], prompt)
        for kind in dice.sample(list(times), 3):
            seconds, tokens = me.ask(models[me.name], asked[kind])
            times[kind].append(seconds * 1000)
            cached[kind] = max(cached[kind], tokens)
    return times, cached


def judged(where: str, times: dict[str, list[float]], cached: dict[str, int]) -> Iterator[Finding]:
    """What the times and the counts tell."""
    own, other = (compare(times[kind], times[NOBODY]) for kind in (OWN, OTHER))
    blind = "" if own.p < LEVEL and own.faster > 0.5 else "cannot be seen: the test sees nothing"
    yield Finding(f"{where}: time to the first token, a prompt of my own against one of nobody",
                  _shown(own), blind)  # fmt: skip
    leak = "the other has sent it" if other.p < LEVEL else ""
    yield Finding(f"{where}: the same, a prompt of the other tenant against one of nobody",
                  _shown(other), leak)  # fmt: skip
    shown = ", ".join(f"{kind}: {count}" for kind, count in cached.items())
    told = "the other has sent it" if cached[OTHER] else ""
    if not cached[OWN] or cached[NOBODY]:
        told = "cannot be seen: the counts are not what I sent"
    yield Finding(f"{where}: the most `cached_tokens` by who had sent the prompt", shown, told)


def _shown(found: Comparison) -> str:
    low, high = found.interval
    p = f"p < {LEVEL:g}" if found.p < LEVEL else f"p = {found.p:.3f}"
    return (
        f"medians {found.medians[0]:.1f} and {found.medians[1]:.1f} ms, {found.difference:+.1f} ms "
        f"({low:+.1f} to {high:+.1f}); faster with probability {found.faster:.2f}; {p}; "
        f"n = {found.counts[0]}"
    )
