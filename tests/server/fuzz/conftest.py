"""A server on which every route is live and every call is cheap, and what it must answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.make import make_lora
from tests.engine.heads import classifier, probe, valued
from tests.server.adapting.expected import Oracle, make_adapters
from tests.server.adapting.kit import load, serving
from tests.server.fuzz.sound import FUZZED, MODELS, MOST, REFERENCE, TOKENS
from tests.server.live import TEMPLATE, Server, document

KEY, ADMIN = "key-0123456789", "key-admin-89abcdef"


@pytest.fixture(scope="package")
def folders(models: Path) -> dict[str, Path]:
    """Adapters: those that answers are checked with, and one that strangers may load and unload."""
    root = models / "fuzzed"
    found = make_adapters(root, models)
    make_lora(root / FUZZED[0], models / "base", seed=70)
    return found


@pytest.fixture(scope="package")
def oracle(models: Path, folders: dict[str, Path]) -> Oracle:
    """The right answers."""
    return Oracle(models, folders)


@pytest.fixture(scope="package")
def fuzzed(
    models: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Companions, heads, profiles, adapters, keys; short replies."""
    heads = models / "fuzzed-heads"
    valued(heads / "value", "qwen2", 21)
    classifier(heads / "critic", "gpt2", 12, tokens=True, labels=2)
    probe(heads / "probe", models / "base", "base", 15)
    config = document(
        streams={
            "chat": {"model": "./chat"},
            "plain": {"model": "./plain"},
            "twin": {"same_as": "base"},
            "value": {"model": "./fuzzed-heads/value", "head": "value"},
            "critic": {"model": "./fuzzed-heads/critic", "head": "classifier"},
            "probe": {"on": "base", "head": "classifier", "path": "./fuzzed-heads/probe"},
            "early": {"on": "base", "layer": 1},
        },
        profiles={
            "big-chat": {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"},
            "kinder": {"method": "value_augmented", "top_k": MOST, "values": [{"stream": "value"}]},
        },
        adapters={"roots": ["./fuzzed"], "max_loaded": 8, "max_rank": 24},
        registry={"directory": str(tmp_path_factory.mktemp("state"))},
        auth={"api_keys": [KEY], "admin_key": ADMIN},
        chat={"template": TEMPLATE, "tool_call_parser": "hermes"},
        limits={"max_output_tokens": TOKENS, "max_replies": 4},
        steering={"max_top_k": MOST, "max_best_of": MOST},
        logging={"requests": True},
    )
    assert {*config["profiles"], "big"} <= set(MODELS)
    with serving(Server(models, config)) as found:
        for name, known in REFERENCE.items():
            load(found, known, folders[name], stream="chat" if name == "f" else "base")
        yield found
