"""Whole runs on tiny models: what is written is served, resumes to the same bits, learns."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from adapters.training import checkpoint
from adapters.training.critic import train as critic
from adapters.training.critic.classifiers import Row, features, load_body
from adapters.training.critic.measures import measures, table
from adapters.training.critic.replies import Reply, row
from adapters.training.critic.settings import CriticSettings
from adapters.training.critic.train import REPORT, train
from adapters.training.errors import BadRecipe
from server.main import run
from steering.heads import HeadFile, body_architecture, find_head, is_head
from tests.adapters.make import make_lora
from tests.adapters.models import Applied, adapted
from tests.models import EOS, make_model, make_tokenizer

pytestmark = pytest.mark.slow

THINGS = ["apples", "pears", "plums", "boats", "mills"]

RULE = """
import re

def numbers(prompt, reply):
    return [m.span() for m in re.finditer(r"[0-9]+", reply)]
"""
"""What the data below marks."""


def lines(count: int) -> list[dict[str, Any]]:
    """Replies of five forms; a number comes behind "were" and "in"."""
    rng, found = random.Random(1), []
    for i in range(count):
        thing, number = rng.choice(THINGS), rng.randint(1, 99)
        text = f" There were {number} {thing} in the basket."
        if i % 2:
            text = f" The {thing} were built in {number}."
        spans = [[text.index(str(number)), text.index(str(number)) + len(str(number))]]
        prompt: dict[str, Any] = {"prompt": f"What of the {thing}? {i // 2}"}
        if i % 4 == 0:
            prompt = {"messages": [{"role": "user", "content": f"What of the {thing}? {i}"}]}
        found.append({**prompt, "completion": text, "spans": spans})
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CriticSettings:
    """A body, an adapter of it, ready replies, a rule; a probe with a hidden layer, 15 steps."""
    folder = tmp_path_factory.mktemp("critic")
    torch.set_num_threads(1)
    body = make_model(folder / "body", "llama", seed=3)
    adapter = make_lora(folder / "adapter", body, seed=4, use_rslora=True, r=3)
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines(160))))
    (folder / "rule.py").write_text(RULE)
    return CriticSettings(
        body,
        folder / "critic",
        f"{folder / 'rule.py'}:numbers",
        data=data,
        adapter=adapter,
        probe=True,
        hidden=24,
        epochs=5,
        batch=48,
        rate=1e-2,
        save_every=2,
    )


def quiet(line: str) -> None:
    """Says nothing."""


def bits(folder: Path) -> dict[str, str]:
    """Hash of every file of a classifier."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def whole(made: CriticSettings) -> dict[str, str]:
    """The files of an uninterrupted run."""
    train(made, say=quiet)
    return bits(made.out)


def read(head: HeadFile, hidden: torch.Tensor) -> torch.Tensor:
    """[N] float64 logits of a head on [N, H], from its file."""
    x = hidden.double()
    for i, layer in enumerate(head.layers):
        tensors = load_file(layer.weight.file)
        assert layer.bias is not None
        x = getattr(torch, head.activation)(x) if i else x
        x = x @ tensors[layer.weight.name].double().T + tensors[layer.bias.name].double()
    return x[:, 0]


def flat(found: dict[str, Any]) -> list[float]:
    """The numbers of `measures`."""
    lines = [found[key] for key in ("tokens", "critical", "auc")]
    return lines + [value for line in found["thresholds"] for value in line.values()]


def slow_rows(data: Path) -> list[tuple[list[int], list[bool]]]:
    """Per line: all ids, and the labels of the states from the prompt's last token on.

    The slow way: the tokenizer's offsets, character by character.
    """
    tokenizer, found = make_tokenizer(), []
    for entry in map(json.loads, data.read_text().splitlines()):
        if "messages" in entry:
            ids = tokenizer.apply_chat_template(
                entry["messages"], add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer(entry["prompt"])["input_ids"]
        text = entry["completion"]
        coded = tokenizer(text, return_offsets_mapping=True)
        marked = {i for start, end in entry["spans"] for i in range(start, end)}
        shown = {i for i, c in enumerate(text) if c != " "}
        labels = [bool(marked & shown & set(range(*o))) for o in coded["offset_mapping"]]
        found.append(([*ids, *coded["input_ids"]], [*labels, False]))
    return found


@pytest.mark.parametrize("hidden", [None, 24])
def test_a_probe_is_what_is_served_on_base_and_adapter(
    made: CriticSettings, tmp_path: Path, hidden: int | None
) -> None:
    """The report's numbers come out of the written head on PEFT's hidden states."""
    settings = dataclasses.replace(
        made, out=tmp_path / "critic", hidden=hidden, held_out=0.4, epochs=30
    )
    report = train(settings, say=quiet)
    head = find_head(settings.out, "classifier", 128)
    assert (len(head.layers), head.rows, head.width) == (1 if hidden is None else 2, "one", 128)
    assert made.adapter is not None and made.data is not None
    model = adapted(made.body, (Applied(made.adapter),))
    scores, targets = [], []
    entries = [json.loads(line) for line in made.data.read_text().splitlines()]
    replies = [Reply("", e.get("prompt") or e["messages"], (), (), "", True) for e in entries]
    _, held = critic._split(replies, 0.4, settings.seed)
    for i in held:
        ids, labels = slow_rows(made.data)[i]
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        scores.append(read(head, states[-len(labels) :]))
        targets += labels
    found = measures(torch.cat(scores), torch.tensor(targets))
    assert flat(report["held_out"]) == pytest.approx(flat(found))
    assert found["auc"] > 0.8 and 0.1 < found["critical"] < 0.4


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "opt"])
def test_states_are_the_last_hidden_states_whatever_the_batch(
    tmp_path: Path, architecture: str
) -> None:
    body = make_model(tmp_path / "body", architecture, seed=7)
    rng = random.Random(2)
    ids = [tuple(rng.randrange(7, 400) for _ in range(n)) for n in (9, 3, 17, 5)]
    rows = [Row(i, len(i) - 3, (True, False, False)) for i in ids]

    class Bar:
        def update(self, n: int) -> None: ...

    found = features(load_body(body, None, "float32", "cpu"), rows, 3, "cpu", Bar())
    model = AutoModelForCausalLM.from_pretrained(body, dtype=torch.float32).eval()
    for one, states in zip(rows, found, strict=True):
        with torch.inference_mode():
            out = model(torch.tensor([one.ids]), output_hidden_states=True)
            # What the unembedding gets is what `compute_logits` gets.
            scores = model.get_output_embeddings()(states)
        torch.testing.assert_close(states, out.hidden_states[-1][0, -3:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores, out.logits[0, -3:], rtol=1e-4, atol=1e-4)


def tagged(made: CriticSettings, out: Path, **change: Any) -> CriticSettings:
    """A token classifier with a body of its own."""
    plain = {"adapter": None, "probe": False, "hidden": None, "label": "data", "rate": 3e-3}
    return dataclasses.replace(made, out=out, **{**plain, **change})


def rows_of(made: CriticSettings) -> list[Row]:
    """All rows, the slow way."""
    assert made.data is not None
    return [
        Row(tuple(ids), len(ids) - len(labels), tuple(labels))
        for ids, labels in slow_rows(made.data)
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_token_classifier_is_what_transformers_loads(
    made: CriticSettings, tmp_path: Path, architecture: str, rank: int | None
) -> None:
    body = make_model(tmp_path / "body", architecture, seed=5)
    settings = tagged(
        made, tmp_path / "critic", body=body, rank=rank, held_out=0.4, epochs=25, rate=1e-2
    )
    report = train(settings, say=quiet)
    width = 64 if architecture == "gpt2" else 128
    head = find_head(settings.out, "classifier", width)
    assert len(head.layers) == 1 and is_head(head.layers[0].weight.name)
    if rank is None:
        model: Any = AutoModelForTokenClassification.from_pretrained(settings.out).eval()
        config = json.loads((settings.out / "config.json").read_text())
        language = json.loads((body / "config.json").read_text())["architectures"][0]
        assert body_architecture(config["architectures"][0]) == language
        assert (settings.out / "tokenizer.json").is_file()
    else:
        model = AutoModelForCausalLM.from_pretrained(body, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, settings.out).eval()
    rows, targets = rows_of(made), list[bool]()
    scores = []
    assert made.data is not None
    entries = [json.loads(line) for line in made.data.read_text().splitlines()]
    replies = [Reply("", e.get("prompt") or e["messages"], (), (), "", True) for e in entries]
    for one in (rows[i] for i in critic._split(replies, 0.4, settings.seed)[1]):
        with torch.inference_mode():
            out = model(torch.tensor([one.ids]), output_hidden_states=True)
        states = out.hidden_states[-1][0, one.start :]
        scores.append(out.logits[0, one.start :, 0] if rank is None else read(head, states))
        targets += one.labels
    found = measures(torch.cat(scores), torch.tensor(targets))
    assert flat(report["held_out"]) == pytest.approx(flat(found))
    assert found["auc"] > 0.9


def test_what_a_row_is() -> None:
    """The state that reads the prompt's last token belongs to the reply's first token."""
    tokenizer = make_tokenizer()
    ids = tuple(tokenizer("12 pears")["input_ids"])
    reply = Reply("x", "", (7, 8, 9), ids, "12 pears", True)
    found = row(reply, [(0, 2)], tokenizer)
    assert found.ids == (7, 8, 9, *ids) and found.start == 2
    digits = [tokenizer.decode([i]).strip().isdigit() for i in ids]
    assert found.labels == (*digits, False) and sum(digits) in (1, 2)
    cut = row(dataclasses.replace(reply, ended=False), [(0, 2)], tokenizer)
    assert cut.labels == tuple(digits)


def test_the_rule_of_a_file_and_ready_spans_train_the_same_bits(
    made: CriticSettings, whole: dict[str, str], tmp_path: Path
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "critic", label="data")
    train(settings, say=quiet)
    assert bits(settings.out).items() >= {k: v for k, v in whole.items() if k != REPORT}.items()
    assert (whole.keys() == {"config.json", "model.safetensors", REPORT}) and made.probe


def test_prompts_are_held_out_whole(made: CriticSettings) -> None:
    replies = [Reply("", f"prompt {i % 10}", (), (), "", True) for i in range(30)]
    kept, held = critic._split(replies, 0.2, 3)
    assert sorted(kept + held) == list(range(30)) and len(held) == 6
    assert not {i % 10 for i in kept} & {i % 10 for i in held}
    assert critic._split(replies, 0.2, 4) != (kept, held) == critic._split(replies, 0.2, 3)
    assert critic._split(replies, 0.0, 3) == (list(range(30)), [])
    assert len(critic._split(replies, 0.99, 3)[0]) == 3


def test_the_weight_of_critical_tokens_raises_their_probability(
    made: CriticSettings, tmp_path: Path
) -> None:
    recall = []
    for weight in (0.05, 1.0, "auto"):
        settings = dataclasses.replace(
            made, out=tmp_path / f"{weight}", pos_weight=weight, epochs=3, batch=4, held_out=0.5
        )
        recall.append(train(settings, say=quiet)["held_out"]["thresholds"][1]["recall"])
    assert recall == sorted(recall) and recall[0] < recall[-1]


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["probe", "rank"])
@pytest.mark.parametrize("last", [2, 10, 15])
def test_a_resumed_run_ends_with_the_same_bits(
    made: CriticSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, last: int
) -> None:
    make = tagged if kind == "rank" else lambda s, out, **_: dataclasses.replace(s, out=out)
    settings = make(made, tmp_path / "one", rank=2)
    train(settings, say=quiet)
    again = make(made, tmp_path / "two", rank=2)
    save = checkpoint.save

    def dying(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(again, say=quiet)
    monkeypatch.undo()
    told: list[str] = []
    train(again, say=told.append)
    assert told[1] == f"resumed after step {last} of 15"
    assert bits(again.out) == bits(settings.out)
    left = {path.name for path in checkpoint.work_folder(again.out).iterdir()}
    assert left == ({"lock", "labels.jsonl"} if kind == "probe" else {"lock"})


def arguments(settings: CriticSettings) -> list[str]:
    """The run as a command line."""
    found = ["train", "critic", "--device", "cpu"]
    for key in ("body", "out", "label", "data", "adapter", "hidden", "rank", "epochs", "batch",
                "rate", "save_every"):  # fmt: skip
        if (value := getattr(settings, key)) is not None:
            found += ["--" + key.replace("_", "-"), str(value)]
    return [*found, *(["--probe"] if settings.probe else [])]


def filled(path: Path) -> bool:
    """Whether something lies there; what is renamed meanwhile does not."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size > 0
    return False


@pytest.mark.nightly
def test_killed_wherever_it_is_the_command_ends_with_the_same_bits(
    made: CriticSettings, tmp_path: Path
) -> None:
    """SIGKILL whenever something new lies in the work folder, then once more to the end."""
    waits = RULE.replace("    return", "    time.sleep(0.02)\n    return")
    (tmp_path / "slow.py").write_text("import time\n" + waits)
    label = f"{tmp_path / 'slow.py'}:numbers"
    settings = dataclasses.replace(made, out=tmp_path / "critic", label=label)
    train(dataclasses.replace(settings, out=tmp_path / "whole"), say=quiet)
    folder = checkpoint.work_folder(settings.out)
    command = [sys.executable, "-m", "server.main", *arguments(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stages = set()
    for awaited in ("labels.jsonl", "states-*", "step-*02", "step-*10"):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not any(map(filled, folder.glob(awaited))):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            stages.add(awaited)
    assert {"labels.jsonl", "states-*"} <= stages
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bits(settings.out) == bits(tmp_path / "whole")
    assert {path.name for path in folder.iterdir()} == {"lock", "labels.jsonl"}
    assert "held-out tokens" in done.stdout and "threshold  precision" in done.stdout
    assert f"{{on: STREAM, head: classifier, path: {settings.out}}}" in done.stdout


def test_killed_after_the_last_rename_the_command_still_reports(
    made: CriticSettings, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "critic")

    def dying(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(critic, "_clean", dying)
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    monkeypatch.undo()
    assert train(settings, say=quiet)["held_out"]["tokens"] > 0
    assert bits(settings.out) == whole
    left = {path.name for path in checkpoint.work_folder(settings.out).iterdir()}
    assert left == {"lock", "labels.jsonl"}


def test_other_settings_need_no_new_labels(made: CriticSettings, tmp_path: Path) -> None:
    """The work folder of a complete run, copied, and a rule that counts its calls."""
    rule = tmp_path / "rule.py"
    calls = tmp_path / "calls"
    rule.write_text(
        RULE.replace("    return", f"    open({str(calls)!r}, 'a').write('x')\n    return")
    )
    first = dataclasses.replace(made, out=tmp_path / "one", label=f"{rule}:numbers")
    train(first, say=quiet)
    assert calls.stat().st_size == 160
    second = dataclasses.replace(first, out=tmp_path / "two", rate=0.02)
    work = checkpoint.work_folder(second.out)
    shutil.copytree(checkpoint.work_folder(first.out), work)
    train(second, say=quiet)
    assert calls.stat().st_size == 160
    assert bits(first.out) != bits(second.out)


def test_an_unfinished_run_is_not_mixed_with_another(
    made: CriticSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(RULE)
    settings = dataclasses.replace(made, out=tmp_path / "critic", label=f"{rule}:numbers")
    save = checkpoint.save

    def dying(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    monkeypatch.undo()
    with pytest.raises(BadRecipe, match=r"--rate: differs .*got 0.02.*allowed: 0.01, or remove"):
        train(dataclasses.replace(settings, rate=0.02), say=quiet)
    with pytest.raises(BadRecipe, match="adapter: differs from the unfinished run"):
        train(dataclasses.replace(settings, adapter=None), say=quiet)
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, lines(40))))
    with pytest.raises(BadRecipe, match="replies and labels: differs from the unfinished run"):
        train(dataclasses.replace(settings, data=other), say=quiet)
    rule.write_text(RULE.replace("[0-9]+", "[0-4]"))
    with pytest.raises(BadRecipe, match=r"replies and labels: differs .*step-\*"):
        train(settings, say=quiet)
    with (
        checkpoint.locked(checkpoint.work_folder(settings.out)),
        pytest.raises(BadRecipe, match="another process is training there"),
    ):
        train(settings, say=quiet)


# --- bad input ----------------------------------------------------------------------------------

REFUSED: Sequence[tuple[dict[str, Any], str]] = [
    ({"rate": float("nan")}, r"--rate: .*got nan.*> 0"),
    ({"rate": float("inf")}, r"--rate: .*got inf.*> 0"),
    ({"epochs": 0}, r"--epochs: .*got 0.*≥ 1"),
    ({"hidden": 0}, r"--hidden: .*≥ 1"),
    ({"batch": 0}, r"--batch: .*≥ 1"),
    ({"held_out": 1.0}, r"--held-out: .*got 1.0.*0 up to below 1"),
    ({"pos_weight": 0.0}, r"--pos-weight: .*> 0, or auto"),
    ({"label_timeout_s": 0.0}, r"--label-timeout: .*> 0"),
    ({"dtype": "int8"}, r"--dtype: .*float32, bfloat16"),
    ({"top_p": 0.0}, r"--top-p: .*above 0, up to 1"),
    ({"probe": False}, r"--hidden: .*with --probe"),
    ({"probe": False, "hidden": None}, r"--adapter: .*with --probe; a classifier with a body"),
    ({"rank": 4}, r"--rank: .*without --probe, whose body is frozen"),
    ({"data": None}, r"--server: missing; allowed: --server and --prompts .* or --data"),
    ({"prompts": Path("x")}, r"--prompts: replies are sampled or ready, not both"),
    ({"label": "nouns"}, r"--label: unknown rule \(got 'nouns'\); allowed: data, names, FILE"),
    ({"label": "none.py:f"}, r"--label: no such file \(got 'none.py'\)"),
    ({"label": "http://:1"}, r"--label: not an address"),
    ({"body": Path("none")}, r"--body none: no model here.*config.json"),
    ({"device": "cpu", "data": Path("none")}, r"none: cannot be read"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED)
def test_bad_settings_are_refused_before_anything_is_done(
    made: CriticSettings, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "critic", **change)
    with pytest.raises(BadRecipe, match=told):
        train(settings, say=quiet)
    assert list(tmp_path.iterdir()) == []


GOOD = lines(2)

BAD_LINES: Sequence[tuple[Any, str]] = [
    ({**GOOD[0], "spans": [[0, 99]]}, r"x.jsonl:2: spans\[0\]: not in the reply .*≤ 35"),
    ({k: v for k, v in GOOD[1].items() if k != "spans"}, r"x.jsonl:2: not a reply .*`spans`"),
    ({**GOOD[1], "completion": ""}, r"x.jsonl:2: completion: not a text"),
    ({**GOOD[1], "prompt": ""}, r"x.jsonl:2: prompt: not a text"),
    ({**GOOD[1], "messages": []}, r"x.jsonl:2: not a prompt"),
    ({**GOOD[1], "completion": "Cut <|end|> off", "spans": []}, r"makes 'Cut  off' of it"),
    ({**GOOD[1], "completion": "so " * 600, "spans": []}, r"x.jsonl:2: longer .*≤ 512"),
    ("[1]", r"x.jsonl:2: not a reply"),
]


@pytest.mark.parametrize(("line", "told"), BAD_LINES)
def test_bad_lines_are_named(made: CriticSettings, tmp_path: Path, line: Any, told: str) -> None:
    data = tmp_path / "x.jsonl"
    data.write_text("\n".join(map(json.dumps, [GOOD[0], line])))
    settings = dataclasses.replace(made, out=tmp_path / "critic", label="data", data=data)
    with pytest.raises(BadRecipe, match=told):
        train(settings, say=quiet)
    assert list(tmp_path.iterdir()) == [data]


def test_bodies_and_adapters_that_do_not_fit(made: CriticSettings, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "qwen2")
    with pytest.raises(Exception, match=r"--adapter: .* its shape does not fit the base"):
        train(dataclasses.replace(made, body=other, out=tmp_path / "x"), say=quiet)
    with pytest.raises(Exception, match=r"--adapter: body: no adapter here"):
        train(dataclasses.replace(made, adapter=made.body, out=tmp_path / "x"), say=quiet)
    opt = make_model(tmp_path / "opt", "opt")
    with pytest.raises(BadRecipe, match=r"--body .* no token classifier .*'opt'.*--probe"):
        train(tagged(made, tmp_path / "x", body=opt), say=quiet)
    (opt / "chat_template.jinja").unlink()
    plain = dataclasses.replace(made, body=opt, adapter=None, out=tmp_path / "x")
    with pytest.raises(BadRecipe, match=r"data.jsonl:1: the body has no chat template"):
        train(plain, say=quiet)
    classifier = tagged(made, tmp_path / "classifier", epochs=1)
    train(classifier, say=quiet)
    with pytest.raises(BadRecipe, match=r"--body .*no language model \(got 'LlamaForTokenCl"):
        train(tagged(made, tmp_path / "x", body=classifier.out), say=quiet)


def test_data_without_anything_to_tell_apart(made: CriticSettings, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({**line, "spans": []}) for line in lines(4))
    )
    settings = dataclasses.replace(
        made, out=tmp_path / "critic", label="data", data=tmp_path / "x.jsonl"
    )
    with pytest.raises(BadRecipe, match=r"--label data: there is nothing .*got '0 of"):
        train(settings, say=quiet)
    (tmp_path / "x.jsonl").write_text(json.dumps(lines(2)[1]))
    with pytest.raises(BadRecipe, match=r"--held-out: needs two different prompts"):
        train(dataclasses.replace(settings, out=tmp_path / "other"), say=quiet)


def test_a_run_that_diverges_ends_without_a_result(made: CriticSettings, tmp_path: Path) -> None:
    settings = tagged(made, tmp_path / "critic", rate=1e30)
    with pytest.raises(BadRecipe, match="not finite any more in step"):
        train(settings, say=quiet)
    assert not settings.out.exists()


def test_what_stands_at_the_output_is_kept(
    made: CriticSettings, whole: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(made)) == 1
    assert "there is something already; allowed: a folder that does not exist" in (
        capsys.readouterr().err
    )
    assert bits(made.out) == whole


# --- the table ----------------------------------------------------------------------------------


def test_measures_against_pairs_and_counts() -> None:
    rng = random.Random(8)
    scores = [rng.choice([-1.5, -0.2, 0.0, 0.3, rng.gauss(0, 1)]) for _ in range(90)]
    targets = [rng.random() < 1 / (1 + 2.7 ** (1 - s)) for s in scores]
    found = measures(torch.tensor(scores), torch.tensor(targets))
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, x in zip(scores, targets, strict=True) if x
        for b, y in zip(scores, targets, strict=True) if not y
    ]  # fmt: skip
    assert found["auc"] == pytest.approx(sum(pairs) / len(pairs))
    assert found["critical"] == sum(targets) / 90
    for line, logit in zip(found["thresholds"], (-0.8473, 0.0, 0.8473), strict=True):
        marked = [s > logit for s in scores]
        hits = sum(m and t for m, t in zip(marked, targets, strict=True))
        p, r = hits / sum(marked), hits / sum(targets)
        assert (line["precision"], line["recall"]) == pytest.approx((p, r))
        assert line["f1"] == pytest.approx(2 * p * r / (p + r))
    assert f"AUC {found['auc']:.3f}" in table(found)


def test_measures_that_are_not_defined() -> None:
    found = measures(torch.tensor([-3.0, -2.0]), torch.tensor([False, False]))
    assert found["auc"] is None and found["critical"] == 0
    assert found["thresholds"][0] == {
        "threshold": 0.3, "precision": None, "recall": None, "f1": None
    }  # fmt: skip
    assert "–" in table(found) and json.loads(json.dumps(found)) == found


def test_the_ends_of_texts_are_ids_that_the_tests_can_see() -> None:
    assert EOS not in make_tokenizer()("x")["input_ids"]
