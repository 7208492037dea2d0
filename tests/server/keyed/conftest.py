"""A server with keys for everything, for the tests of this folder; `test_the_end.py` drains it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.make import make_lora, make_native
from tests.server.live import Server, document

FULL, LIMITED, ADMIN = "key-full-0123", "key-limited-4567", "key-admin-89ab"
TEAM = ("key-team-cdef", "key-team-0246")
"""Two keys of one group."""

LETTERS, METRICS = "clé-voilà", "key-metrics-8ace"


@pytest.fixture(scope="package")
def folders(models: Path) -> dict[str, Path]:
    """Two adapters of the base and a pack."""
    root, base = models / "keyed", models / "base"
    found = {name: make_lora(root / name, base, seed=50 + i) for i, name in enumerate("ab")}
    found["pack"] = make_native(root / "pack", base, tasks=2, seed=60)
    return found


@pytest.fixture(scope="package")
def keyed(models: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
          ) -> Iterator[Server]:  # fmt: skip
    """Adapters `a`, `pack` and the team's `secret` are loaded; a limited key: `own`, `a`."""
    team = [{"key": key, "group": "team"} for key in TEAM]
    limited = {"key": LIMITED, "profiles": ["own"], "adapters": ["a"]}
    config = document(
        adapters={"roots": ["./keyed"], "max_loaded": 4, "max_rank": 24, "vectors": True,
                  "preload": [*({"name": n, "source": f"./keyed/{n}"} for n in ("a", "pack")),
                              {"name": "secret", "source": "./keyed/b", "visible_to": ["team"]}]},
        registry={"directory": str(tmp_path_factory.mktemp("state"))},
        auth={"api_keys": [FULL, limited, *team, LETTERS],
              "admin_key": ADMIN, "metrics_key": METRICS},
    )  # fmt: skip
    found = Server(models, config)
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()
