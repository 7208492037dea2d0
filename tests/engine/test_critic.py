"""A trained critic in a real engine gives the probabilities that its recipe trained."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.formats.base import base_shapes
from adapters.formats.inspect import inspect
from adapters.training.critic.classifiers import Row, features, load_body
from adapters.training.critic.settings import CriticSettings
from adapters.training.critic.train import train
from steering.engine_args import StreamSource, adapter_engine_args
from tests.adapters.make import make_lora
from tests.engine.driver import Case, Engine, Use, tokens
from tests.engine.heads import Headed
from tests.engine.test_exactness import prompt
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine

CRITICAL = {"method": "critical_tokens", "pretrained": "plain", "mode": "soft"}


class Trained:
    """Critics of three kinds for the engine's base, as a user would train them."""

    def __init__(self) -> None:
        self.probes: dict[str, tuple[Path, Path | None]] = {}

    def __call__(self, folder: Path, bodies: Mapping[str, Path]) -> Mapping[str, Headed]:
        rng = random.Random(3)
        entries = []
        for _ in range(40):
            text = f" There were {rng.randint(1, 99)} boats"
            entries.append({"prompt": f"How many? {rng.random()}", "completion": text})
        data = folder / "data.jsonl"
        data.write_text("\n".join(map(json.dumps, entries)))
        body = bodies["base"]
        self.adapter = make_lora(folder / "lora", body, seed=9)
        same: dict[str, Any] = {"label": "names", "data": data, "epochs": 20, "rate": 1e-2}
        found: dict[str, Headed] = {}
        for name, adapter, hidden in (
            ("linear", None, None),
            ("network", None, 16),
            ("tuned", self.adapter, 16),
        ):
            settings = CriticSettings(
                body, folder / name, probe=True, hidden=hidden, adapter=adapter, **same
            )
            train(settings, say=lambda _: None)
            source = StreamSource(head="classifier", on="base", path=str(settings.out))
            found[name] = Headed(source, lambda _: 0.0, "base")
            self.probes[name] = (settings.out, adapter)
        for name, rank in (("whole", None), ("lora", 3)):
            settings = CriticSettings(body, folder / f"{name}-critic", rank=rank, **same)
            train(settings, say=lambda _: None)
            model = settings.out if rank is None else body
            path = None if rank is None else str(settings.out)
            source = StreamSource(str(model), head="classifier", path=path)
            found[name] = Headed(source, lambda _: 0.0)
        return found


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, trained: Trained) -> Iterator[Engine]:
    torch.set_num_threads(1)
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE),
        {"plain": ("gpt2", VOCAB_SIZE)},
        trained,
        **adapter_engine_args(2, 16),
    )
    found.load_adapters({"tuned": trained.adapter})
    yield found
    del found
    gc.collect()


def served(engine: Engine, case: Case) -> tuple[list[int], list[float]]:
    """The drawn ids, and the probability before each of them."""
    output = engine.run([case])[0]
    detail = engine.report(engine.tags[0], output)["0"]["detail"]
    return tokens(output), [entry["critical_probability"] for entry in detail]


@pytest.mark.parametrize("name", ["linear", "network", "tuned"])
def test_a_probe_on_base_or_base_and_adapter(engine: Engine, trained: Trained, name: str) -> None:
    """With the recipe's own states: what it computed with is what the engine computes with."""
    folder, adapter = trained.probes[name]
    base = engine.folders["base"]
    uses = [Use("tuned")] if adapter else []
    case = Case(prompt(random.Random(4), 20, 20), {**CRITICAL, "classifier": name},
                report="tokens", adapters=uses, max_tokens=12)  # fmt: skip
    ids, got = served(engine, case)
    artefact = inspect(adapter, base_shapes(base), max_rank=64) if adapter else None
    whole = Row((*case.prompt, *ids[:-1]), len(case.prompt) - 1, (False,) * len(ids))

    class Bar:
        def update(self, n: int) -> None: ...

    states = features(load_body(base, artefact, "float32", "cpu"), [whole], 1, "cpu", Bar())[0]
    assert got == pytest.approx(probabilities(folder, states), abs=1e-4)
    assert max(got) - min(got) > 0.01, "a classifier that says the same of everything"


def probabilities(folder: Path, states: torch.Tensor) -> list[float]:
    """[N] of hidden states [N, H], by the written head."""
    from safetensors.torch import load_file

    head = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    x = states.double()
    if "0.weight" in head:
        x = (x @ head["0.weight"].T + head["0.bias"]).tanh()
        head = {"weight": head["2.weight"], "bias": head["2.bias"]}
    found: list[float] = (x @ head["weight"].T + head["bias"])[:, 0].sigmoid().tolist()
    return found


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_classifier_with_a_body_of_its_own(engine: Engine, name: str) -> None:
    """Served as `transformers` and PEFT compute it."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    case = Case(prompt(random.Random(5), 20, 20), {**CRITICAL, "classifier": name},
                report="tokens", max_tokens=12)  # fmt: skip
    ids, got = served(engine, case)
    source = engine.heads[name].source
    assert source.model is not None
    read: Sequence[int] = [*case.prompt, *ids[:-1]]
    with torch.inference_mode():
        if source.path is None:
            model = AutoModelForTokenClassification.from_pretrained(source.model).eval()
            logits = model(torch.tensor([read])).logits[0, len(case.prompt) - 1 :, 0]
        else:
            model = AutoModelForCausalLM.from_pretrained(source.model, dtype=torch.float32)
            model = PeftModel.from_pretrained(model, source.path).eval()
            out = model(torch.tensor([read]), output_hidden_states=True).hidden_states[-1]
            head = load_file(Path(source.path) / "head.safetensors")
            states = out[0, len(case.prompt) - 1 :]
            logits = (states @ head["score.weight"].T + head["score.bias"])[:, 0]
    assert got == pytest.approx(logits.double().sigmoid().tolist(), abs=1e-4)
    assert max(got) - min(got) > 0.01, "a classifier that says the same of everything"
