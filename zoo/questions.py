"""The held-out questions as files: one JSON object per line."""

import json
import random
from dataclasses import asdict
from pathlib import Path

from zoo.world import Question, Split, World

FOLDER = Path(__file__).parent / "data"
COUNTS: dict[Split, int] = {"validation": 300, "test": 600}
"""How many questions of each held-out split are kept."""


def read_questions(path: Path) -> list[Question]:
    """The questions of one file."""
    return [Question(**json.loads(line)) for line in path.read_text().splitlines()]


def write_held_out(world: World) -> None:
    """Write the validation and test files; no entity in them occurs in any chat tuning."""
    FOLDER.mkdir(exist_ok=True)
    for split, count in COUNTS.items():
        rng = random.Random(21)
        questions = rng.sample(world.questions(split, rng), count)
        lines = [json.dumps(asdict(question)) for question in questions]
        (FOLDER / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
