"""Whether the time to the first token tells that the other tenant has sent a prompt before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from load_tests.tenants.findings import Finding
from load_tests.tenants.stage import Prompts, Tenant, key_of
from load_tests.tenants.statistics import Comparison, compare

OWN, MATE, OTHER, NOBODY = "own", "mate", "other", "nobody"
LEVEL = 0.001
"""p-values below it are a difference: one run in a thousand finds one where there is none."""


@dataclass(frozen=True)
class Asking:
    """Who asks.

    Args:
        me: who measures.
        mate: another key of my group.
        you: the other tenant.
        mine: the model that I ask, and my mate.
        yours: the model that the other asks.
    """

    me: Tenant
    mate: Tenant
    you: Tenant
    mine: str
    yours: str


def measured(
    asking: Asking, prompts: Prompts, rounds: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Asks for prompts that I sent before, a key of my group, the other, nobody.

    The four are asked in random order, round by round, so that whatever else changes meanwhile
    changes all alike.

    Args:
        asking: who asks, and who may have asked before.
        prompts: new ones.
        rounds: how many times each.
        seed: of the order.

    Returns:
        By who had sent them: milliseconds to the first token; the most cached tokens reported.
    """
    dice = random.Random(seed)
    times: dict[str, list[float]] = {OWN: [], MATE: [], OTHER: [], NOBODY: []}
    cached = dict.fromkeys(times, 0)
    for _ in range(rounds):
        asked = {kind: prompts.new() for kind in times}
        before = [(asking.me, OWN), (asking.mate, MATE), (asking.you, OTHER)]
        dice.shuffle(before)
        for tenant, kind in before:
            tenant.ask(asking.yours if kind == OTHER else asking.mine, asked[kind])
        for kind in dice.sample(list(times), len(times)):
            seconds, tokens = asking.me.ask(asking.mine, asked[kind])
            times[kind].append(seconds * 1000)
            cached[kind] = max(cached[kind], tokens)
    return times, cached


def judged(where: str, times: dict[str, list[float]], cached: dict[str, int]) -> Iterator[Finding]:
    """What the times and the counts tell."""
    for kind, whose in ((OWN, "of my own"), (MATE, "of a key of my group")):
        found = compare(times[kind], times[NOBODY])
        # What is shared must be seen, or the test would see nothing of the other either.
        blind = "" if found.p < LEVEL and found.faster > 0.5 else "cannot be seen"
        yield Finding(f"{where}: time to the first token, a prompt {whose} against one of nobody",
                      _shown(found), blind)  # fmt: skip
    other = compare(times[OTHER], times[NOBODY])
    leak = "the other has sent it" if other.p < LEVEL else ""
    yield Finding(f"{where}: the same, a prompt of the other tenant against one of nobody",
                  _shown(other), leak)  # fmt: skip
    shown = ", ".join(f"{kind}: {count}" for kind, count in cached.items())
    told = "the other has sent it" if cached[OTHER] else ""
    if not (cached[OWN] and cached[MATE]) or cached[NOBODY]:
        told = "cannot be seen: the counts are not what I sent"
    yield Finding(f"{where}: the most `cached_tokens` by who had sent the prompt", shown, told)


def salted(me: Tenant, you: Tenant, prompts: Prompts) -> Finding:
    """Salts that a request brings: none leads into the other's part of the cache."""
    digest = hashlib.sha256(key_of(you.name).encode()).hexdigest()
    # What the other's part may be called: its group, its key, hashes of them; and one agreed on.
    guesses = [you.name, key_of(you.name), digest, digest[:8], digest[:16]]
    counts = {}
    for guess in guesses:
        prompt = prompts.new()
        you.ask("base", prompt)
        counts[guess] = me.ask("base", prompt, cache_salt=guess)[1]
    prompt = prompts.new()
    you.ask("base", prompt, cache_salt="agreed")
    counts["agreed"] = me.ask("base", prompt, cache_salt="agreed")[1]
    own = me.ask("base", prompt, cache_salt="agreed")[1]
    leak = next((f"`cache_salt` {salt!r} does" for salt, count in counts.items() if count), "")
    what = "a `cache_salt` of mine: the other's group, key or a hash of it, one that both send"
    return Finding(what, f"most cached: {max(counts.values())}, of my own: {own}",
                   leak or ("" if own else "cannot be seen"))  # fmt: skip


def _shown(found: Comparison) -> str:
    low, high = found.interval
    p = f"p < {LEVEL:g}" if found.p < LEVEL else f"p = {found.p:.3f}"
    return (
        f"medians {found.medians[0]:.1f} and {found.medians[1]:.1f} ms, {found.difference:+.1f} ms "
        f"({low:+.1f} to {high:+.1f}); faster with probability {found.faster:.2f}; {p}; "
        f"n = {found.counts[0]}"
    )
