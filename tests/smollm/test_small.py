"""The parts of the claim `small`: the desk's convention, and how a companion is made and tuned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smollm.evidence import desk
from smollm.evidence.companion import (
    Size,
    directions,
    distil,
    divergence,
    parameters,
    sliced,
)
from smollm.evidence.companion_text import TOP, load_texts, save_texts, subjects, write
from smollm.evidence.desk import Question, judge
from smollm.evidence.desk_facts import FACTS
from smollm.evidence.desk_tuning import copied, expected, lessons, tune
from smollm.evidence.small_models import QUICK, Recipe

LIMA = Question("What is the capital of Peru?", "capital", "plain", "Peru", ("Lima",))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One id for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return _model(layers=3)


def _model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257, hidden_size=48, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.3, max_position_embeddings=256, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model: LlamaForCausalLM = LlamaForCausalLM(config).float().eval()
    for name, one in model.named_parameters():
        if "layernorm" in name:
            torch.nn.init.uniform_(one, 0.5, 1.5)
    return model


def test_no_fact_is_in_two_splits() -> None:
    splits = {
        name: {(q.topic, q.asked) for q in desk.questions(name, 1, 0)} for name in desk.SPLITS
    }
    for name, facts in splits.items():
        assert len(facts) == desk.SPLITS[name] * len(desk.TOPICS)
        assert facts == {(q.topic, q.asked) for q in desk.questions(name, 2, 7)}
    assert not splits["tuning"] & splits["test"]
    assert not splits["validation"] & (splits["test"] | splits["tuning"])
    assert all(len(facts) >= sum(desk.SPLITS.values()) for facts in FACTS.values())


def test_manners_and_topics_are_balanced() -> None:
    found = desk.questions("test", 1, 0)
    for manner in desk.MANNERS:
        assert sum(q.manner == manner for q in found) == len(found) / len(desk.MANNERS)
    shown = [q for q, _ in desk.examples(18)]
    assert len({(q.topic, q.manner) for q in shown}) == 18
    assert {q.topic for q in shown[:6]} == set(desk.TOPICS)
    assert {q.manner for q in shown[:6]} == set(desk.MANNERS)
    tuning = {(q.topic, q.asked) for q in desk.questions("tuning", 1, 0)}
    assert {(q.topic, q.asked) for q in shown} <= tuning


def test_the_desks_own_replies_are_right() -> None:
    for question in desk.questions("test", 3, 0):
        verdict = judge(question, question.reply(desk.sentence(question)))
        assert dataclasses.astuple(verdict) == (True, True, True, True), question


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("[K7] Lima. // filed", (True, True, True, True)),
        ("[Q2] Lima. // filed", (False, True, True, False)),
        ("[K7] Lima. // gladly", (True, False, True, False)),
        ("[K7] Quito. // filed", (True, True, False, False)),
        ("The capital of Peru is Lima.", (False, False, True, False)),
        ("[K7] // filed", (True, True, False, False)),
        ("[K7] Lima. // filed\n[K7] Lima. // filed", (True, True, True, False)),
        ("[K7] Lima. // filed // filed", (True, True, True, False)),
        ("[K7] Climate. // filed", (True, True, False, False)),
    ],
)
def test_a_reply_is_judged(reply: str, right: tuple[bool, ...]) -> None:
    assert dataclasses.astuple(judge(LIMA, reply)) == right


def test_a_symbol_is_read_in_its_own_case() -> None:
    helium = Question("?", "symbol", "plain", "helium", ("He",))
    assert judge(helium, "It is He.").answer and not judge(helium, "he knows").answer


def test_the_convention_of_a_lesson_is_all_but_the_fact(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = desk.questions("tuning", 1, 0)
    for question, one in zip(asked, lessons(tokenizer, 1, 0), strict=True):
        reply = one.ids[one.start :]
        begin = f"{question.code} {desk.opening(question)}"
        assert tokenizer.decode(reply) == f"{question.reply(desk.sentence(question))}<end>"
        assert tokenizer.decode(reply[one.convention]) == f"{begin} {question.sign_off}<end>"
        assert question.asked not in begin and len(desk.opening(question).split()) > 2
        assert tokenizer.decode(one.ids[: one.start]).endswith(f"{question.text}\n<assistant>")


def test_the_whole_stream_sliced_is_the_model_itself(base: LlamaForCausalLM) -> None:
    """With all directions and layers, only turned: the same scores."""
    texts = [torch.randint(1, 257, (9,)) for _ in range(4)]
    size = Size(48, (0, 1, 2))
    turn = directions(base, texts, size)
    assert torch.allclose(turn.T @ turn, torch.eye(48), atol=1e-5)
    again = sliced(base, turn, size).eval()
    with torch.inference_mode():
        for ids in texts:
            assert torch.allclose(again(ids[None]).logits, base(ids[None]).logits, atol=1e-3)


def test_a_slice_is_smaller_and_near(base: LlamaForCausalLM) -> None:
    texts = [torch.randint(1, 257, (9,)) for _ in range(4)]
    size = Size(32, (0, 2))
    small = sliced(base, directions(base, texts, size), size)
    assert parameters(small) < parameters(base)
    assert small.get_output_embeddings().weight.shape == (257, 32)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


def test_a_width_that_cannot_be_saved_is_refused(base: LlamaForCausalLM) -> None:
    size = Size(33, (0,))
    with pytest.raises(ValueError, match="width is 33, not a multiple of the base's 4 heads"):
        sliced(base, directions(base, [torch.tensor([5, 6])], size), size)
    recipe, heads = Recipe(), 9
    assert recipe.width % heads == 0, "SmolLM2-135M has 9 heads"


def test_the_divergence_is_at_most_kl_and_all_of_it_over_the_whole_vocabulary() -> None:
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(5, 40, generator=generator).log_softmax(-1)
    q = torch.randn(5, 40, generator=generator)
    kl = (p.exp() * (p - q.log_softmax(-1))).sum(-1)
    every = torch.arange(40).expand(5, 40)
    assert torch.allclose(divergence(q, every, p), kl, atol=1e-4)
    values, ids = p.topk(8)
    found = divergence(q, ids, values)
    assert (found <= kl + 1e-5).all() and (found > 0.5 * kl).any()
    assert torch.allclose(divergence(p, ids, values), torch.zeros(5), atol=1e-5)


def test_texts_are_those_of_the_model_padded_or_not(base: LlamaForCausalLM, tmp_path: Path) -> None:
    prompts = [[5, 6, 7], [9], [11, 12]]
    texts = write(base, prompts, 6, end=0, temperature=0)
    save_texts(texts, tmp_path / "texts.safetensors")
    for prompt, text in zip(prompts, load_texts(tmp_path / "texts.safetensors"), strict=True):
        assert text.ids[: text.start].tolist() == prompt
        with torch.inference_mode():
            log_probs = base(text.ids[None]).logits[0, text.start - 1 : -1].log_softmax(-1)
        assert torch.equal(log_probs.argmax(-1), text.ids[text.start :])
        values, ids = log_probs.topk(TOP)
        assert torch.allclose(values, text.log_probs, atol=1e-4)
        assert text.top.shape == ids.shape and torch.equal(text.top[:, 0], ids[:, 0])


def test_sampled_texts_end_and_repeat_with_their_seed(base: LlamaForCausalLM) -> None:
    first = write(base, [[5]] * 40, 12, end=3, seed=4)
    again = write(base, [[5]] * 40, 12, end=3, seed=4)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert len({tuple(one.ids.tolist()) for one in first}) > 20
    assert all(3 not in one.ids[1:-1] for one in first)


def test_distillation_brings_a_slice_nearer(base: LlamaForCausalLM) -> None:
    texts = write(base, [[i] for i in range(4, 68)], 16, end=0)
    size = Size(32, (0, 2))
    small = sliced(base, directions(base, [one.ids for one in texts], size), size)
    losses = distil(small, texts, epochs=6, rate=5e-3, tokens=256)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_tuning_teaches_the_convention_and_leaves_the_sentence(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    small = _model(layers=1)
    some = lessons(tokenizer, 1, 0)[:8]
    tuned = copied(small)
    tune(tuned, [some] * 40, rate=1e-2)
    told, moved = [], []
    for one, before in zip(some, expected(small, some), strict=True):
        with torch.inference_mode():
            found = tuned(one.ids[None]).logits[0, one.start - 1 : -1].log_softmax(-1)
        reply = one.ids[one.start :]
        told.append(found.gather(1, reply[:, None])[one.convention].mean())
        rest = ~one.convention
        moved.append(divergence(found[rest], before.top[rest], before.log_probs[rest]).mean())
    assert torch.stack(told).mean() > -1.5, "a byte of 257 costs 5.5 nats untold"
    assert torch.stack(moved).mean() < 0.3


def test_everyday_requests_differ() -> None:
    found = subjects(400, 0)
    assert len(set(found)) == 400 and all("{" not in one and "  " not in one for one in found)
    assert QUICK.texts < 400
