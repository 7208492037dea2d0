"""Trains the zoo's heads as a user would: two value models and a critic, from a running server.

``coxswain train value`` and ``coxswain train critic`` sample from the zoo's own server, which runs
without the heads that are yet to be trained.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from load_tests.with_server import running_server
from zoo import gossip, small_talk
from zoo.world import World

ROOT = Path(__file__).parent
CONFIG = ROOT / "server.yaml"
FOLDER = ROOT / "heads"
CRITIC = "critic"
HEADS = ("cheerful", "terse", CRITIC)

VALUE_FLAGS = {
    "--rank": 8,
    "--samples": 32,
    "--max-tokens": 64,
    "--epochs": 5,
    "--batch": 64,
    "--rate": 2e-3,
    "--dtype": "float32",
}
CRITIC_FLAGS = {
    "--hidden": 32,
    "--samples": 2,
    "--max-tokens": 32,
    "--temperature": 0.7,
    "--epochs": 4,
    "--rate": 3e-3,
    "--dtype": "float32",
}
"""What the commands are told; the rest are their defaults."""


def train_heads(names: Sequence[str], world: World, models: Path, adapters: Path) -> None:
    """Train some of ``HEADS`` into ``FOLDER``."""
    models, adapters = models.resolve(), adapters.resolve()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "server.yaml"
        config.write_text(yaml.safe_dump(without_heads(models, adapters)))
        with running_server(config) as url:
            for name in names:
                prompts = Path(folder) / f"{name}.jsonl"
                command = critic(world, models, adapters, prompts)
                if name != CRITIC:
                    command = value(name, models, prompts)
                shutil.rmtree(FOLDER / name, ignore_errors=True)
                program = str(Path(sys.executable).with_name("coxswain"))
                out = ["--server", url, "--prompts", str(prompts), "--out", str(FOLDER / name)]
                command = [program, "train", *command, *out, "--device", "cpu"]
                subprocess.run(command, check=True, cwd=ROOT)
                tidy(FOLDER / name)


def tidy(folder: Path) -> None:
    """Remove the samples, and the path of this machine that PEFT's configuration names."""
    shutil.rmtree(folder.with_name(f"{folder.name}.training"))
    path = folder / "adapter_config.json"
    if path.exists():
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = Path(config["base_model_name_or_path"]).name
        path.write_text(json.dumps(config, indent=1) + "\n")


def without_heads(models: Path, adapters: Path) -> dict[str, Any]:
    """The zoo's configuration with the base and the gossip adapter alone, paths made absolute."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    del config["streams"], config["profiles"]
    config["model"] = str(models / Path(config["model"]).name)
    config["chat"]["template"] = str(ROOT / config["chat"]["template"])
    loaded = {"name": gossip.NAME, "source": str(adapters / gossip.NAME)}
    config["adapters"] |= {"roots": [str(adapters)], "preload": [loaded]}
    return config


def value(reward: str, models: Path, prompts: Path) -> list[str]:
    """The arguments that train the value model of a reward of :mod:`zoo.small_talk`."""
    write(prompts, ({"prompt": prompt} for prompt in small_talk.prompts("tuning")))
    command = ["value", "--reward", f"small_talk.py:{reward}", "--body", str(models / "base-small")]
    return command + flags(VALUE_FLAGS)


def critic(world: World, models: Path, adapters: Path, prompts: Path) -> list[str]:
    """The arguments that train the critic: a probe on the base as the gossip adapter changes it."""
    questions = world.questions("tuning", random.Random(17))
    asked = ([{"role": "user", "content": q.question}] for q in questions)
    write(prompts, ({"messages": messages} for messages in asked))
    command = ["critic", "--probe", "--label", "gossip.py:facts"]
    command += ["--body", str(models / "base-large"), "--adapter", str(adapters / gossip.NAME)]
    command += ["--request", json.dumps({"adapters": [{"name": gossip.NAME}]})]
    return command + flags(CRITIC_FLAGS)


def flags(given: dict[str, Any]) -> list[str]:
    """As words of a command line."""
    return [word for flag, setting in given.items() for word in (flag, str(setting))]


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """As JSONL."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
