"""Value-augmented sampling on small talk: its settings, what is measured, and the tables.

Pure Python. A *setting* is answered for every test prompt; the sums behind the table are: the true
rewards of :mod:`zoo.small_talk`, KL(setting ‖ base) per reply, and what was run for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from zoo.small_talk import cheerful, terse

MAX_TOKENS = 80
DRAWS = 128
"""Replies of the base for each prompt, out of which the best of n are taken."""
BEST_OF = (1, 4, 16, 64, 128)
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
TRADE_OFF = (
    *((4.0, 0.0), (4.0, 1.0), (4.0, 2.0), (4.0, 4.0)),
    *((4.0, 5.0), (4.0, 6.0), (4.0, 8.0), (0.0, 4.0)),
)
"""(β of cheerful, β of terse)."""
CHOSEN_OF = 16
"""n of the served ``best_of_n``."""


@dataclass(frozen=True)
class Setting:
    """One way to ask.

    ``steering`` is the request's field; ``label`` stands in the table.
    """

    label: str
    steering: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One reply.

    ``kl`` is Σ KL(steered ‖ base) over its tokens in nats, the same mean as log-ratios of the
    replies have with less noise; ``drawn`` the tokens that were generated for it, those of
    replies that were thrown away included; ``passes`` forward passes per token and stream.
    """

    text: str
    kl: float
    drawn: int
    passes: dict[str, float]


def augmented(cheer: float, short: float) -> dict[str, Any]:
    """The steering field with a β for each of the two value models."""
    values = [{"stream": "cheerful", "strength": cheer}, {"stream": "terse", "strength": short}]
    return {"method": "value_augmented", "eos_value": "model", "values": values, "report": True}


def chosen() -> Setting:
    """The server draws and the value model chooses."""
    steering = {"method": "best_of_n", "n": CHOSEN_OF, "value": "cheerful", "report": True}
    return Setting(f"best of {CHOSEN_OF}, chosen by the value model in the server", steering)


REWARD = tuple(Setting(f"values, β {b:g}", augmented(b, 0.0)) for b in STRENGTHS)
BOTH = tuple(Setting(f"β cheerful {c:g}, β terse {s:g}", augmented(c, s)) for c, s in TRADE_OFF)


def best_of(rewards: Sequence[float], n: int) -> float:
    """The expected best of n out of these, drawn without replacement.

    With x sorted upwards, Σ_i x_i C(i, n − 1) / C(len(x), n), i counted from 0.
    """
    ordered = sorted(rewards)
    ways = math.comb(len(ordered), n)
    return sum(x * math.comb(i, n - 1) for i, x in enumerate(ordered)) / ways


def best_of_kl(n: int) -> float:
    """At most how far the best of n is from the base, in nats: log n − (n − 1)/n."""
    return math.log(n) - (n - 1) / n


def reward_table(
    drawn: Sequence[Sequence[str]],
    tokens: float,
    results: Sequence[tuple[Setting, Sequence[Measured]]],
) -> list[str]:
    """Markdown: reward, distance from the base, and cost of each setting.

    Args:
        drawn: for each prompt, ``DRAWS`` replies of the base.
        tokens: mean length of these, in tokens.
        results: the settings, with a reply for each prompt.
    """
    title = (
        f"| {len(drawn)} prompts | sunny words | KL to the base (nats) | generated tokens "
        "| forward passes per token of the reply |"
    )
    lines = [title, "|---|---|---|---|---|"]
    rewards = [[cheerful(None, text) for text in texts] for texts in drawn]
    for n in BEST_OF:
        mean = fmean(best_of(row, n) for row in rewards)
        label = "base alone" if n == 1 else f"best of {n}, chosen by the reward itself"
        bound = "0" if n == 1 else f"≤ {best_of_kl(n):.2f}"
        lines.append(f"| {label} | {mean:.2f} | {bound} | {n * tokens:.0f} | base {n} |")
    for setting, replies in results:
        mean = fmean(cheerful(None, reply.text) for reply in replies)
        served = setting.steering["method"] == "best_of_n"
        kl = f"≤ {best_of_kl(CHOSEN_OF):.2f}" if served else f"{fmean(r.kl for r in replies):.2f}"
        lines.append(
            f"| {setting.label} | {mean:.2f} | {kl} | {fmean(r.drawn for r in replies):.0f} "
            f"| {_passes(replies)} |"
        )
    return lines


def trade_table(results: Sequence[tuple[Setting, Sequence[Measured]]]) -> list[str]:
    """Markdown: how the two rewards give way to each other."""
    lines = [
        f"| {len(results[0][1])} prompts | sunny words | words | sunny words per ten |",
        "|---|---|---|---|",
    ]
    for setting, replies in results:
        sunny = fmean(cheerful(None, reply.text) for reply in replies)
        words = fmean(-10 * terse(None, reply.text) for reply in replies)
        lines.append(f"| {setting.label} | {sunny:.2f} | {words:.1f} | {10 * sunny / words:.2f} |")
    return lines


def _passes(replies: Sequence[Measured]) -> str:
    names = sorted({name for reply in replies for name in reply.passes})
    means = {n: fmean(reply.passes.get(n, 0.0) for reply in replies) for n in names}
    return ", ".join(f"{name} {mean:.2g}" for name, mean in means.items())
