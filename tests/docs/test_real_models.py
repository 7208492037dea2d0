"""The memory table of docs/start/real-models.md.

Parameters are counted again, and bytes by the server's code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from server.checks import capacity
from server.checks.checkpoints import Checkpoint
from server.checks.diagnosis import Diagnosis, StreamFacts
from server.settings.config import Config

TEXT = (Path(__file__).parents[2] / "docs" / "start" / "real-models.md").read_text("utf-8")
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One line of the first table."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    rows: int
    tied: bool
    parameters: int
    weights_gib: float
    kv_kib: float

    def checkpoint(self) -> Checkpoint:
        """As the server would read it from the model's folder."""
        return Checkpoint(
            Path(), "LlamaForCausalLM", self.parameters, 2 * self.parameters, False, "bfloat16",
            self.layers, self.heads, self.kv_heads, self.head_size, self.hidden, 131072, self.rows,
            False, False,
        )  # fmt: skip


def table(columns: int) -> list[list[str]]:
    """The body of the table with so many columns."""
    lines = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in cells] for cells in lines if len(cells) == columns]
    return found[1:]


def row_of(cells: list[str]) -> Row:
    """One line, read."""
    layers, hidden, inner, heads, kv_heads, head_size = map(int, cells[1:7])
    rows, tied = int(cells[7].split()[0]), "tied" in cells[7]
    return Row(
        cells[0], layers, hidden, inner, heads, kv_heads, head_size, rows, tied, int(cells[8]),
        float(cells[9]), float(cells[10]),
    )  # fmt: skip


ROWS = {cells[0]: row_of(cells) for cells in table(11)}


def test_the_tables_are_found() -> None:
    assert len(ROWS) == 9 and len(table(5)) == 6


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda r: r.name)
def test_parameters_follow_from_the_shapes(row: Row) -> None:
    kind = LlamaConfig if row.name.startswith("Llama") else Qwen2Config
    config = kind(
        num_hidden_layers=row.layers, hidden_size=row.hidden, intermediate_size=row.inner,
        num_attention_heads=row.heads, num_key_value_heads=row.kv_heads, head_dim=row.head_size,
        vocab_size=row.rows, tie_word_embeddings=row.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == row.parameters


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda r: r.name)
def test_bytes_are_the_servers(row: Row) -> None:
    point = row.checkpoint()
    assert point.weight_bytes("bfloat16") / GIB == pytest.approx(row.weights_gib, abs=0.006)
    assert point.kv_bytes("bfloat16") / 1024 == row.kv_kib


@pytest.mark.parametrize("cells", table(5), ids=lambda c: f"{c[0]} and {c[1]}")
def test_sets_are_what_the_doctor_would_say(
    cells: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of one byte: it names what it would have needed."""
    base, (count, small) = ROWS[cells[0]], cells[1].split(" × ")
    rows = {"base": base} | {f"s{i}": ROWS[small] for i in range(int(count))}
    facts = {
        name: StreamFacts(name, "", row.checkpoint(), row.rows, row.checkpoint().kv_bytes("auto"))
        for name, row in rows.items()
    }
    streams = {name: {"model": "x"} for name in rows if name != "base"}
    config = Config.model_validate(
        {"model": "x", "streams": streams,
         "engine": {"max_model_len": 8192, "kv_cache_memory_bytes": 1, "dtype": "bfloat16"}}
    )  # fmt: skip
    monkeypatch.setattr(capacity, "_machine", lambda _: (1, "a byte"))
    said = " ".join(capacity.memory(config, Diagnosis(streams=facts)))
    weights = re.search(r"([\d.]+) GiB of weights", said)
    one = re.search(r"takes ([\d.]+) ([MG])iB", said)
    assert weights and one, said
    assert float(weights[1]) == pytest.approx(float(cells[2]), rel=1e-3)
    assert sum(fact.kv_bytes for fact in facts.values()) / 1024 == float(cells[3])
    # Four digits in the message, two decimals on the page.
    gib = float(one[1]) / (1024 if one[2] == "M" else 1)
    assert gib == pytest.approx(float(cells[4]), abs=0.0051)
