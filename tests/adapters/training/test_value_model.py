"""Values, loss and files of a value model against plain transformers, row by row."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.formats.base import base_shapes
from adapters.formats.inspect import inspect
from adapters.training.served import Served
from adapters.training.value import fit as value_fit
from adapters.training.value.fit import Row
from adapters.training.value.model import ValueModel
from adapters.training.value.settings import ValueSettings
from steering.heads import find_head
from tests.adapters.training.test_returns import lambda_return
from tests.models import EOS, VOCAB_SIZE, make_model

DRAW = random.Random(4)
ROWS = [
    Row([DRAW.randrange(VOCAB_SIZE) for _ in range(start + 1 + length)], start, DRAW.gauss(0, 2))
    for start, length in [(0, 1), (5, 9), (30, 3), (2, 20)]
]


def stirred(body: Path, rank: int | None, dtype: str = "float32") -> ValueModel:
    """A value model as if it had been trained: nothing in it is zero."""
    model = ValueModel(body, rank=rank, alpha=6.0, mean=0.5, seed=1, device="cpu", dtype=dtype)
    draw = torch.Generator().manual_seed(2)
    for parameter in model.parameters.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def values(model: ValueModel, rows: list[Row]) -> list[list[float]]:
    found, real = value_fit._values(model, rows)
    return [row[mask].tolist() for row, mask in zip(found, real, strict=True)]


def written(folder: Path, body: Path | None) -> list[list[float]]:
    """V of all states, from the files alone, by classes that are not ours, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(body or folder, dtype=torch.float32)
    if body is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    tensors = load_file(folder / ("model.safetensors" if body is None else "v_head.safetensors"))
    weight, bias = (tensors[f"v_head.summary.{name}"].double() for name in ("weight", "bias"))
    found = []
    for row in ROWS:
        with torch.inference_mode():
            ids = torch.tensor([row.ids])
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0].double()
        found.append((hidden[row.start :] @ weight[0] + bias).tolist())
    return found


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "opt")


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_says_what_was_trained(
    tmp_path: Path, architecture: str, rank: int | None
) -> None:
    body = make_model(tmp_path / "body", architecture)
    model = stirred(body, rank)
    before = values(model, ROWS)
    model.write(tmp_path / "out")
    after = written(tmp_path / "out", None if rank is None else body)
    for row, one, two in zip(ROWS, before, after, strict=True):
        assert len(one) == row.length + 1
        assert one == pytest.approx(two, abs=2e-4)
    width = AutoModelForCausalLM.from_pretrained(body).config.hidden_size
    assert find_head(tmp_path / "out", "value", width).layers[0].bias is not None
    if rank is None:
        text = "The crew rows."
        ids = [
            AutoTokenizer.from_pretrained(f)(text)["input_ids"] for f in (body, tmp_path / "out")
        ]
        assert ids[0] == ids[1]
    else:
        lora = inspect(tmp_path / "out", base_shapes(body), max_rank=rank)
        assert len(lora.modules) > 7


def test_values_start_at_the_mean_reward(tmp_path: Path) -> None:
    body = make_model(tmp_path / "body", "llama")
    for rank in (None, 2):
        model = ValueModel(
            body, rank=rank, alpha=2, mean=-1.5, seed=0, device="cpu", dtype="float32"
        )
        assert {v for row in values(model, ROWS) for v in row} == {-1.5}


@pytest.mark.parametrize("rank", [None, 4])
def test_the_files_keep_the_dtype_of_the_body(tmp_path: Path, rank: int | None) -> None:
    body = make_model(tmp_path / "body", "llama")
    AutoModelForCausalLM.from_pretrained(body, dtype=torch.bfloat16).save_pretrained(body)
    stirred(body, rank, "bfloat16").write(tmp_path / "out")
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                wanted = torch.float32 if "v_head" in name else torch.bfloat16
                assert stream.get_tensor(name).dtype == wanted


@pytest.mark.parametrize("rank", [None, 4])
def test_loss_and_gradients_are_those_of_the_formula(tmp_path: Path, rank: int | None) -> None:
    """The batch's against a float64 sum over rows, with targets from the definition."""
    body = make_model(tmp_path / "body", "llama")
    settings = ValueSettings(
        Served("http://x"), body, "", body, body, rank=rank, gamma=0.9, lambda_=0.7
    )
    model = stirred(body, rank)
    loss = value_fit._loss(settings, model, ROWS)
    found = {name: p.grad.clone() for name, p in model.parameters.items() if p.grad is not None}
    assert found.keys() == model.parameters.keys()
    for parameter in model.parameters.values():
        parameter.grad = None
    errors: list[Tensor] = []
    for row in ROWS:
        own = model.values([row.ids], torch.tensor([row.start]), row.length + 1)[0].double()
        wanted = [
            lambda_return(own.tolist(), row.reward, t, 0.9, 0.7) for t in range(row.length + 1)
        ]
        errors += list((own - torch.tensor(wanted, dtype=torch.float64)).square())
    reference = 0.5 * torch.stack(errors).mean()
    reference.backward()
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    for name, parameter in model.parameters.items():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-5), name


# A random body has no head that looks one id back, and a LoRA of it learns none so soon.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "rate", "least"),
    [pytest.param(None, 3e-3, 0.9, marks=pytest.mark.nightly), (8, 3e-3, 0.4)],
)
def test_it_learns_what_later_tokens_bring(
    tmp_path: Path, rank: int | None, rate: float, least: float
) -> None:
    """Half of the reward is decided by the reply's first id, half by its last before the end."""
    body = make_model(tmp_path / "body", "llama")
    draw = random.Random(5)
    rows = []
    for _ in range(2176):
        reply = [draw.randrange(100, 110) for _ in range(draw.randint(4, 10))]
        rows.append(Row([9, 8, *reply, EOS], 1, float((reply[0] < 105) + (reply[-1] < 105))))
    settings = ValueSettings(
        Served("http://x"), body, "", body, tmp_path, rank=rank, rate=rate, epochs=6
    )
    model = ValueModel(body, rank=rank, alpha=16, mean=1.0, seed=1, device="cpu", dtype="float32")
    (tmp_path / "work").mkdir()
    told: list[str] = []
    found = value_fit.fit(
        settings, model, rows[:2048], rows[2048:], {}, tmp_path / "work", told.append
    )
    first, middle, last = found["first"], found["middle"], found["last"]
    assert first is not None and middle is not None and last is not None
    assert first < 0.05 and 0.4 < middle < 0.6 and last > least, found
    assert told[-1].startswith("step 384 of 384: loss ") and "first" in told[-1]


def test_batches_hold_each_reply_once_an_epoch_in_order_of_the_seed() -> None:
    rows = [Row([1] * (i % 37 + 2), 0, float(i)) for i in range(205)]
    body = Path()
    settings = ValueSettings(Served("http://x"), body, "", body, body, batch=8, epochs=2, seed=3)
    whole = list(value_fit._batches(settings, rows, 0))
    assert len(whole) == 2 * 26
    for epoch in (whole[:26], whole[26:]):
        assert sorted(row.reward for batch in epoch for row in batch) == list(range(205))
        assert all(len(batch) <= 8 for batch in epoch)
    assert whole[:26] != whole[26:]
    assert list(value_fit._batches(settings, rows, 30)) == whole[30:]
    # Rewards follow lengths: batches of one length would pull the head to and fro.
    lengths = [[len(row.ids) for row in batch] for batch in whole if len(batch) == 8]
    assert fmean(max(some) - min(some) for some in lengths) > 18  # of 36
