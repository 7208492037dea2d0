"""The report: medians, ratios within rounds, limits, plots."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from load_tests.bench_client import NAMES
from load_tests.growth import AXES, table
from load_tests.load_report import checked, machine, page, plots
from load_tests.scenario import load_scenarios


def run(throughput: float, share: float = 1.0) -> dict[str, float]:
    found = dict.fromkeys([*NAMES, "concurrency", "peak_concurrency"], 2.0)
    return found | {"output_throughput": throughput, "good_share": share}


def figures() -> dict[str, Any]:
    """Two scenarios, one level, three rounds; the machine slows down in the second."""
    scenarios = load_scenarios()
    limits = [
        {"figure": "output_throughput", "level": "heavy", "over": "transformers", "at_least": 2.0},
        {"figure": "good_share", "level": "heavy", "at_least": 0.95},
        {"figure": "good_share", "level": "light", "at_least": 0.95},
    ]
    steered = scenarios["steered"].model_validate(
        scenarios["steered"].model_dump() | {"limits": limits}
    )
    chosen = {"steered": steered, "transformers": scenarios["transformers"]}
    speeds = ((300, 100), (100, 40), (220, 110))
    return {
        "machine": machine(),
        "models": {"parameters": {"base": 220e6}, "base": {"heads": 2}, "companion": {"heads": 1}}
        | {"vocabulary": 32000, "adapters": 8},
        "engine": {"dtype": "bfloat16"},
        "traffic": {"prompt_tokens": 64, "output_tokens": 48, "spread": 0.75}
        | {"max_concurrency": 64},
        "levels": {"heavy": {"rate": 16.0, "requests": 96}},
        "scenarios": {name: one.model_dump() for name, one in chosen.items()},
        "rounds": [
            {"steered": {"heavy": run(a, 0.9)}, "transformers": {"heavy": run(b)}}
            for a, b in speeds
        ],
        "growth": {
            name: {
                "1": {"steered": [10.0, 12.0, 11.0], "ideal": [10.0, 10.0, 10.0]},
                "4": {"steered": [20.0, 30.0, 40.0], "ideal": [20.0, 20.0, 20.0]},
            }
            for name in AXES
        },
    }


def test_ratios_are_taken_within_a_round() -> None:
    """Of the medians the ratio would be 2.2; of the rounds it is 2.5."""
    over, *_ = checked(figures())
    assert over.value == "2.50 (2.00–3.00)" and over.met


def test_a_limit_that_does_not_hold_is_said() -> None:
    found = checked(figures())
    assert [one.met for one in found] == [True, False]  # `light` was not measured
    assert "| 0.90 (0.90–0.90) | **no** |" in page(figures(), "load-report")


def test_the_page_has_machine_shapes_medians_and_plots(tmp_path: Path) -> None:
    found = figures()
    text = page(found, "load-report")
    assert found["machine"]["processor"] in text and "torch 2" in text and "base 220 M" in text
    assert "prompts of 16 to 112 tokens and replies of 12 to 84 tokens" in text
    row = next(line for line in text.splitlines() if line.startswith("| Coxswain, steered | 220 |"))
    assert row.endswith("| 2 / 2 | 2.0 / 2.0 | 2.00 (90%) | 2.0 / 2 |")
    plots(found, tmp_path / "load-report")
    linked = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(linked) == 6
    for name in linked:
        assert ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")


def test_the_same_figures_give_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots(figures(), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_table_of_growth() -> None:
    lines = table("streams", figures()["growth"]["streams"]).splitlines()
    assert lines[2] == "| 1 | 11.0 | 10.0 | 1.10 (1.00–1.20) |"
    assert lines[3] == "| 4 | 30.0 | 20.0 | 1.50 (1.00–2.00) |"


def test_a_round_may_lack_a_level_and_the_note_says_why() -> None:
    found = figures()
    found["levels"]["light"] = {"rate": 0.5, "requests": 8}
    found["rounds"][2]["steered"]["light"] = run(20)
    text = page(found | {"note": "Two rounds lack the light level."}, "load-report")
    assert text.index("**Note.** Two rounds lack") < text.index("## Scenarios")
    light = text[text.index("## Light") : text.index("![Throughput]")]
    assert "| Coxswain, steered | 20 |" in light and "in sequence" not in light
    assert "**Note.**" not in page(found, "load-report")
