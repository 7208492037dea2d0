"""The doctor on streams with heads: each problem in one line, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from server.checks.capacity import _scratch
from server.checks.doctor import diagnose, snapshot
from server.loading import engine_arguments
from server.main import run
from server.settings.file import parse
from steering.method import Snapshot
from tests.models import VOCAB_SIZE, make_model
from tests.server.live import document

HIDDEN = 128
"""Of the base; `chat` has 64."""


def head(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_labels": 1, **config}))
    return folder


def linear(rows: int, width: int, name: str = "") -> dict[str, torch.Tensor]:
    return {f"{name}weight": torch.ones(rows, width), f"{name}bias": torch.zeros(rows)}


def problems(models: Path, stream: dict[str, Any]) -> list[str]:
    streams = {**document()["streams"], "critic": stream}
    return diagnose(parse(document(streams=streams), models, {})).problems


def classifier(models: Path, folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A companion's checkpoint with other tensors and settings on top."""
    make_model(folder, "qwen2", seed=2)
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


@pytest.mark.parametrize(
    ("name", "tensors", "config"),
    [
        ("linear", linear(1, HIDDEN), {}),
        ("two labels", linear(2, HIDDEN), {}),
        ("no bias", {"weight": torch.ones(1, HIDDEN)}, {}),
        ("network", {**linear(9, HIDDEN, "0."), **linear(1, 9, "2.")}, {"activation": "gelu"}),
        ("peft", {f"base_model.model.score.{n}": t for n, t in linear(1, HIDDEN).items()}, {}),
    ],
)
def test_heads_on_the_base_are_found(
    models: Path, tmp_path: Path, name: str, tensors: dict[str, torch.Tensor], config: Any
) -> None:
    folder = head(tmp_path / "h", tensors, **config)
    stream = {"on": "base", "head": "classifier", "path": str(folder)}
    assert problems(models, stream) == []


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (linear(1, 64), {}, "weight has shape [1, 64]; its input has 128 numbers"),
        (linear(3, HIDDEN), {}, "weight gives 3 numbers; allowed: 1 or 2"),
        ({"weight": torch.ones(1, HIDDEN), "bias": torch.ones(4)}, {}, "bias has shape [4]"),
        ({"weight": torch.ones(HIDDEN)}, {}, "weight has shape [128]"),
        ({"other": torch.ones(3)}, {}, "no classifier head in"),
        ({**linear(9, HIDDEN, "0."), **linear(1, 9, "2.")}, {}, "activation is one of relu"),
        ({**linear(9, HIDDEN, "0."), **linear(1, 8, "2.")}, {"activation": "relu"},
         "2.weight has shape [1, 8]; its input has 9 numbers"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_fit_is_one_line(
    models: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], config: Any, words: str
) -> None:
    folder = head(tmp_path / "h", tensors, **config)
    found = problems(models, {"on": "base", "head": "classifier", "path": str(folder)})
    assert len(found) == 1
    assert found[0].startswith("streams.critic: ") and words in found[0]


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "words"), [(_cut, "it is cut short"), (_pickle, "no *.safetensors in")]
)
def test_a_broken_file_is_one_line(
    models: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    folder = head(tmp_path / "h", linear(1, HIDDEN))
    change(folder)
    found = problems(models, {"on": "base", "head": "classifier", "path": str(folder)})
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ({"on": "critic", "head": "classifier", "path": "."}, "on: critic is a head itself"),
        ({"on": "base", "head": "classifier", "path": "./gone"}, "path: no such folder"),
        ({"model": "./chat", "head": "classifier"}, "no classifier head in"),
        ({"model": "./gone", "head": "classifier"}, "no such folder"),
    ],
)
def test_a_stream_that_cannot_have_a_head_is_one_line(
    models: Path, stream: dict[str, Any], words: str
) -> None:
    found = problems(models, stream)
    assert len(found) == 1 and words in found[0], found


def test_classifier_checkpoints_and_their_bodies(models: Path, tmp_path: Path) -> None:
    good = classifier(
        models,
        tmp_path / "good",
        linear(2, 64, "score."),
        architectures=["Qwen2ForTokenClassification"],
    )
    stream = {"model": str(good), "head": "classifier"}
    assert problems(models, stream) == []
    wrong = classifier(models, tmp_path / "wrong", linear(2, 65, "score."))
    assert "score.weight has shape [2, 65]" in problems(models, {**stream, "model": str(wrong)})[0]
    # Without `head` it would be mixed as a language model.
    lines = problems(models, {"model": str(good)})
    begins = "streams.critic: Qwen2ForTokenClassification gives no token scores"
    assert any(line.startswith(begins) for line in lines)


def test_a_defer_token_is_a_row_more_than_the_base_has(models: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "defer", "llama", vocab_size=VOCAB_SIZE + 1)
    assert problems(models, {"model": str(tmp_path / "defer"), "head": "classifier"}) == []


def test_the_engine_is_told_where_heads_are(models: Path, tmp_path: Path) -> None:
    folder = head(tmp_path / "h", linear(1, 64))
    streams = {
        **document()["streams"],
        "critic": {"on": "chat", "head": "classifier", "path": str(folder)},
    }
    config = parse(document(streams=streams), models, {})
    found = diagnose(config)
    assert found.problems == []
    settings = engine_arguments(config, found)["additional_config"]["coxswain"]
    assert settings["streams"]["critic"] == {
        "head": "classifier", "on": "chat", "path": str(folder),
    }  # fmt: skip
    assert settings["ends"] == [2]
    assert snapshot(config) == Snapshot(
        {"base": "lm", "chat": "lm", "plain": "lm", "twin": "lm", "critic": "classifier"},
        {"critic": "chat"},
    )


@pytest.mark.parametrize(
    "stream",
    [
        {"on": "base", "head": "value", "path": "."},
        {"on": "base", "head": "classifier"},
        {"on": "nobody", "head": "classifier", "path": "."},
        {"same_as": "base", "head": "classifier"},
        {"model": "./chat", "path": "."},
    ],
)
def test_contradictions_are_refused_when_the_file_is_read(
    models: Path, stream: dict[str, Any]
) -> None:
    from server.settings.config import ConfigInvalid

    with pytest.raises(ConfigInvalid, match=r"streams\.critic"):
        problems(models, stream)


def value(models: Path, folder: Path, **more: Any) -> dict[str, Any]:
    classifier(models, folder, linear(1, 64, "v_head.summary."))
    return {"model": str(folder), "head": "value", **more}


def test_a_value_checkpoint_and_its_room(models: Path, tmp_path: Path) -> None:
    stream = value(models, tmp_path / "v")
    assert problems(models, stream) == []
    streams = {**document()["streams"], "value": stream}

    def candidates(**steering: Any) -> tuple[int, int]:
        config = parse(document(streams=streams, steering=steering), models, {})
        found = diagnose(config)
        # 2 (K, V) × 3 layers × 1 head × 32 × 4 bytes.
        assert found.streams["value"].kv_bytes == 768
        each = sum(fact.kv_bytes for fact in found.streams.values())
        return _scratch(config, found), each

    (more, each), (fewer, _) = candidates(max_top_k=20), candidates(max_top_k=10)
    # Two blocks of 128 tokens for each candidate, which hold the keys and values of all streams.
    assert more - fewer == 2 * 10 * 128 * each
    bare = parse(document(), models, {})
    assert _scratch(bare, diagnose(bare)) == 0


def test_a_value_checkpoint_without_a_head_is_one_line(models: Path) -> None:
    (line,) = problems(models, {"model": "./chat", "head": "value"})
    assert line.startswith("streams.critic: no value head in")
    assert "v_head.summary.weight" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steering": {"max_top_k": 501}}, "steering.max_top_k: 501 is more than the base's"),
    ],
)
def test_what_value_streams_do_not_go_with(
    models: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    streams = {**document()["streams"], "value": value(models, tmp_path / "v")}
    found = diagnose(parse(document(streams=streams, **changes), models, {})).problems
    assert any(line.startswith(words) for line in found)


def test_a_value_model_knows_every_token(models: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "v", "qwen2", vocab_size=VOCAB_SIZE - 10)
    file = tmp_path / "v" / "model.safetensors"
    save_file({**load_file(file), **linear(1, 64, "score.")}, file, {"format": "pt"})
    (line,) = problems(models, {"model": str(tmp_path / "v"), "head": "value"})
    assert line.startswith("streams.critic: lacks 10 of the base's tokens")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (linear(1, 65, "v_head.summary."), "v_head.summary.weight has shape [1, 65]"),
        (linear(2, 64, "score."), "score.weight gives 2 numbers; allowed: 1"),
        (linear(1, 64, "classifier."), "no value head in"),
    ],
)
def test_a_value_head_that_does_not_fit_is_one_line(
    models: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    folder = classifier(models, tmp_path / "v", tensors)
    (line,) = problems(models, {"model": str(folder), "head": "value"})
    assert line.startswith("streams.critic: ") and words in line


@pytest.mark.parametrize("kind", ["value", "classifier"])
def test_a_head_beside_its_body_that_is_no_safetensors_is_one_line(
    models: Path, tmp_path: Path, kind: str
) -> None:
    """As the trainers of PEFT folders write it: the head's tensors in a pickle."""
    torch.save({"v_head.summary.weight": torch.ones(1, 64)}, tmp_path / "pytorch_model.bin")
    stream = {"model": "./chat", "head": kind, "path": str(tmp_path)}
    (line,) = problems(models, stream)
    assert line.startswith("streams.critic: no *.safetensors in")
    (tmp_path / "model.safetensors").write_bytes(b"not what the name says")
    (line,) = problems(models, stream)
    assert "is not a whole safetensors file" in line


def test_the_doctor_and_the_server_do_not_start_with_a_head_that_is_not_there(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = head(tmp_path / "narrow", linear(1, HIDDEN - 1))
    streams = {
        **document()["streams"],
        "value": {"model": "./chat", "head": "value"},
        "probe": {"on": "base", "head": "classifier", "path": str(narrow)},
    }
    file = models / "heads.yaml"
    file.write_text(yaml.safe_dump(document(streams=streams)))
    for command in ("doctor", "serve"):
        assert run([command, str(file)]) == 1
        told = "".join(capsys.readouterr())
        assert "streams.value: no value head in" in told
        assert "streams.probe: weight has shape [1, 127]; its input has 128 numbers" in told


def test_a_profile_that_misuses_a_head_is_one_line(models: Path, tmp_path: Path) -> None:
    streams = {**document()["streams"], "value": value(models, tmp_path / "v")}

    def told(**profile: Any) -> list[str]:
        config = document(streams=streams, profiles={"p": profile}, steering={"max_best_of": 8})
        return diagnose(parse(config, models, {})).problems

    assert told(method="best_of_n", value="value", n=8) == []
    for change, words in (
        ({"n": 9}, "profiles.p.n: the number of replies is out of range (got 9); allowed: 1 to 8"),
        ({"value": "chat"}, "profiles.p.value: the stream has no value or classifier head"),
        ({"value": "nobody"}, "profiles.p.value: no such stream"),
    ):
        (line,) = told(**{"method": "best_of_n", "value": "value", "n": 2, **change})
        assert line.startswith(words)
