"""Streams and heads that give NaN or infinity: their requests end by name, others never notice."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steering import broken
from tests.engine.driver import BLOCK, ON_V2, Case, Engine, tokens
from tests.engine.heads import Headed, probe, valued
from tests.engine.test_exactness import assert_exact
from tests.models import SPECIAL, VOCAB_SIZE
from tests.reference import load

pytestmark = pytest.mark.engine

BAD = VOCAB_SIZE - 1
"""A token whose embedding is broken in some streams."""


def damage(folder: Path, name: str, row: int, number: float) -> None:
    """Overwrites a row of a tensor of a checkpoint."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][row] = number
    save_file(tensors, file, {"format": "pt"})


def make_heads(folder: Path, bodies: Mapping[str, Path]) -> dict[str, Headed]:
    damage(bodies["unembedding"], "lm_head.weight", 65, torch.nan)
    damage(bodies["embedding"], "model.embed_tokens.weight", BAD, torch.nan)
    heads = {
        "critic": probe(folder / "critic", bodies["embedding"], "embedding", 15),
        "value": valued(folder / "value", "qwen2", 21),
    }
    (checkpoint,) = ((folder / "value").glob("*.safetensors"),)
    for file in checkpoint:
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "embed_tokens" in name:
                tensor[BAD] = torch.inf
        save_file(tensors, file, {"format": "pt"})
    return heads


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE),
        {
            "chat": ("qwen2", VOCAB_SIZE),
            "unembedding": ("llama", VOCAB_SIZE),
            "embedding": ("llama", VOCAB_SIZE),
            "twin": "base",
        },
        make_heads,
        num_gpu_blocks_override=20,
        one_product=[["unembedding"], ["embedding"]],
    )
    yield found
    del found
    gc.collect()
    load.cache_clear()


def prompt(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(len(SPECIAL), BAD) for _ in range(rng.randint(low, high))]


MIX = {"method": "mix", "weights": {"base": 1.0, "embedding": 0.5}}
VALUE = {"method": "value_augmented", "top_k": 3, "values": [{"stream": "value"}]}
SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "sum": (MIX, "embedding"),
    "plausible": ({"method": "contrastive", "amateur": "embedding"}, "embedding"),
    "nucleus": (
        {
            "method": "emulated_fine_tuning",
            "tuned": "chat",
            "reference": "embedding",
            "delta_top_p": 0.8,
        },
        "embedding",
    ),
    "critical": (
        {"method": "critical_tokens", "pretrained": "chat", "classifier": "critic"},
        "critic",
    ),
    "value": (VALUE, "value"),
}


def ended(output: Any, stream: str) -> bool:
    """Whether an error names the stream. V2's host does not wait for the step, so where one product
    has summed several it names them all.
    """
    choice = output.outputs[0]
    if choice.finish_reason != "error" or list(choice.token_ids):
        return False
    several = f"'{stream}' at least one {broken.NO_NUMBERS}"
    if ON_V2 and choice.stop_reason.startswith("Of the streams") and several in choice.stop_reason:
        return True
    return f"The stream '{stream}' {broken.NO_NUMBERS}" in choice.stop_reason


def test_a_damaged_unembedding_is_named_on_every_path(engine: Engine) -> None:
    """By one product, by the plain sum, and in a rule."""
    rng = random.Random(1)
    weights = {"base": 1.0, "unembedding": 0.5}
    bad = Case(prompt(rng, 9, 9), {"method": "mix", "weights": weights})
    assert ended(engine.run([bad, bad])[0], "unembedding")
    rule = {"method": "contrastive", "amateur": "unembedding"}
    cases = [bad, Case(prompt(rng, 9, 9)), Case(prompt(rng, 9, 9), rule)]
    first, plain, last = engine.run(cases)
    assert ended(first, "unembedding") and ended(last, "unembedding")
    assert_exact(engine, cases[1:2], [plain])


@pytest.mark.parametrize("kind", SPECS)
def test_a_fault_that_comes_later_ends_its_row_alone(engine: Engine, kind: str) -> None:
    """A token in the prompt of one request breaks a stream; the same stream serves the others."""
    rng = random.Random(2)
    spec, name = SPECS[kind]
    bad = Case([*prompt(rng, 20, 40), BAD, *prompt(rng, 2, 40)], spec, max_tokens=6)
    good = [Case(prompt(rng, 20, 40), spec, max_tokens=6, arrives=i) for i in range(3)]
    alone = [engine.run([case], salt="alone")[0] for case in good]
    cases = [good[0], bad, *good[1:], Case(prompt(rng, 9, 60), None)]
    outputs = engine.run(cases, salt="beside")
    assert ended(outputs[1], name), outputs[1].outputs[0]
    for output, want in zip([outputs[0], *outputs[2:4]], alone, strict=True):
        assert tokens(output) == tokens(want)
    assert_exact(engine, cases[-1:], outputs[-1:])


def test_blocks_that_held_no_numbers_do_no_harm_to_whom_has_them_next(engine: Engine) -> None:
    """The cache is small, so that every block is used again, and none is filled to its end."""
    rng = random.Random(3)
    for round_ in range(3):
        bad = [
            Case([*prompt(rng, 5, 9), BAD, *prompt(rng, 5 * BLOCK, 6 * BLOCK)], MIX)
            for _ in range(3)
        ]
        assert all(ended(o, "embedding") for o in engine.run(bad, salt=f"bad{round_}"))
        good = [Case(prompt(rng, 3, 4 * BLOCK), spec, max_tokens=5) for spec in (MIX, None) * 4]
        assert_exact(engine, good, engine.run(good, salt=f"good{round_}"))


def test_a_head_that_is_read_for_a_report_is_watched(engine: Engine) -> None:
    rng = random.Random(4)
    spec = {"method": "best_of_n", "n": 2, "value": "critic"}
    bad = Case([BAD, *prompt(rng, 9, 9)], spec, report="summary", reply=[11, 12], max_tokens=1)
    good = Case(prompt(rng, 9, 9), spec, report="summary", reply=[11, 12], max_tokens=1)
    first, second = engine.run([bad, good])
    assert ended(first, "critic")
    assert second.outputs[0].finish_reason == "length"


def test_a_prompts_log_probabilities_do_not_hide_it(engine: Engine) -> None:
    rng = random.Random(5)
    case = Case([*prompt(rng, 9, 9), BAD, 20], MIX, params={"prompt_logprobs": 1}, max_tokens=2)
    assert ended(engine.run([case])[0], "embedding")
