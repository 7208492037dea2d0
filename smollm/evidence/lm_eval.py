"""Claim `lm_eval`: lm-evaluation-harness measures the served, steered model by its own command.

The tasks are in `tasks/`: a text says that a well-known fact has changed, and the reply completes a
sentence about it. Steering is the profile `faithful` of smollm/server.yaml, a model name for
lm-eval; its strength goes with `--gen_kwargs`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from load_tests.clients import environment
from smollm.evidence.claim import Cell, Claim, Plot, Share, Table, above
from smollm.evidence.work import Work

TASKS = Path(__file__).with_name("tasks")
CONFIG = Path(__file__).parents[1] / "server.yaml"
FORMATS = ("moved_complete", "moved_text", "moved_question", "moved_told", "moved_shots")
CHAT = "moved_chat"
STRENGTHS = (0.5, 1.0, 1.5)
COMMAND_S = 900.0
KV_BYTES = 1 << 30
"""Sixteen prompts of some 150 tokens in two streams take a third of it."""

Results = dict[str, dict[str, Share]]
"""Task → metric → share of the questions."""


def run(work: Work) -> Claim:
    """Chooses format and strength on the validation split, then asks the test split."""
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    served = {key: config[key] for key in ("streams", "profiles", "engine")}
    served["engine"] = {**config["engine"], "kv_cache_memory_bytes": KV_BYTES}
    with work.server(served) as url:
        harness = Harness(url, work)
        tried = validated(harness)
        final = tested(harness, tried)
    ours, prompt = final.steered[tried.strength]["follows"], final.plain[tried.prompt]["follows"]
    return Claim(
        name="lm_eval",
        title="lm-eval",
        claim="lm-evaluation-harness measures the steered model as it measures any server's, and "
        "finds that steering makes more replies follow the text than the best prompt does.",
        holds=above(ours, prompt),
        best_prompt=prompt,
        ours=ours,
        how=f"`lm_eval run --model local-chat-completions` on the tasks of smollm/evidence/tasks, "
        f"greedy, {prompt.of} test questions: a text says that a capital, a currency, a language, "
        "an author or an inventor is another. The prompt (five formats of plain text, one of them "
        "with two examples, and the chat template) and the strength were chosen on "
        f"{tried.prompts[tried.prompt]['follows'].of} validation questions. Steering is the "
        "profile `faithful` (`context_aware`): the twin reads the last paragraph alone.",
        tables=(test_table(tried, final), validation_table(tried)),
        plots=(plot(tried, final),),
    )


@dataclass(frozen=True)
class Tried:
    """What the validation split says: format → not steered; (format, strength) → steered."""

    prompts: Results
    steered: dict[tuple[str, float], dict[str, Share]]

    @property
    def prompt(self) -> str:
        """The best prompt."""
        return max(self.prompts, key=lambda name: self.prompts[name]["follows"].value)

    @property
    def best(self) -> tuple[str, float]:
        """The format and the strength that steer best."""
        return max(self.steered, key=lambda at: self.steered[at]["follows"].value)

    @property
    def task(self) -> str:
        """The format that steers best."""
        return self.best[0]

    @property
    def strength(self) -> float:
        """Its strength."""
        return self.best[1]


@dataclass(frozen=True)
class Final:
    """What the test split says: format → not steered; strength → the best format, steered."""

    plain: Results
    steered: dict[float, dict[str, Share]]


def tested(harness: Harness, tried: Tried) -> Final:
    """The test split: the best prompt, and the format that steers best at every strength."""
    names = sorted({tried.prompt, tried.task} - {CHAT})
    plain = harness.asked("test", "faithful", names, 0.0)
    if tried.prompt == CHAT:
        plain |= harness.asked("test", "smollm", [CHAT])
    task = tried.task
    return Final(plain, {s: harness.asked("test", "faithful", [task], s)[task] for s in STRENGTHS})


def test_table(tried: Tried, final: Final) -> Table:
    """The test split's shares."""
    rows: list[tuple[Cell, ...]] = [
        (f"the best prompt, `{tried.prompt}`", "", *_both(final.plain[tried.prompt])),
    ]
    if tried.task != tried.prompt:
        rows.append((f"`{tried.task}`, not steered", "", *_both(final.plain[tried.task])))
    rows += [(f"`{tried.task}`, steered", s, *_both(one)) for s, one in final.steered.items()]
    return Table(
        "Test questions",
        ("asked", "strength", "follows the text", "says what it learned"),
        tuple(rows),
        f"Strength {tried.strength} was chosen on the validation split.",
    )


def validation_table(tried: Tried) -> Table:
    """What the choice was made by."""
    rows: list[tuple[Cell, ...]] = []
    for name, found in tried.prompts.items():
        steered = [tried.steered.get((name, s)) for s in STRENGTHS]
        rows.append(
            (f"`{name}`", found["follows"], *(one["follows"] if one else "" for one in steered))
        )
    columns = ("prompt", "not steered", *(f"strength {s}" for s in STRENGTHS))
    return Table("Validation questions, follows the text", columns, tuple(rows))


def plot(tried: Tried, final: Final) -> Plot:
    """The test split against the strength."""
    found = {0.0: final.plain[tried.task], **final.steered}
    shares = {s: one["follows"] for s, one in found.items()}
    return Plot(
        "Replies that follow the text",
        "strength of context_aware",
        "share of test questions",
        {tried.task: [(s, one.value, one.low, one.high) for s, one in shares.items()]},
    )


def validated(harness: Harness) -> Tried:
    """The validation split: every format at every strength, and the chat template."""
    prompts = harness.asked("validation", "faithful", FORMATS, 0.0)
    prompts |= harness.asked("validation", "smollm", [CHAT])
    return Tried(
        prompts,
        {
            (task, s): found
            for s in STRENGTHS
            for task, found in harness.asked("validation", "faithful", FORMATS, s).items()
        },
    )


class Harness:
    """The command of lm-eval, in the environment of the load tests' clients.

    Args:
        url: of the server.
        work: where it works.
    """

    def __init__(self, url: str, work: Work) -> None:
        self._url, self._work = url, work
        self._program = environment.python()

    def asked(
        self, split: str, model: str, tasks: Sequence[str], strength: float | None = None
    ) -> Results:
        """What one call of the command found.

        Args:
            split: a folder of `tasks/`.
            model: the name that it asks.
            tasks: their names.
            strength: of the steering; None: the server's.

        Raises:
            RuntimeError: the command failed; has its last line.
        """
        out = Path(tempfile.mkdtemp(dir=self._work.folder))
        address = f"{self._url}/v1/chat/completions"
        command = [str(self._program), "-m", "lm_eval", "run", "--model", "local-chat-completions"]
        command += ["--model_args", f"model={model},base_url={address},num_concurrent=16"]
        command += ["--include_path", str(TASKS), "--tasks", *tasks, "--apply_chat_template"]
        command += ["--output_path", str(out)]
        if strength is not None:
            command += ["--gen_kwargs", json.dumps({"steering": {"strength": strength}})]
        if self._work.quick:
            command += ["--limit", str(self._work.few(1000))]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
        done = subprocess.run(
            command,
            cwd=TASKS / split,
            env={**os.environ, **quiet, "HF_HOME": str(self._work.folder.resolve() / "cache")},
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"lm-eval ended with {done.returncode}: {' '.join(lines[-3:])}")
        (file,) = out.rglob("results*.json")
        return read(json.loads(file.read_text("utf-8")))


def read(found: dict[str, Any]) -> Results:
    """The shares in a file of results, which has means."""
    shares: Results = {}
    for task, result in found["results"].items():
        of = found["n-samples"][task]["effective"]
        shares[task] = {
            metric: Share(round(result[f"{metric},none"] * of), of)
            for metric in ("follows", "remembers")
        }
    return shares


def _both(found: dict[str, Share]) -> tuple[Share, Share]:
    return found["follows"], found["remembers"]
