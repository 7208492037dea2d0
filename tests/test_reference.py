"""The slow reference is itself checked: against `generate`, and against formulas by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from steering.kernels.reference import mix_reference
from steering.method import Logits, log_softmax
from steering.plan import BASE, Recipe
from tests.models import (
    ARCHITECTURES,
    EOS,
    MAX_LENGTH,
    SPREAD,
    VOCAB_SIZE,
    make_model,
    make_tokenizer,
)
from tests.reference import (
    decode,
    kl,
    load,
    one_thread,
    over_vocabularies,
    prompt_logprobs,
    scores,
)

PROMPT = "The old mill beside the bridge"
OTHER = "Please answer: 12 apples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model(root / name, name, seed=number)
        for number, name in enumerate(ARCHITECTURES)
    }


def ids(text: str) -> list[int]:
    found: list[int] = make_tokenizer().encode(text)
    return found


def generated(folder: Path, prompt: list[int], count: int) -> list[int]:
    with one_thread():
        out = load(folder).generate(
            torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def own(rows: Mapping[str, Logits]) -> Logits:
    return rows[BASE]


def proxy(rows: Mapping[str, Logits]) -> Logits:
    return rows[BASE] + 0.7 * (rows["expert"] - rows["anti"])


def no_end(rows: Mapping[str, Logits]) -> Logits:
    """The base without its end token, as `generate` does it below the minimum length."""
    z = rows[BASE].copy()
    z[EOS] = -np.inf
    return z


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tiny_model_is_small_and_its_scores_are_neither_flat_nor_saturated(
    folders: dict[str, Path], name: str
) -> None:
    assert sum(f.stat().st_size for f in folders[name].iterdir()) < 2_000_000
    assert len(json.loads((folders[name] / "config.json").read_text())["architectures"]) == 1
    random = torch.Generator().manual_seed(7)
    text = torch.randint(7, VOCAB_SIZE, (100,), generator=random).tolist()
    found = scores(load(folders[name]), text)
    assert found.shape == (100, VOCAB_SIZE)
    assert 0.7 * SPREAD < found.std(-1).mean() < 1.3 * SPREAD
    top = np.exp(np.apply_along_axis(log_softmax, 1, found)).max(-1)
    assert 0.02 < top.mean() < 0.7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tiny_model_reads_its_whole_context(folders: dict[str, Path], name: str) -> None:
    text = ids(PROMPT + " " + OTHER)
    changed = [text[0] + 1, *text[1:]]
    model = load(folders[name])
    assert np.abs(scores(model, text)[-1] - scores(model, changed)[-1]).max() > 1e-3
    steps = decode({BASE: model}, {BASE: text}, own, max_tokens=24)
    assert len({step.token for step in steps}) >= 3


def test_a_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        return (make_model(tmp_path / name, "qwen2", seed=seed) / "model.safetensors").read_bytes()

    first = weights("a", 1)
    assert weights("b", 1) == first
    assert weights("c", 2) != first


@pytest.mark.parametrize("size", [VOCAB_SIZE - 20, VOCAB_SIZE + 12])
def test_the_table_may_be_shorter_or_longer_than_the_tokenizer(tmp_path: Path, size: int) -> None:
    folder = make_model(tmp_path, "gpt2", vocab_size=size)
    assert scores(load(folder), [8, 9]).shape == (2, size)


def test_the_tokenizer_survives_the_disk(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    assert len(tokenizer) == VOCAB_SIZE
    text = "Ünïcode, 3 + 4 = 7\n<|end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>Hi<|end|><|assistant|>"
    assert tokenizer.model_max_length == MAX_LENGTH


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unsteered_decoding_is_greedy_generation(folders: dict[str, Path], name: str) -> None:
    prompt = ids(PROMPT)
    steps = decode({BASE: load(folders[name])}, {BASE: prompt}, no_end, max_tokens=16)
    assert [step.token for step in steps] == generated(folders[name], prompt, 16)


def test_a_twin_reads_its_own_prompt_and_the_chosen_tokens(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])

    def twin_only(rows: Mapping[str, Logits]) -> Logits:
        return no_end({BASE: rows["twin"]})

    prompts = {BASE: ids(PROMPT), "twin": ids(OTHER)}
    steps = decode({BASE: model, "twin": model}, prompts, twin_only, max_tokens=12)
    assert [step.token for step in steps] == generated(folders["llama"], ids(OTHER), 12)


def test_steps_report_the_formulas_numbers(folders: dict[str, Path]) -> None:
    models = {
        BASE: load(folders["llama"]),
        "expert": load(folders["qwen2"]),
        "anti": load(folders["opt"]),
    }
    prompts = {BASE: ids(PROMPT), "expert": ids(OTHER)}
    steps = decode(models, prompts, proxy, max_tokens=8, keep_logprobs=True)
    said: list[int] = []
    for step in steps:
        text = ids(PROMPT) + said
        base = scores(models[BASE], text)[-1]
        expert = scores(models["expert"], ids(OTHER) + said)[-1]
        steered = log_softmax(base + 0.7 * (expert - scores(models["anti"], text)[-1]))
        assert step.token == steered.argmax()
        # Their KV cache rounds differently from a pass over the whole text.
        assert step.logprob == pytest.approx(steered.max(), abs=1e-5)
        assert step.base_logprob == pytest.approx(log_softmax(base)[step.token], abs=1e-5)
        divergence = np.sum(np.exp(steered) * (steered - log_softmax(base)))
        assert step.kl == pytest.approx(divergence, abs=1e-5)
        assert step.changed == (steered.argmax() != base.argmax())
        assert step.logprobs == pytest.approx(steered, abs=1e-4)
        said.append(step.token)
    assert any(step.changed for step in steps)


def test_a_stop_id_ends_the_response_and_is_part_of_it(folders: dict[str, Path]) -> None:
    models = {BASE: load(folders["qwen3"])}
    free = [s.token for s in decode(models, {BASE: ids(PROMPT)}, own, max_tokens=8)]
    stop = free[4]
    stopped = decode(models, {BASE: ids(PROMPT)}, own, max_tokens=8, stop_ids={stop})
    assert [s.token for s in stopped] == free[: free.index(stop) + 1]


def test_prompt_logprobs_are_those_of_decoding_that_text(folders: dict[str, Path]) -> None:
    models = {
        BASE: load(folders["llama"]),
        "expert": load(folders["gpt2"]),
        "anti": load(folders["qwen3"]),
    }
    prompt = ids(PROMPT)
    steps = decode(models, {BASE: prompt}, proxy, max_tokens=6)
    text = prompt + [step.token for step in steps]
    along = prompt_logprobs(models, text, proxy)
    assert along.shape == (len(text) - 1, VOCAB_SIZE)
    for t, step in enumerate(steps, start=len(prompt) - 1):
        assert along[t, text[t + 1]] == pytest.approx(step.logprob, abs=1e-5)


def test_ids_that_a_stream_lacks_get_no_delta(folders: dict[str, Path], tmp_path: Path) -> None:
    size = VOCAB_SIZE - 20
    short = load(make_model(tmp_path, "gpt2", vocab_size=size))
    models = {BASE: load(folders["llama"]), "expert": short, "anti": load(folders["opt"])}
    read_as = [*range(size), *[EOS] * 20]
    prompt = [7, VOCAB_SIZE - 1, 30]
    recipe = Recipe({BASE: 1.0, "expert": 0.7, "anti": -0.7})
    steps = decode(
        models,
        {BASE: prompt},
        over_vocabularies(partial(mix_reference, recipe), {"expert": range(size, VOCAB_SIZE)}, [5]),
        max_tokens=1,
        read_as={"expert": read_as},
        keep_logprobs=True,
    )
    found = steps[0].logprobs
    assert found is not None
    # The product of experts, by hand, in probabilities; nothing is known of the lacking ids.
    rows = {BASE: prompt, "expert": [7, EOS, 30], "anti": prompt}
    p = {n: np.exp(log_softmax(np.delete(scores(models[n], rows[n])[-1], 5))) for n in models}
    ratio = np.ones(VOCAB_SIZE - 1)
    ratio[: size - 1] = (p["expert"] / p["anti"][: size - 1]) ** 0.7
    expected = p[BASE] * ratio
    assert np.isneginf(found[5])
    assert np.delete(found, 5) == pytest.approx(np.log(expected / expected.sum()), abs=1e-5)


def test_kl_ignores_what_cannot_happen() -> None:
    steered = np.array([np.log(0.5), np.log(0.5), -np.inf])
    base = np.log([0.25, 0.25, 0.5])
    assert kl(steered, base) == pytest.approx(np.log(2))
