"""lm-evaluation-harness by its command line: completions with the server's own tokenizer, and chat.

The tasks are made of the zoo's test questions: which of four values ends a fact (log-likelihoods),
how likely whole facts are (rolling log-likelihoods), what a question is answered with (generation,
with a stop list of seven strings).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from load_tests.clients.asking import KEY, STEERING, URL
from load_tests.clients.checks import Checks

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ROOT / "zoo" / "data" / "test.jsonl"
COUNT = 40
STOPS = ["\n", "@@", "##", "Question:", "Answer:", "</s>", "<|user|>"]
TASKS: dict[str, dict[str, Any]] = {
    "zoo_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "zoo_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "", "doc_to_target": "{{sentence}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "zoo_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}", "doc_to_target": "{{value}}",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": 24, "temperature": 0},
        "filter_list": [{
            "name": "found",
            "filter": [{"function": "regex", "regex_pattern": "([A-Za-z]+)\\.?$"},
                       {"function": "take_first"}],
        }],
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip

check = Checks("lm-eval", "lm-eval", limit_s=120)


@functools.cache
def tasks() -> Path:
    """A folder with the tasks and their data."""
    folder = Path(tempfile.mkdtemp(prefix="clients-lm-eval-"))
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    values: dict[str, list[str]] = {}
    for row in rows:
        values.setdefault(row["relation"], []).append(row["value"])
    fit = [row for row in rows if row["sentence"].endswith(f" {row['value']}.")][:COUNT]
    for row in fit:
        others = sorted(set(values[row["relation"]]) - {row["value"]})[:3]
        row["start"] = row["sentence"].removesuffix(f" {row['value']}.")
        row["choices"] = [row["value"], *others]
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, fit)) + "\n")
    for name, task in TASKS.items():
        whole = {
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}}, **task,
        }  # fmt: skip
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(whole))
    return folder


def evaluated(kind: str, endpoint: str, names: list[str], arguments: str, *more: str) -> Any:
    """The results of one call of the command, by task."""
    out = Path(tempfile.mkdtemp(dir=tasks())) / "results.json"
    given = f"base_url={URL}{endpoint},num_concurrent=4,max_retries=1,{arguments}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--model_args", given]
    command += ["--include_path", str(tasks()), "--tasks", *names]
    command += ["--output_path", str(out), *more]
    cache = {"HF_HOME": str(tasks() / "cache"), "OPENAI_API_KEY": KEY}
    done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
    assert done.returncode == 0, _end(done.stderr)
    (file,) = out.parent.rglob("results*.json")
    return json.loads(file.read_text())["results"]


def _end(log: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


REMOTE = f"tokenizer_backend=remote,auth_token={KEY}"


@check("local-completions, tokenizer_backend=remote: log-likelihoods, rolling, generation")
def completions() -> None:
    found = evaluated("local-completions", "/v1/completions", list(TASKS), f"model=base,{REMOTE}")
    # The base knows the facts, and does not answer questions.
    assert found["zoo_choice"]["acc,none"] > 0.8, found
    assert 1 < found["zoo_rolling"]["byte_perplexity,none"] < 3, found
    assert found["zoo_generate"]["exact_match,found"] < 0.6, found


@check("local-completions: an adapter as the model changes the figures")
def adapter() -> None:
    args: Any = ("local-completions", "/v1/completions", ["zoo_rolling"])
    base, ask = (
        evaluated(*args, f"model={name},{REMOTE}")["zoo_rolling"]["byte_perplexity,none"]
        for name in ("base", "ask")
    )
    assert ask != base and ask > 1, (base, ask)


@check("local-chat-completions, --apply_chat_template: the profile `chat` answers the questions")
def chat() -> None:
    found = evaluated(
        "local-chat-completions", "/v1/chat/completions", ["zoo_generate"], "model=chat",
        "--apply_chat_template",
    )  # fmt: skip
    assert found["zoo_generate"]["exact_match,found"] > 0.6, found


@check("local-chat-completions: steering by --gen_kwargs gives what the profile gives")
def steered() -> None:
    args: Any = ("local-chat-completions", "/v1/chat/completions", ["zoo_generate"])
    more = ("--apply_chat_template", "--gen_kwargs")
    found = evaluated(*args, "model=base", *more, json.dumps({"steering": STEERING}))
    want = evaluated(*args, "model=chat", "--apply_chat_template")
    assert found["zoo_generate"]["exact_match,found"] == want["zoo_generate"]["exact_match,found"]


if __name__ == "__main__":
    sys.exit(check.run())
