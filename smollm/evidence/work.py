"""What a claim is given: the model, a folder for what it makes, and servers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from load_tests.with_server import running_server

START_TIMEOUT_S = 900.0
"""The first start compiles 30 layers for every stream."""
DEFAULTS: dict[str, Any] = {
    "served_model_name": "smollm",
    "engine": {"max_model_len": 1024, "max_num_seqs": 16, "dtype": "float32"},
}


@dataclass(frozen=True)
class Work:
    """Where a claim works, and how long.

    `folder` keeps what is costly to make (adapters, value models): what is there is used again.
    `quick`: a few items only, to see that everything runs; its figures mean nothing.
    """

    model: Path
    folder: Path
    quick: bool = False
    seed: int = 0

    def few(self, count: int, quick: int = 8) -> int:
        """How many items to take."""
        return min(count, quick) if self.quick else count

    @contextmanager
    def server(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Serves the model until the block ends; yields the server's URL.

        Args:
            config: a configuration as in `server.yaml`; the model and `DEFAULTS` are filled in,
                key by key. Relative paths in it are relative to `folder`.

        Raises:
            NotReadyError: the server did not start; has the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        engine = {**DEFAULTS["engine"], **config.get("engine", {})}
        whole = {**DEFAULTS, "model": str(self.model.resolve()), **config, "engine": engine}
        path = self.folder / "server.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False), "utf-8")
        # Graphs of the same model are compiled once for all claims.
        os.environ.setdefault("VLLM_CACHE_ROOT", str((self.model.parent / "cache").resolve()))
        with running_server(path, timeout_s=START_TIMEOUT_S) as url:
            yield url
