"""The configuration of `make smollm` has what was trained, and nothing else."""

from __future__ import annotations

from pathlib import Path

import yaml

from server.settings.file import load
from smollm import configure
from smollm.convert import MODEL


def made(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_without_artefacts_it_is_the_file(tmp_path: Path) -> None:
    found = configure.configuration(tmp_path / "none")
    assert found["model"] == str(MODEL.resolve())
    want = yaml.safe_load(configure.CONFIG.read_text("utf-8"))
    assert found == {**want, "model": str(MODEL.resolve())}


def test_what_was_trained_is_served(tmp_path: Path) -> None:
    folder = made(
        tmp_path / "evidence", "adapters/letter/adapter_config.json", "adapters/pack/meteora.json",
        "adapters/data/a.jsonl", "small/companion/config.json", "small/tuned/config.json",
        "small/direct/adapter_config.json", "reward/value/v_head.safetensors",
        "reward/sunny/vector.safetensors",
    )  # fmt: skip
    (tmp_path / "server.yaml").write_text(yaml.safe_dump(configure.configuration(folder)))
    config = load(tmp_path / "server.yaml")
    assert set(config.streams) == {"twin", "companion", "tuned", "sunny-value"}
    assert set(config.profiles) == {"faithful", "obedient", "desk", "cheerful"}
    assert config.adapters is not None and config.adapters.vectors
    found = {one.name: str(one.source) for one in config.adapters.preload}
    names = ("adapters/letter", "adapters/pack", "small/direct", "reward/sunny")
    assert found == {name.rpartition("/")[2]: str(folder / name) for name in names}


def test_half_a_claim_is_not_served(tmp_path: Path) -> None:
    folder = made(tmp_path, "small/companion/config.json", "adapters/letter/adapter_config.json")
    found = configure.configuration(folder)
    assert set(found["streams"]) == {"twin"} and not found["adapters"]["vectors"]
