"""Without Triton's interpreter nothing here can run; `tests.interpreted` starts it."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
