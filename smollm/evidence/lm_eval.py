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
from pathlib import Path
from typing import Any

import yaml

from load_tests.clients import environment
from smollm.evidence.claim import Claim, Plot, Share, Table, above
from smollm.evidence.work import Work

TASKS = Path(__file__).with_name("tasks")
CONFIG = Path(__file__).parents[1] / "server.yaml"
FORMATS = ("moved_complete", "moved_text", "moved_question", "moved_told", "moved_shots")
CHAT = "moved_chat"
STRENGTHS = (0.5, 1.0, 1.5)
COMMAND_S = 900.0

Results = dict[str, dict[str, Share]]
"""Task → metric → share of the questions."""


def run(work: Work) -> Claim:
    """Chooses format and strength on the validation split, then asks the test split."""
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    served = {
        "streams": config["streams"],
        "profiles": {"faithful": config["profiles"]["faithful"]},
    }
    with work.server(served) as url:
        harness = Harness(url, work)
        prompts, strengths = validated(harness)
        best = max(prompts, key=lambda name: prompts[name]["follows"].value)
        task, strength = max(strengths, key=lambda at: strengths[at]["follows"].value)
        names = sorted({best, task} - {CHAT})
        plain = harness.asked("test", "faithful", names, 0.0) if names else {}
        if best == CHAT:
            plain |= harness.asked("test", "smollm", [CHAT])
        curve = {s: harness.asked("test", "faithful", [task], s)[task] for s in STRENGTHS}
    ours, prompt = curve[strength]["follows"], plain[best]["follows"]
    rows: list[tuple[str | float | Share, ...]] = [
        (f"the best prompt, {_name(best)}", "", *_both(plain[best])),
    ]
    if task != best:
        rows.append((f"{_name(task)}, not steered", "", *_both(plain[task])))
    rows += [(f"{_name(task)}, steered", s, *_both(found)) for s, found in curve.items()]
    points = {s: found["follows"] for s, found in {0.0: plain[task], **curve}.items()}
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
        f"{next(iter(prompts.values()))['follows'].of} validation questions. Steering is the "
        "profile `faithful` (`context_aware`): the twin reads the last paragraph alone.",
        tables=(
            Table(
                "Test questions",
                ("asked", "strength", "follows the text", "says what it learned"),
                tuple(rows),
                f"Strength {strength} was chosen on the validation split.",
            ),
            Table(
                "Validation questions, follows the text",
                ("prompt", "not steered", *(f"strength {s}" for s in STRENGTHS)),
                tuple(
                    (
                        _name(name),
                        prompts[name]["follows"],
                        *(
                            strengths[name, s]["follows"] if (name, s) in strengths else ""
                            for s in STRENGTHS
                        ),
                    )
                    for name in prompts
                ),
            ),
        ),
        plots=(
            Plot(
                "Replies that follow the text",
                "strength of context_aware",
                "share of test questions",
                {_name(task): [(s, v.value, v.low, v.high) for s, v in points.items()]},
            ),
        ),
    )


def validated(
    harness: Harness,
) -> tuple[dict[str, dict[str, Share]], dict[tuple[str, float], dict[str, Share]]]:
    """Of the validation split: format → not steered; (format, strength) → steered."""
    prompts = harness.asked("validation", "faithful", FORMATS, 0.0)
    prompts |= harness.asked("validation", "smollm", [CHAT])
    strengths = {
        (task, s): found
        for s in STRENGTHS
        for task, found in harness.asked("validation", "faithful", FORMATS, s).items()
    }
    return prompts, strengths


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


def _name(task: str) -> str:
    return f"`{task}`"
