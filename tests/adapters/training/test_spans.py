"""Spans of characters, and the tokens that they make critical."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from adapters.training.critic.spans import check_spans, critical, decode, names, token_spans
from adapters.training.errors import BadRecipe
from tests.models import EOS, SPECIAL, VOCAB_SIZE, make_tokenizer

BYTES = {shown: byte for byte, shown in bytes_to_unicode().items()}

TEXTS = [
    "The boats start side by side.",
    "Zoë paid 12 € in Kraków — 東京 too, 🚣🏽‍♀️!",
    "e\u0301 is two characters; \U0001f6a3 is four bytes",
]


def by_bytes(ids: Sequence[int]) -> list[tuple[int, int]]:
    """The slow way: which characters' bytes each token holds, by the bytes of its name."""
    tokens = [bytes(BYTES[c] for c in make_tokenizer().convert_ids_to_tokens(i)) for i in ids]
    text, owners = b"".join(tokens).decode(), []
    for i, character in enumerate(text):
        owners += [i] * len(character.encode())
    found, at = [], 0
    for token in tokens:
        found.append((owners[at], owners[at + len(token) - 1] + 1))
        at += len(token)
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_have_the_characters_whose_bytes_they_hold(text: str) -> None:
    ids = make_tokenizer()(text)["input_ids"]
    assert decode(make_tokenizer(), ids) == text
    assert token_spans(make_tokenizer(), ids) == by_bytes(ids)


def test_so_do_bytes_alone_and_random_pieces() -> None:
    """Tokens in an order in which no tokenizer would have cut the text."""
    rng, pieces = random.Random(1), make_tokenizer()
    single = {BYTES[t]: i for t, i in pieces.get_vocab().items() if len(t) == 1}
    for _ in range(200):
        text = "".join(rng.choices([*TEXTS, "东", "é", " ", "\n", "x"], k=6))
        ids: list[int] = []
        for part in text.split(" "):
            cut = pieces(part + " ")["input_ids"]
            ids += rng.choice([cut, [single[byte] for byte in (part + " ").encode()]])
        assert token_spans(pieces, ids) == by_bytes(ids)


def test_ids_that_say_nothing_are_never_critical_and_do_not_shift_the_others() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("The old mill")["input_ids"]
    with_end = [*ids[:2], EOS, *ids[2:]]
    spans = token_spans(tokenizer, with_end)
    assert spans.pop(2) == (spans[1][1], spans[1][1])
    assert spans == token_spans(tokenizer, ids)
    assert critical("The old mill", [(4, 4)], [(0, 12)]) == [False]


def test_a_reply_that_ends_within_a_character() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("12 €")["input_ids"][:-1]
    assert decode(tokenizer, ids) == "12 \ufffd"
    assert token_spans(tokenizer, ids)[:2] == [(0, 1), (1, 2)]
    assert token_spans(tokenizer, ids)[3] == (3, 4)


def test_bytes_that_are_no_character_shift_nothing() -> None:
    tokenizer = make_tokenizer()
    euro = tokenizer("€")["input_ids"]
    boats = tokenizer("boats")["input_ids"]
    for broken in (euro[:1], euro[:2], [*euro[:1], *euro[:1]], tokenizer("\ufffd")["input_ids"]):
        ids = [*broken, *boats]
        text, spans = decode(tokenizer, ids), token_spans(tokenizer, ids)
        assert text.endswith("boats") and spans[0] == (0, 1)
        shift = len(text) - len("boats")
        after = [(start + shift, end + shift) for start, end in token_spans(tokenizer, boats)]
        assert spans[-len(boats) :] == after


def test_a_tokenizer_that_writes_the_first_token_of_a_text_differently() -> None:
    """As SentencePiece's do: the space before the first word is not written."""
    vocabulary = {f"▁{word}": i for i, word in enumerate(["New", "York", "is", "big"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="▁is"))
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert decode(tokenizer, [0, 1, 2, 3]) == "New York is big"
    assert token_spans(tokenizer, [0, 1, 2, 3]) == [(0, 3), (3, 8), (8, 11), (11, 15)]
    assert decode(tokenizer, [0, 1], [2, 3]) == " New York"
    assert token_spans(tokenizer, [0, 1], [2, 3]) == [(0, 4), (4, 9)]


def test_white_space_at_the_start_of_a_token_does_not_count() -> None:
    text = "in Rome  now"
    tokens = [(0, 2), (2, 7), (7, 8), (8, 12)]  # "in", " Rome", " ", " now"
    assert critical(text, tokens, [(3, 4)]) == [False, True, False, False]
    assert critical(text, tokens, [(0, 3)]) == [True, False, False, False]
    assert critical(text, tokens, [(3, 9)]) == [False, True, True, False]
    assert critical(text, tokens, []) == [False] * 4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Marie Curie was born in Warsaw in 1867.", ["Curie", "Warsaw", "1867"]),
        ("She is Marie Curie. Her rank is 3rd of 1,846.5!", ["Marie Curie", "3rd", "1,846.5"]),
        ("It flew with Apollo 11 at 12:30, I think; I'm sure.", ["Apollo 11", "12:30"]),
        ('12 men. "The end?" The Élan, Jean-Luc’s', ["12", "Élan", "Jean-Luc’s"]),
        ("no names here", []),
        ("Names\nBegin lines; Zoë\tDoes not", ["Zoë", "Does"]),
        ("", []),
    ],
)
def test_the_built_in_rule(text: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in names(text)] == found


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("x", r"spans: not spans \(got 'x'\)"),
        ([[0, 1], [1]], r"spans\[1\]: not a span \(got \[1\]\)"),
        ([[0, True]], r"spans\[0\]: not a span"),
        ([[0, 1.5]], r"spans\[0\]: not a span"),
        ([[0, float("nan")]], r"spans\[0\]: not a span"),
        ([[2, 2]], r"spans\[0\]: not in the reply .*0 ≤ start < end ≤ 4"),
        ([[0, 5]], r"≤ 4"),
        ([[-1, 2]], r"≤ 4"),
    ],
)
def test_spans_that_are_none_are_refused(given: Any, told: str) -> None:
    with pytest.raises(BadRecipe, match=told):
        check_spans(given, "four", "spans")
    assert check_spans([[0, 4], (1.0, 2)], "four", "spans") == [(0, 4), (1, 2)]


def test_the_tests_tokenizer_has_every_byte() -> None:
    """Else the tests above would compare unknown tokens."""
    assert {ByteLevel.alphabet()[i] for i in range(256)} <= make_tokenizer().get_vocab().keys()
    assert len(make_tokenizer()) == VOCAB_SIZE


def test_ids_in_any_order_have_characters() -> None:
    """What a model writes may be no text at all."""
    rng = random.Random(2)
    for _ in range(300):
        # The single bytes are the first ids behind the special tokens.
        ids = [rng.randrange(rng.choice([len(SPECIAL) + 256, VOCAB_SIZE])) for _ in range(30)]
        spans = token_spans(make_tokenizer(), ids)
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)
        assert max(end for _, end in spans) == len(decode(make_tokenizer(), ids))
