"""Claim `speed`: what a steered step costs at a real vocabulary, and what a draft stream gives.

The steps are measured as `load_tests.step_bench` measures them: every engine in a process of its
own, all asked in turn, ratios taken within a round. Weights are made up there; only the time
matters. Speculation runs on the real weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from load_tests import speculation_bench
from load_tests.rounds import Round, rounds, running
from load_tests.rounds import Work as Step
from load_tests.step_bench import decode_ms
from smollm.convert import MODEL
from smollm.evidence.claim import Cell, Claim, Mean, Table
from smollm.evidence.work import Work

SMALL = MODEL.parent / "evidence" / "small"
"""Where the claim `small` keeps its companions."""
UNTUNED, TUNED = "companion", "tuned"
"""Its folders: the companion as distilled, and tuned."""
SHAPE = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3,
         "num_key_value_heads": 3, "intermediate_size": 512}  # fmt: skip
"""Of the companion where there is none yet: 12 million parameters, most of them in its table."""

ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, "max_model_len": 512,
          "kv_cache_memory_bytes": 1 << 28}  # fmt: skip
"""As smollm/server.yaml; plain vLLM too."""
BASE, COMPANION, STEERED, TWIN = "base", "companion", "steered", "base and twin"
ROWS = (1, 4, 16)
ROUNDS = 6
ALONE = "base alone"
DRAFTS = (2, 4)
TOKENS = 40
FAINT = 1e-3
"""Weight of a stream that only drafts: requests draft only with a stream that they use."""
STRENGTH = 1.0

QUESTIONS = (
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse.",
    "How do I make a cup of tea?",
    "What is photosynthesis?",
    "Give three tips for learning a language.",
    "Describe a day at the beach.",
    "What causes the seasons?",
    "Write a polite email that asks for a day off.",
)


def run(work: Work) -> Claim:
    """Steps first, then drafts if there is a companion."""
    work.folder.mkdir(parents=True, exist_ok=True)
    companion, made_up = companion_folder(work)
    stepped = steps(work, companion)
    ratios = {
        rows: {
            name: Mean.over([ratio(one[rows], name) for one in stepped]) for name in (STEERED, TWIN)
        }
        for rows in map(str, rows_of(work))
    }
    tables = [step_table(stepped, ratios)]
    trained = (SMALL / UNTUNED / "config.json").is_file()
    if trained:
        tables.append(draft_table(*drafted(work)))
    ours = ratios[str(rows_of(work)[-1])][STEERED]
    worst = max(one[STEERED].high for one in ratios.values())
    which = "of the shape that the claim `small` trains" if made_up else "of the claim `small`"
    return Claim(
        name="speed",
        title="Speed",
        claim="At a vocabulary of 49,152 a step steered by two companions takes no longer than the "
        "steps of its three models, each served alone by vLLM.",
        holds=worst <= 1.0,
        best_prompt=None,
        ours=ours,
        how="Decode steps in float32, eager as in smollm/server.yaml, prompts of 64 tokens; "
        f"{ROUNDS} rounds in which all engines take turns, in vLLM's own process, companions "
        f"{which}. The interval is over the rounds. Ours is the ratio at {rows_of(work)[-1]} rows."
        + ("" if trained else " Drafts were not measured: no companion was trained here."),
        tables=tuple(tables),
    )


def rows_of(work: Work) -> tuple[int, ...]:
    """Sizes of batches."""
    return ROWS[:1] if work.quick else ROWS


# --- steps --------------------------------------------------------------------------------------


def companion_folder(work: Work) -> tuple[Path, bool]:
    """A companion's folder, of which only the shape counts; and whether it is a made-up one."""
    if (SMALL / UNTUNED / "config.json").is_file():
        return SMALL / UNTUNED, False
    folder = work.folder / "shape"
    folder.mkdir(exist_ok=True)
    config = json.loads((work.model / "config.json").read_text("utf-8"))
    size = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config | SHAPE | {"head_dim": size}))
    return folder, True


def steps(work: Work, companion: Path) -> list[Round]:
    """The rounds: rows → column → milliseconds of a decode step."""
    common = {"sets": 0, "rank": 0, "adapters": {}, "engine": ENGINE}
    base, small = str(work.model.resolve()), str(companion.resolve())
    kinds: dict[str, dict[str, Any]] = {
        BASE: {**common, "model": base, "ours": False},
        COMPANION: {**common, "model": small, "ours": False},
        STEERED: {**common, "model": base, "ours": True,
                  "streams": {"anti": small, "expert": small}},
        TWIN: {**common, "model": base, "ours": True, "streams": {"twin": None}},
    }  # fmt: skip
    with running(kinds) as engines:
        if missing := sorted(set(kinds) - set(engines)):
            raise RuntimeError(f"did not start: {', '.join(missing)}")
        works: dict[str, Step] = {
            str(n): {
                name: partial(decode_ms, engine, n, n * (name in (STEERED, TWIN)))
                for name, engine in engines.items()
            }
            for n in rows_of(work)
        }
        return rounds(1 if work.quick else ROUNDS, works)


def ratio(one: Mapping[str, float], name: str) -> float:
    """A steered step over its streams' own."""
    alone = one[BASE] + (one[BASE] if name == TWIN else 2 * one[COMPANION])
    return one[name] / alone


def step_table(measured: Sequence[Round], ratios: Mapping[str, Mapping[str, Mean]]) -> Table:
    """Milliseconds, and ratios."""
    columns = ("rows", *(f"{name}, ms" for name in (BASE, COMPANION, STEERED, TWIN)),
               "steered ÷ its three models", "base and twin ÷ base twice")  # fmt: skip
    lines: list[tuple[Cell, ...]] = []
    for rows, found in ratios.items():
        times = [
            Mean.over([one[rows][name] for one in measured]).value
            for name in (BASE, COMPANION, STEERED, TWIN)
        ]
        lines.append((rows, *times, found[STEERED], found[TWIN]))
    return Table("A decode step", columns, tuple(lines))


# --- drafts -------------------------------------------------------------------------------------


def jobs(model: Path) -> dict[str, dict[str, Any]]:
    """The engines by name."""
    base: dict[str, Any] = {"base": str(model.resolve()), "dtype": "float32"}
    untuned = {"companion": str((SMALL / UNTUNED).resolve())}
    faint: dict[str, Any] = {**base, "streams": untuned, "draft": "companion",
             "weights": [("base", 1.0), ("companion", FAINT)]}  # fmt: skip
    found: dict[str, dict[str, Any]] = {ALONE: base}
    found |= {f"base, {n} drafts by the companion": {**faint, "drafts": n} for n in DRAFTS}
    if (SMALL / TUNED / "config.json").is_file():
        weights = [("base", 1.0), ("companion", -STRENGTH), ("tuned", STRENGTH)]
        streams = {**untuned, "tuned": str((SMALL / TUNED).resolve())}
        steered = {**base, "draft": "tuned", "streams": streams, "weights": weights}
        found["steered"] = steered
        found |= {f"steered, {n} drafts by the tuned": {**steered, "drafts": n} for n in DRAFTS}
    return found


def prompts(model: Path) -> list[list[int]]:
    """The questions as the server renders them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in QUESTIONS
    ]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def drafted(work: Work) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rounds: engine → rate and counts; and how alike its replies are to those undrafted."""
    engines: dict[str, speculation_bench.Engine] = {}
    asked = prompts(work.model)[: work.few(len(QUESTIONS), 2)]
    found: list[dict[str, Any]] = []
    replies: dict[str, list[list[int]]] = {}
    try:
        for name, job in jobs(work.model).items():
            engines[name] = speculation_bench.Engine(**job)
        for number in range(1 + (1 if work.quick else ROUNDS)):
            one = {}
            for name, engine in engines.items():
                before = engine.ask(do="counts")
                said = engine.ask(do="replies", prompts=asked, tokens=TOKENS)
                replies[name] = said["replies"]
                after = engine.ask(do="counts")
                one[name] = {"rate": said["rate"]} | {k: after[k] - before[k] for k in after}
            if number:  # the first round warms up
                found.append(one)
    finally:
        for engine in engines.values():
            engine.close()
    return found, {name: alike(own, replies[undrafted(name)]) for name, own in replies.items()}


def undrafted(name: str) -> str:
    """The engine that decodes the same without drafts."""
    return "steered" if name.startswith("steered") else ALONE


def alike(own: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """The share of replies that are the same."""
    return sum(list(a) == list(b) for a, b in zip(own, other, strict=True)) / len(own)


def draft_table(measured: Sequence[dict[str, Any]], same: Mapping[str, float]) -> Table:
    """Tokens per second; ratios within a round; accepted drafts."""
    lines: list[tuple[Cell, ...]] = []
    for name in measured[0]:
        rates = [one[name]["rate"] for one in measured]
        over = [one[name]["rate"] / one[ALONE]["rate"] for one in measured]
        drafts, kept = (sum(one[name][k] for one in measured) for k in ("draft", "accepted"))
        share = f"{100 * kept / drafts:.0f} %" if drafts else ""
        lines.append((name, Mean.over(rates), Mean.over(over), share, f"{100 * same[name]:.0f} %"))
    return Table(
        "Tokens per second, one request at a time, greedy, real text",
        ("engine", "tokens/s", "÷ base alone", "accepted drafts", "same replies as undrafted"),
        tuple(lines),
        f"{len(QUESTIONS)} questions in the chat format, {TOKENS} tokens each. For the base's own "
        f"replies the companion has a weight of {FAINT}: only streams that a request uses draft.",
    )
