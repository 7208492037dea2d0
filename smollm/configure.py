"""Writes the configuration that `make smollm` serves: server.yaml, and what `make evidence` made.

What the claims have trained lies in folders of build/smollm/evidence. Of what is not there the
configuration says nothing, so it works without any.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from smollm.convert import MODEL

CONFIG = Path(__file__).with_name("server.yaml")
MADE = MODEL.parent / "evidence"
OUT = MODEL.parent / "server.yaml"

DESK = {
    "method": "proxy_tuning",
    "expert": "tuned",
    "anti_expert": "companion",
    "strength": 1.0,
    "description": "Answers as a help desk does: what a small companion was tuned to.",
}
CHEERFUL = {
    "method": "value_augmented",
    "values": [{"stream": "sunny-value", "strength": 2.0}],
    "eos_value": "model",
    "description": "Drawn towards sunny words by a value model.",
}


def configuration(made: Path = MADE) -> dict[str, Any]:
    """The settings, with absolute paths.

    Args:
        made: the folder with a folder for each claim.
    """
    found: dict[str, Any] = yaml.safe_load(CONFIG.read_text("utf-8"))
    found["model"] = str((CONFIG.parent / found["model"]).resolve())
    made = made.resolve()
    small, value = made / "small", made / "reward" / "value"
    if all((small / name / "config.json").is_file() for name in ("companion", "tuned")):
        for name in ("companion", "tuned"):
            found["streams"][name] = {"model": str(small / name)}
        found["profiles"]["desk"] = DESK
    if (value / "v_head.safetensors").is_file():
        found["streams"]["sunny-value"] = {"model": str(value), "head": "value"}
        found["profiles"]["cheerful"] = CHEERFUL
    vectors = [made / "reward" / "sunny"]
    folders = [*loras(made / "adapters"), *loras(small), *(v for v in vectors if v.is_dir())]
    if folders:
        preload = [{"name": folder.name, "source": str(folder)} for folder in folders]
        found["adapters"] |= {"roots": [str(made)], "preload": preload}
        found["adapters"]["vectors"] = any(vector in folders for vector in vectors)
    return found


def loras(folder: Path) -> list[Path]:
    """The folders of adapters and packs in a folder."""
    marks = ("adapter_config.json", "meteora.json")
    return sorted({path.parent for mark in marks for path in folder.glob(f"*/{mark}")})


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m smollm.configure", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the file that is written")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(yaml.safe_dump(configuration(), sort_keys=False), "utf-8")
    print(f"configuration: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
