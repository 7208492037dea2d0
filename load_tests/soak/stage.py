"""The soak's server: the zoo's configuration, changed so that much goes on in little memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from adapters.sources.store import digest_of
from load_tests.soak.kinds import BAD_CONTENT, CONTENTS, FIXED
from tests.adapters.make import spoiled

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "zoo"
SLOTS = 5
"""For sets of adapters: fewer than are used, so that they make room for each other."""

ENGINE: dict[str, Any] = {
    # Answers are compared with models in float32.
    "dtype": "float32",
    "max_model_len": 384,
    "max_num_seqs": 16,
    # Small, and small blocks: soon all of it is in use, which makes the memory flat; prompts fill
    # blocks, and requests push each other out.
    "kv_cache_memory_bytes": 128 << 20,
    "block_size": 32,
    "enforce_eager": True,
}


def configuration(folder: Path) -> dict[str, Any]:
    """The server's, its paths absolute.

    Args:
        folder: gets a copy of the adapters and the server's state.
    """
    found: dict[str, Any] = yaml.safe_load((ZOO / "server.yaml").read_text())
    found["model"] = str(ZOO / found["model"])
    for stream in found["streams"].values():
        if True in stream:  # what PyYAML makes of the key `on`
            stream["on"] = stream.pop(True)
        for key in {"model", "path"} & stream.keys():
            stream[key] = str(ZOO / stream[key])
    found["chat"]["template"] = str(ZOO / found["chat"]["template"])
    adapters = found["adapters"]
    wanted = [one for one in adapters["preload"] if one["name"] in (*FIXED, "gossip")]
    found["adapters"] = {
        "roots": [str(folder / "adapters")],
        "preload": [{**one, "source": str(folder / one["source"])} for one in wanted],
        "max_loaded": SLOTS,
        # The pack beside one more adapter.
        "max_rank": adapters["max_rank"] + 8,
    }
    found["steering"] = {"max_top_k": 20}
    found["registry"] = {"directory": str(folder / "state")}
    found["server"] = {"max_body_bytes": 200_000}
    found["engine"] = ENGINE
    return found


def copy_adapters(folder: Path) -> dict[str, str]:
    """Copies the zoo's adapters and makes a spoiled one; sources by name."""
    root = folder / "adapters"
    shutil.copytree(ZOO / "adapters", root)
    spoiled(root / CONTENTS[0], root / BAD_CONTENT)
    return {name: str(root / name) for name in (*FIXED, *CONTENTS, BAD_CONTENT)}


def digests(sources: dict[str, str]) -> set[str]:
    """Digests of all contents that the store may hold."""
    return {digest_of(Path(source)) for source in sources.values()}
