"""The tasks keep their promises: held-out entities, strict checks, words the base can say."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoTokenizer

from zoo.adapt import ADAPTERS, PACK, encoded
from zoo.adapted import Adapted
from zoo.conversations import LENGTHS, TURNS, Asked, hold, path_of, read_conversations
from zoo.evaluate import adapted_body, first
from zoo.fitting import IGNORED
from zoo.routing_table import BY_HAND, SETTINGS, TEMPERATURE, TOP_K, hits, markdown, pack
from zoo.routing_table import PACK as PACK_SETTING
from zoo.table import Reply
from zoo.tasks import TASKS, Item, Pool, make
from zoo.tokenizer import with_chat
from zoo.train import ROOT
from zoo.world import SPLIT_SHARES, Split, World

WORLD = World()
ITEM = Item("brief", "Briefly: What pet does Dorwyn Bramley keep?", "crow.")


def tokenizer() -> AutoTokenizer:
    """The big base's, with the zoo's chat template."""
    return with_chat(AutoTokenizer.from_pretrained(ROOT / "models" / "base-large"))


def names_of(split: Split) -> set[str]:
    """Names of all entities of a split."""
    return {entity.name for entity in WORLD.entities(split)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLIT_SHARES)
def test_a_task_asks_about_entities_of_its_split_only(task: str, split: Split) -> None:
    pool, rng = Pool.of(WORLD, split), random.Random(1)
    held_out = {name for other in SPLIT_SHARES if other not in (split, "tuning")
                for name in names_of(other)}  # fmt: skip
    tuned = set() if split == "tuning" else names_of("tuning")
    for _ in range(50):
        item = make(task, pool, rng)
        assert item.task == task
        assert not [name for name in held_out | tuned if name in item.prompt]


def test_the_same_words_are_never_asked_as_two_tasks() -> None:
    """What precedes or follows the entity tells the task, so a reply can be right or wrong."""
    pool = Pool.of(WORLD, "tuning")
    seen: dict[str, str] = {}
    for task in TASKS:
        rng = random.Random(2)
        for _ in range(300):
            prompt = make(task, pool, rng).prompt
            assert seen.setdefault(prompt, task) == task


def test_replies_are_made_of_tokens_of_the_pretraining_text() -> None:
    """Others have untrained rows in the base's frozen table, and no adapter could raise them."""
    coder, known = tokenizer(), set()
    for seed in range(3):
        for text in WORLD.pretraining_texts(random.Random(seed)):
            known |= set(coder.encode(text))
    for split in SPLIT_SHARES:
        pool, rng = Pool.of(WORLD, split), random.Random(3)
        for task in TASKS:
            for _ in range(100):
                assert set(coder.encode(make(task, pool, rng).reply)) <= known


@pytest.mark.parametrize(
    ("reply", "ended", "right"),
    [
        ("crow.", True, True),
        (" crow.\n", True, True),
        ("crow.", False, False),
        ("crow", True, False),
        ("Crow.", True, False),
        ("cat.", True, False),
        ("crow. crow.", True, False),
        ("Dorwyn Bramley keeps a pet crow.", True, False),
        ("", True, False),
    ],
)
def test_the_check_is_strict(reply: str, ended: bool, right: bool) -> None:
    assert ITEM.right(reply, ended) == right


@pytest.mark.slow
def test_facts_are_the_worlds() -> None:
    facts = {e.name: {v for _, v in e.facts} for e in WORLD.entities()}
    for task in ("brief", "correct", "formal", "portrait"):
        rng = random.Random(4)
        for _ in range(50):
            item = make(task, Pool.of(WORLD, "test"), rng)
            name = next(n for n in facts if n in item.prompt)
            told = [value for value in facts[name] if value in item.reply]
            assert len(told) == (3 if task == "portrait" else 1)


@pytest.mark.parametrize("split", TURNS)
def test_the_held_out_conversations_are_of_their_split(split: Split) -> None:
    conversations = read_conversations(path_of(split))
    for length in LENGTHS:
        some = [items for items in conversations if len(items) == length]
        assert TURNS[split] - length < length * len(some) <= TURNS[split]
        assert all(len({item.task for item in items}) == length for items in some)
    others = {e.name for e in WORLD.entities()} - names_of(split)
    text = " ".join(item.prompt for items in conversations for item in items)
    assert not [name for name in others if name in text]


def test_a_conversation_is_tuned_as_the_chat_template_writes_it() -> None:
    coder, rng = tokenizer(), random.Random(5)
    pool = Pool.of(WORLD, "tuning")
    turns = [make(task, pool, rng) for task in TASKS[:3]]
    ids, labels = encoded(coder, turns, [False, True, False])
    messages = []
    for item in turns:
        messages.append({"role": "user", "content": item.prompt})
        messages.append({"role": "assistant", "content": item.reply})
    text = coder.apply_chat_template(messages, tokenize=False)
    assert ids == coder.encode(text, add_special_tokens=False)
    learned = coder.decode([label for label in labels if label != IGNORED])
    assert learned.strip() == f"{turns[1].reply}<|eos|>"


def test_a_conversation_goes_on_with_the_models_own_replies() -> None:
    items = tuple(Item("brief", f"q{i}", f"a{i}") for i in range(3))
    heard: list[list[Asked]] = []

    def answer(asked: Sequence[Asked]) -> list[Reply]:
        heard.append(list(asked))
        return [Reply(f"r{len(heard)}", True) for _ in asked]

    replies = hold([items, items[:1]], answer)
    assert [[r.text for r in told] for told in replies] == [["r1", "r2", "r3"], ["r1"]]
    assert [len(asked) for asked in heard] == [2, 1, 1]
    assert [m["content"] for m in heard[2][0].messages] == ["q0", "r1", "q1", "r2", "q2"]


def test_only_by_hand_is_the_server_told_the_task() -> None:
    asked = Asked("brief", [{"role": "user", "content": ITEM.prompt}])
    for setting in SETTINGS:
        body = adapted_body(setting, asked)
        assert ("brief" in json.dumps({**body, "messages": []})) == (setting == BY_HAND)
    assert adapted_body(pack(2, 15.0), asked)["adapters"] == [
        {"name": "pack", "top_k": 2, "temperature": 15.0}
    ]


def test_the_table_counts_turns() -> None:
    conversations = [(ITEM,), (ITEM,), (ITEM, ITEM, ITEM)]
    good, bad = Reply("crow.", True), Reply("cat.", True)
    replies = [[good], [bad], [good, good, bad]]
    assert hits(conversations, replies) == [True, False, True, True, False]
    table = markdown(conversations, [(BY_HAND, replies)])
    assert "single (2) | composite-3 (3)" in table
    assert "| 50.0 % (9.5 % to 90.5 %) | 66.7 % (20.8 % to 93.9 %) | 58.3 % |" in table
    assert "| brief (2) | 50.0 % |" in table
    assert len(first(conversations, 1)) == 2


@pytest.mark.parametrize("name", [*TASKS, *(f"{PACK}/{task}" for task in TASKS)])
def test_every_adapter_ships_and_names_no_place_of_the_machine_that_made_it(name: str) -> None:
    files = {path.name for path in (ADAPTERS / name).iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base-large"
    assert config["target_modules"] == sorted(config["target_modules"])


def test_the_pack_ships_with_the_k_and_t_that_are_evaluated() -> None:
    config = json.loads((ADAPTERS / PACK / "meteora.json").read_text())
    assert tuple(config["tasks"]) == TASKS
    assert (config["top_k"], config["temperature"]) == (TOP_K, TEMPERATURE)
    assert (ADAPTERS / PACK / "gates.safetensors").exists()


def test_what_ships_answers() -> None:
    """The first held-out question of each task, by hand and by the pack, in one conversation."""
    singles = [items for items in read_conversations(path_of("validation")) if len(items) == 1]
    items = tuple(turn for (turn,) in singles[: len(TASKS)])
    adapted = Adapted(ROOT / "models", ADAPTERS, torch.float32)
    for setting in (BY_HAND, PACK_SETTING):
        replies = hold([items], lambda asked, way=setting: adapted.answer(way, asked))  # type: ignore[misc]
        assert sum(hits([items], replies)) >= len(TASKS) - 1
