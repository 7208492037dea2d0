"""What `coxswain train critic` refuses, and says so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters.training.critic.settings import CriticSettings
from adapters.training.critic.train import train
from adapters.training.errors import BadRecipe
from server.main import run
from tests.adapters.training.critic_runs import arguments, bits, lines, quiet, tagged
from tests.models import make_model

pytestmark = pytest.mark.slow


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
