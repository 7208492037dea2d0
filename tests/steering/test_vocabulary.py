"""Vocabularies: which ids mean the same token, and what a stream reads instead."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.errors import DoesNotFit
from steering.vocabulary import Differing, Overlap, Vocabulary, load_vocabulary, overlap

WORDS = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "a", 4: "b", 5: "c"}
SPECIAL = frozenset({0, 1, 2})
BASE = Vocabulary(WORDS, 6, SPECIAL, eos=2, unk=0)


def test_equal_vocabularies_share_every_id() -> None:
    same = overlap(BASE, BASE, name="chat")
    assert same.shared.all()
    assert same.read_as is None
    assert len(same.padded) == 0
    assert same.differing == ()


def test_a_special_token_that_differs_gets_no_delta_and_is_read_as_end_of_text() -> None:
    base = Vocabulary({**WORDS, 6: "<|eot|>"}, 7, SPECIAL | {6}, eos=6)
    stream = Vocabulary({**WORDS, 6: "<|reserved|>"}, 7, SPECIAL | {6}, eos=2)
    lie = overlap(base, stream, name="plain")
    assert lie.shared.tolist() == [True] * 6 + [False]
    assert lie.read_as is not None
    assert lie.read_as.tolist() == [0, 1, 2, 3, 4, 5, 2]
    assert lie.differing == (Differing(6, "<|eot|>", "<|reserved|>"),)


def test_a_regular_token_that_means_another_does_not_fit() -> None:
    stream = Vocabulary({**WORDS, 3: "x", 4: "y"}, 6, SPECIAL)
    with pytest.raises(DoesNotFit, match=r"2 of the base's 6 .* 3 \('a' / 'x'\), 4") as caught:
        overlap(BASE, stream, name="plain")
    assert caught.value.field == "streams.plain"


def test_the_error_names_three_ids_at_most() -> None:
    tokens = {i: f"t{i}" for i in range(10)}
    other = {i: f"u{i}" for i in range(10)}
    with pytest.raises(DoesNotFit, match=r"10 of .* 0 \(.*\), 1 \(.*\), 2 \(.*\) and others") as e:
        overlap(Vocabulary(tokens, 10), Vocabulary(other, 10), name="x")
    assert "u3" not in str(e.value)


def test_tokens_behind_the_streams_table_are_not_shared() -> None:
    # The tokenizer knows the token, the checkpoint has no row for it.
    short = Vocabulary(WORDS, 5, SPECIAL, eos=2)
    lie = overlap(BASE, short, name="chat")
    assert lie.shared.tolist() == [True] * 5 + [False]
    assert lie.read_as is not None
    assert lie.read_as[5] == 2
    assert lie.differing == (Differing(5, "c", None),)


def test_padded_rows_are_listed_and_read_as_themselves_where_the_stream_has_them() -> None:
    base = Vocabulary(WORDS, 10, SPECIAL)
    lie = overlap(base, Vocabulary(WORDS, 8, SPECIAL, eos=2), name="chat")
    assert lie.padded.tolist() == [6, 7, 8, 9]
    assert not lie.shared[6:].any()
    assert lie.read_as is not None
    assert lie.read_as.tolist() == [*range(8), 2, 2]
    assert overlap(base, Vocabulary(WORDS, 10, SPECIAL), name="chat").read_as is None


@pytest.mark.parametrize(
    ("eos", "unk", "expected"), [(2, 1, 2), (None, 1, 1), (None, None, 0), (99, 1, 1)]
)
def test_the_stand_in_is_eos_else_unk_else_zero(
    eos: int | None, unk: int | None, expected: int
) -> None:
    assert Vocabulary(WORDS, 5, eos=eos, unk=unk).stand_in == expected


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Vocabulary, Vocabulary]:
    """A base and a stream that fit: regular tokens agree, special ones may not."""
    regular = {i: f"t{i}" for i in range(draw(st.integers(0, 20)))}
    n = len(regular)
    names = st.sampled_from(["<a>", "<b>", "<c>"])
    specials = [draw(st.dictionaries(st.integers(n, n + 8), names, max_size=6)) for _ in "bs"]
    tables = [draw(st.integers(1, n + 12)) for _ in "bs"]
    ends = [draw(st.none() | st.integers(0, n + 12)) for _ in "bs"]
    base, stream = (
        Vocabulary({**regular, **special}, table, frozenset(special), eos)
        for special, table, eos in zip(specials, tables, ends, strict=True)
    )
    return base, stream


@given(pairs())
def test_whatever_the_stream_reads_lies_in_its_table(
    pair: tuple[Vocabulary, Vocabulary],
) -> None:
    base, stream = pair
    lie = overlap(base, stream, name="chat")
    ids = np.arange(base.table)
    read = ids if lie.read_as is None else lie.read_as
    assert (read < stream.table).all()
    assert (read[lie.shared] == ids[lie.shared]).all()
    for i in np.flatnonzero(lie.shared):
        assert base.tokens[i] == stream.tokens[i]
    named = {d.id for d in lie.differing}
    padded = set(lie.padded.tolist())
    assert named | padded == set(np.flatnonzero(~lie.shared).tolist())
    assert not named & padded


@given(pairs())
def test_an_overlap_survives_the_wire(pair: tuple[Vocabulary, Vocabulary]) -> None:
    lie = overlap(*pair, name="chat")
    wire = lie.to_wire()
    again = Overlap.from_wire(json.loads(json.dumps(wire)))
    assert again.to_wire() == wire
    assert (again.shared == lie.shared).all()
    assert again.padded.dtype == np.int32
    assert (lie.read_as is None) == (again.read_as is None)
    if lie.read_as is not None:
        assert again.read_as is not None
        assert (again.read_as == lie.read_as).all()


def _save_model(folder: Path, config: dict[str, object]) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return str(folder)


@pytest.mark.parametrize("config", [{"vocab_size": 8}, {"text_config": {"vocab_size": 8}}])
def test_a_model_folder_is_read(tmp_path: Path, config: dict[str, object]) -> None:
    read = load_vocabulary(_save_model(tmp_path, config))
    assert read.tokens == {0: "<unk>", 1: "a", 2: "b", 3: "</s>"}
    assert (read.table, read.eos, read.unk) == (8, 3, 0)
    assert read.special == {0, 3}


def test_a_model_folder_without_a_vocabulary_size_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="vocab_size"):
        load_vocabulary(_save_model(tmp_path, {}))
