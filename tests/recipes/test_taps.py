"""DoLa and SLED as published, over `transformers`' hidden states in float64."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from steering.engine_args import StreamSource
from tests.engine.driver import Case, Engine, logprobs, tokens
from tests.engine.test_exactness import prompt
from tests.recipes.table_taps import ROWS
from tests.reference import load, one_thread

pytestmark = pytest.mark.engine

LAYERS = 3

Formula = Callable[[list[torch.Tensor]], torch.Tensor]
"""Scores of all layers, [V] float64 each, the last one's last → [V]; −∞ where ruled out."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Three layers, tied embeddings; each layer but the last is tapped without the norm."""
    taps = {f"l{n}": StreamSource(on="base", layer=n, norm=False) for n in range(LAYERS)}
    found = Engine(tmp_path_factory.mktemp("recipes"), ("qwen2", 500), {}, taps=taps)
    yield found
    del found
    gc.collect()


def all_layers(engine: Engine, ids: list[int]) -> list[torch.Tensor]:
    """The scores that each layer's hidden state gives behind a text; the last one's is normed."""
    model = load(engine.folders["base"])
    with one_thread(), torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return [model.lm_head(h[0, -1]).double() for h in states]


def dola(chosen: list[int], alpha: float = 0.1, jsd: bool = False) -> Formula:
    """DoLa's scores, the layer chosen from some."""

    def kl(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x * (x.log() - y.log())).sum())

    def formula(layers: list[torch.Tensor]) -> torch.Tensor:
        p = layers[-1].softmax(0)

        def distance(n: int) -> float:
            q = layers[n].softmax(0)
            mean = (p + q) / 2
            return kl(p, mean) + kl(q, mean) if jsd else kl(mean, p) + kl(mean, q)

        early = layers[max(chosen, key=distance)].log_softmax(0)
        z = layers[-1].log_softmax(0) - early
        return torch.where(p >= alpha * p.max(), z, -torch.inf)

    return formula


def sled(rate: float, k: int) -> Formula:
    """SLED's scores from all layers."""

    def formula(layers: list[torch.Tensor]) -> torch.Tensor:
        final, latent = layers[-1], torch.zeros_like(layers[-1])
        kept = final.topk(k).indices
        for early in layers[:-1]:
            for i in kept.tolist():
                gradient = early.softmax(0)
                gradient[i] -= 1
                cosine = torch.nn.functional.cosine_similarity(early - final, gradient, dim=0)
                latent[i] += cosine.clamp(min=0) ** 2
        if latent.any():
            latent /= latent.sum()
        z = final
        for t in range(10):
            z = z - rate * (1 - t / 10) * (z.softmax(0) - latent)
        return torch.full_like(z, -torch.inf).index_copy(0, kept, z[kept])

    return formula


def assert_follows(engine: Engine, spec: dict[str, Any], formula: Formula, seed: int) -> None:
    rng = random.Random(seed)
    tried = [Case(prompt(rng, 2, 120), spec, max_tokens=8) for _ in range(4)]
    for case, output in zip(tried, engine.run(tried), strict=True):
        text, wanted = list(case.prompt), []
        for token in tokens(output):
            z = formula(all_layers(engine, text)).log_softmax(0)
            assert token == int(z.argmax()), case
            wanted.append(float(z[token]))
            text.append(token)
        assert logprobs(output) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("spec", "formula"),
    [
        (json.loads(ROWS[0].request), dola([1])),
        (json.loads(ROWS[1].request), dola([0, 1, 2])),
        ({"method": "dola", "layers": ["l1", "l2"], "jsd": True}, dola([1, 2], jsd=True)),
        ({"method": "dola", "layers": ["l0", "l2"], "relative_top": 0.5}, dola([0, 2], 0.5)),
    ],
    ids=["static", "dynamic", "jsd", "narrow"],
)
def test_dola(engine: Engine, spec: dict[str, Any], formula: Formula) -> None:
    assert_follows(engine, spec, formula, 1)


@pytest.mark.parametrize(("rate", "k"), [(2.0, 10), (0.5, 3)])
def test_sled(engine: Engine, rate: float, k: int) -> None:
    spec = {**json.loads(ROWS[2].request), "rate": rate, "top_k": k}
    assert_follows(engine, spec, sled(rate, k), 2)
