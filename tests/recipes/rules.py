"""The papers' formulas of the read-out's sums, masks and selections, plainly in float64, each with
the request that does it here: `test_at_once` holds the engine to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.engine.driver import Case, Engine
from tests.engine.heads import Headed, deferring, valued
from tests.models import VOCAB_SIZE
from tests.reference import load, scores

Row = npt.NDArray[np.float64]
WARM_UP = 3


def log_p(s: Row) -> Row:
    shifted = s - s.max()
    found: Row = shifted - np.log(np.exp(shifted).sum())
    return found


def masked(s: Row, kept: npt.NDArray[np.bool_]) -> Row:
    return np.where(kept, s, -np.inf)


def pad(s: Mapping[str, Row], _n: int) -> Row:
    """The published form: both log-softmaxes over the base's ten most likely ids."""
    kept = np.argsort(-s["base"])[:10]
    found = np.full(s["base"].size, -np.inf)
    own, rm = log_p(s["base"][kept]), log_p(s["chat"][kept])
    found[kept] = s["base"][kept] + 0.8 * (rm - own)
    return found


def uld(s: Mapping[str, Row], _n: int) -> Row:
    own = log_p(s["base"])
    floor = min(own.max() + np.log(0.1), np.sort(own)[::-1][int(0.1 * own.size) - 1])
    return masked(own - 0.8 * s["chat"], own >= floor)


def safe(s: Mapping[str, Row], n: int) -> Row:
    base, expert = (np.exp(log_p(s[name])) for name in ("base", "third"))
    if n >= 2:
        return log_p(s["base"])
    orders, size = [np.argsort(-p) for p in (base, expert)], 5
    while len(common := set(orders[0][:size]) & set(orders[1][:size])) < 5:
        size += 1
    found = np.full(base.size, -np.inf)
    for v in common:
        found[v] = np.log(max(base[v] + 3 * (expert[v] - base[v]), 1e-8))
    return found


def nudged(s: Mapping[str, Row], _n: int) -> Row:
    return s["chat"] if np.exp(log_p(s["base"])).max() < 0.3 else s["base"]


def deferred(s: Mapping[str, Row], _n: int) -> Row:
    return s["chat"] if 1 / (1 + np.exp(-s["defer"][0])) > 0.5 else s["base"]


def composed(s: Mapping[str, Row], _n: int) -> Row:
    d = 1 / (1 + np.exp(-s["defer"][0]))
    if d <= 0.5:
        return s["base"]
    return np.log((1 - d) * np.exp(log_p(s["base"])) + d * np.exp(log_p(s["chat"])))


def remembered(s: Mapping[str, Row], _n: int) -> Row:
    return np.logaddexp(np.log(0.75) + log_p(s["base"]), np.log(0.25) + log_p(s["chat"]))


def pair(s: Mapping[str, Row], _n: int) -> Row:
    return s["base"] + 1.0 * (s["chat"] - s["plain"])


PAIR = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 1.0}
SELECT = {"method": "select", "second": "chat"}
DEFER = {**SELECT, "gate": "classifier", "classifier": "defer"}
Formula = Callable[[Mapping[str, Row], int], Row]


def mix(**weights: float) -> dict[str, Any]:
    return {"method": "mix", "weights": weights}


def guided(**more: str) -> dict[str, Any]:
    values = [{"stream": "value", "strength": 1.5}]
    return {"method": "value_augmented", "values": values, "top_k": K, "mask": True,
            "centre": False, "eos_value": "model", **more}  # fmt: skip


K = 5
HERE: dict[str, tuple[dict[str, Any], Formula]] = {
    "GenARM": (mix(base=1, chat=1), lambda s, _: s["base"] + log_p(s["chat"])),
    "UniR": (mix(base=1, plain=1), lambda s, _: s["base"] + s["plain"]),
    "PAD": ({**mix(base=0.2, chat=0.8), "top_k": 10}, pad),
    "MOD": (
        mix(base=0, chat=0.6, plain=0.4),
        lambda s, _: 0.6 * log_p(s["chat"]) + 0.4 * log_p(s["plain"]),
    ),
    "DeRa": (
        mix(base=-0.5, chat=1.5),
        lambda s, _: (1 - 1.5) * log_p(s["base"]) + 1.5 * log_p(s["chat"]),
    ),
    "RAST": (PAIR, pair),
    "ThinkLogit": (PAIR, pair),
    "ThinkLogit, warm-up": (
        {**PAIR, "phases": [{"first": WARM_UP, "off": True}]},
        lambda s, n: s["base"] if n < WARM_UP else pair(s, n),
    ),
    "δ-unlearning": (PAIR, pair),
    "ULD": ({**mix(base=1, chat=-0.8), "plausibility": 0.1, "top_share": 0.1}, uld),
    "ROSE": (mix(base=1, twin=-0.5), lambda s, _: s["base"] - 0.5 * s["twin"]),
    "SafeDecoding": ({"method": "safe_decoding", "expert": "third"}, safe),
    "Nudging": ({**SELECT, "gate": "confidence", "threshold": 0.3, "ends": "second"}, nudged),
    "Co-LLM": (DEFER, deferred),
    "Co-LLM, compose": ({**DEFER, "mode": "soft", "threshold": 0.5}, composed),
    "ARGS": (guided(), lambda s, _: s["base"] + 1.5 * s["value"]),
    "RAD": (guided(transform="clip"), lambda s, _: s["base"] + 1.5 * s["value"].clip(-np.inf, 1)),
    "FUDGE": (
        guided(transform="log_sigmoid"),
        lambda s, _: s["base"] - 1.5 * np.log1p(np.exp(-s["value"])),
    ),
    "Memory Decoder": ({**SELECT, "gate": "constant"}, remembered),
}


def make_heads(folder: Path, _bodies: Mapping[str, Path]) -> dict[str, Headed]:
    return {
        "defer": deferring(folder / "defer", 14, VOCAB_SIZE),
        "value": valued(folder / "value", "qwen2", 21),
    }


def rows(engine: Engine, case: Case, reply: Sequence[int]) -> dict[str, Row]:
    """What the formulas read: [V] scores of each stream behind a reply, and the heads' numbers."""
    found: dict[str, Row] = {}
    for name, folder in {**engine.folders, "twin": engine.folders["base"]}.items():
        ids = [*case.own.get(name, case.prompt), *reply]
        found[name] = scores(load(folder), ids)[-1][:VOCAB_SIZE]
    found["defer"] = np.array([engine.heads["defer"].read([*case.prompt, *reply])])
    if case.spec is not None and case.spec["method"] == "value_augmented":
        found["value"] = np.full(VOCAB_SIZE, -np.inf)
        for v in np.argsort(-found["base"])[:K]:
            value = engine.heads["value"].read([*case.prompt, *reply, int(v)])
            found["value"][v] = max(value, 0.0) if case.spec.get("transform") == "clip" else value
    return found
