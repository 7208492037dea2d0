"""The servers for the tests of this folder, and a client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.models import BOS, SPECIAL, make_model
from tests.server.api.asking import BAD
from tests.server.live import TEMPLATE, Server, document
from tests.server.operation.collector import Collector


@pytest.fixture(scope="package")
def server(models: Path) -> Iterator[Server]:
    """A running server; `test_live_z_end.py`, the last to use it, drains it."""
    found = Server(models, document(), flags=("--max-model-len", "224"))
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


def damaged(folder: Path, name: str, row: int) -> None:
    """Puts NaN into a row of a matrix."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][row] = torch.nan
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="package")
def broken(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer adds BOS, and streams that are broken: later, and at once."""
    root = tmp_path_factory.mktemp("broken")
    (root / "chat").symlink_to(models / "chat")
    make_model(root / "base", "llama", seed=1)
    core = Tokenizer.from_file(str(root / "base" / "tokenizer.json"))
    core.post_processor = TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    core.save(str(root / "base" / "tokenizer.json"))
    make_model(root / "plain", "llama", seed=3)
    damaged(root / "plain", "model.embed_tokens.weight", BAD)
    make_model(root / "nan", "llama", seed=4)
    damaged(root / "nan", "lm_head.weight", 65)
    return root


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    with Collector().running() as found:
        yield found


@pytest.fixture(scope="package")
def fresh(broken: Path, collector: Collector) -> Iterator[Server]:
    """A server that nobody has asked for a grammar before `test_live_broken.py`. A token breaks
    its stream `plain`; it has bugs for requests that ask for them; it logs and traces.
    """
    config = document(
        logging={"format": "json", "requests": True},
        tracing={"endpoint": collector.endpoint, "protocol": "http/protobuf"},
    )
    config["profiles"]["big-chat"]["chat_template"] = SPECIAL[BOS] + TEMPLATE
    config["server"]["sse_keep_alive_s"] = 0.3
    found = Server(broken, config, prefix=(sys.executable, "-m", "tests.buggy"))
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()
