"""The training forward is the serving definition at T = 1, in a layer and in a whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.formats.inspect import read_artefact
from adapters.kernels.reference import Term, adapter_sum, routing
from adapters.training.data import IGNORED
from adapters.training.meteora.pack import write_pack
from adapters.training.meteora.routed import Factors, Routed, install, losses
from adapters.training.meteora.settings import Settings
from tests.adapters.make import ATTENTION, make_lora
from tests.adapters.models import Applied, adapted
from tests.models import make_model

INTO, OUT = 12, 7
RANKS = {0: 3, 2: 1, 3: 4}
"""Member → rank; member 1 leaves the layer alone."""


def layer(top_k: int, random: torch.Generator) -> tuple[Routed, list[Factors]]:
    """A layer of four members, float32."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    base = torch.nn.Linear(INTO, OUT, bias=False)
    base.weight.data = draw(OUT, INTO)
    parts = [Factors(m, draw(r, INTO), draw(OUT, r), 0.5 + m) for m, r in RANKS.items()]
    return Routed(base, parts, draw(4, INTO), top_k), parts


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_the_forward_is_the_serving_definition(top_k: int) -> None:
    random = torch.Generator().manual_seed(top_k)
    routed, parts = layer(top_k, random)
    x = torch.randn(2, 9, INTO, generator=random)
    rows = x.flatten(0, 1).double().numpy()
    assert isinstance(routed.base, torch.nn.Linear)
    gates = routing(rows @ routed.gate.detach().double().numpy().T, top_k, 1.0)
    terms = [
        Term(p.a.double().numpy(), p.b.double().numpy(), p.scale, gates[:, p.member]) for p in parts
    ]
    want = adapter_sum(rows, routed.base.weight.detach().double().numpy(), terms)
    got = routed(x).detach().flatten(0, 1).double().numpy()
    assert np.abs(got - want).max() < 1e-4


def test_gradients_reach_the_gate_through_the_chosen_members_only() -> None:
    """With k = 1 the weight is 1 whatever the scores, so the answer does not depend on them."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, INTO, generator=random)
    for top_k, moved in ((1, False), (2, True)):
        routed, _ = layer(top_k, random)
        routed(x).square().sum().backward()
        assert routed.gate.grad is not None
        assert bool(routed.gate.grad.abs().max() > 0.1) == moved


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), "llama")


def test_the_written_pack_computes_what_was_trained(base: Path, tmp_path: Path) -> None:
    """Adapters of different ranks and modules, read back by hooks that share no code with us."""
    folders = {
        "one": make_lora(tmp_path / "one", base, seed=1, r=2),
        "two": make_lora(tmp_path / "two", base, seed=2, r=5, targets=ATTENTION),
        "three": make_lora(tmp_path / "three", base, seed=3, r=3, use_rslora=False),
    }
    artefacts = [read_artefact(folder) for folder in folders.values()]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    layers = install(model, artefacts, top_k=2, gate_std=0.1, seed=4)
    for routed in layers.values():
        routed.a.data += 0.01  # As if trained, so that copies of the old files would be noticed.
    settings = Settings(base, folders, folders, tmp_path / "pack", top_k=2, adapters_rate=1e-3)
    write_pack(tmp_path / "pack", settings, artefacts, layers)
    ids = torch.arange(7, 47)[None]
    with torch.inference_mode():
        ours = model(ids).logits
        theirs = adapted(base, (Applied(tmp_path / "pack"),))(ids).logits
    assert (ours - theirs).abs().max() < 1e-3
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert (ours - plain(ids).logits).abs().max() > 0.1


def test_the_losses_are_the_papers(base: Path, tmp_path: Path) -> None:
    """Both cross-entropies by hand, with padding and labels that do not count."""
    folders = [
        make_lora(tmp_path / n, base, seed=i, targets=["q_proj"]) for i, n in enumerate("ab")
    ]
    artefacts = [read_artefact(folder) for folder in folders]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    layers = install(model, artefacts, top_k=1, gate_std=0.3, seed=5)
    seen: dict[str, torch.Tensor] = {}
    for name, routed in layers.items():
        routed.register_forward_hook(
            lambda module, given, _, name=name: seen.update({name: given[0] @ module.gate.T})
        )
    ids = torch.tensor([[9, 10, 11, 12], [13, 14, 0, 0]])
    labels = torch.tensor([[IGNORED, IGNORED, 11, 12], [IGNORED, 14, IGNORED, IGNORED]])
    members = torch.tensor([[0, 0, 1, 1], [1, 1, IGNORED, IGNORED]])
    with torch.no_grad():
        found = losses(model, layers, ids, labels, members, IGNORED)
        logits = model(ids).logits.log_softmax(-1)
    told = [logits[0, 1, 11], logits[0, 2, 12], logits[1, 0, 14]]
    assert float(found.language) == pytest.approx(-float(torch.stack(told).mean()), rel=1e-5)
    per_gate = []
    for scores in seen.values():
        logs = scores.log_softmax(-1)
        places = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
        per_gate.append(-sum(float(logs[r, t, members[r, t]]) for r, t in places) / len(places))
    assert len(per_gate) == 2
    assert float(found.gates) == pytest.approx(sum(per_gate) / 2, rel=1e-5)
    assert 0 <= float(found.hit) <= 1
