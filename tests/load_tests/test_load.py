"""The command, with real servers and tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from load_tests.bench_client import RunFailedError
from load_tests.load import Load, main, parsed
from load_tests.load_models import Shapes, tokenizer, write_models
from load_tests.scenario import Level, Scenario, load_scenarios, load_traffic
from load_tests.targets import Targets
from tests.load_tests.test_load_report import figures

BIG = {"hidden_size": 128, "num_hidden_layers": 2, "heads": 4, "intermediate_size": 256}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "heads": 2, "intermediate_size": 128}
TINY = Shapes(BIG, SMALL, vocabulary=2000, adapters=8)
ENGINE: dict[str, object] = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("load-models")
    write_models(root, TINY)
    return root


@pytest.mark.engine
@pytest.mark.nightly
def test_steering_tenants_and_the_baseline_are_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = load_scenarios()
    chosen = {name: found[name] for name in ("steered", "tenants", "transformers")}
    levels = {"light": Level(rate=20, requests=9)}
    load = Load(folder, TINY, chosen, load_traffic(), levels, ENGINE)
    rounds = dict(load.rounds(0, 2))
    assert list(rounds) == [0, 1]
    for one in rounds.values():
        assert list(one) == list(chosen)
        for scenario in one.values():
            assert scenario["light"]["completed"] == 9
            assert scenario["light"]["output_throughput"] > 0
            assert 0 < scenario["light"]["median_ttft_ms"] < scenario["light"]["p99_e2el_ms"]

    wrong = found["steered"].model_dump() | {"body": {"steering": {"method": "none"}}}
    refused = Load(
        folder, TINY, {"wrong": Scenario.model_validate(wrong)}, load_traffic(), levels, ENGINE
    )
    with pytest.raises(RunFailedError, match="steered: 6 requests failed: Not Found"):
        next(refused.rounds(0, 1))


@pytest.mark.slow
def test_the_baseline_refuses_what_it_cannot_do(folder: Path) -> None:
    body = {"model": "base", "prompt": "w5 w6", "max_tokens": 2, "ignore_eos": True}
    with Targets(folder, TINY, ENGINE).running("transformers") as url:
        for wrong in ({}, {"temperature": 0, "steering": {}}, {"temperature": 1}):
            answer = httpx.post(f"{url}/v1/completions", json=body | wrong)
            assert answer.status_code == 400 and "greedily" in answer.json()["error"]["message"]
        answer = httpx.post(f"{url}/v1/completions", json=body | {"temperature": 0})
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"] == {"prompt_tokens": 2, "completion_tokens": 2}
    assert len(events) == 4


def test_a_prompt_has_as_many_tokens_as_words() -> None:
    own = tokenizer(50)
    ids = list(range(4, 50))
    assert own(own.decode(ids)).input_ids == ids and len(own) == 50


def test_an_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(["--only", "steered", "stered"])
    assert "['stered'] is none of ['adapter'," in capsys.readouterr().err


def test_rendering_again_says_which_limit_does_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "figures.json").write_text(json.dumps(figures()))
    assert main(["--render", "--out", str(tmp_path / "report.md")]) == 1
    assert "not met: Coxswain, steered, heavy: good_share at least 0.95" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text().startswith("# Load tests\n")
    assert main(["--render", "--note", "Noisy.", "--out", str(tmp_path / "report.md")]) == 1
    assert main(["--render", "--out", str(tmp_path / "report.md")]) == 1
    assert "\n**Note.** Noisy.\n" in (tmp_path / "report.md").read_text()
