"""Without the emulation nothing here can run; `tests/test_emulated.py` starts the process."""

from __future__ import annotations

import sys

collect_ignore_glob = [] if "tests.emulated.plugin" in sys.modules else ["test_*.py"]
