"""`python -m load_tests.registry_served PAUSES serve …`: a server whose event loop is timed.

A task wakes every 2 ms; each time that it comes more than 5 ms late, a line goes to PAUSES:
Unix time, seconds late, and how many of them the loop's own thread was computing. PAUSES.start has
the times at which the server began to open its adapters and had them.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from server import assemble, main

TICK_S = 0.002
LATE_S = 0.005


async def tick(pauses: Path) -> None:
    """Ticks for ever."""
    with pauses.open("a", buffering=1) as file:
        while True:
            begun, busy = time.perf_counter(), time.thread_time()
            await asyncio.sleep(TICK_S)
            late = time.perf_counter() - begun - TICK_S
            if late > LATE_S:
                file.write(f"{time.time():.3f} {late:.4f} {time.thread_time() - busy:.4f}\n")


def run(pauses: Path, arguments: list[str]) -> int:
    """The server's exit status."""
    module: Any = assemble
    opened = module.opened

    @asynccontextmanager
    async def timed(*args: Any, **options: Any) -> AsyncIterator[Any]:
        ticking = asyncio.create_task(tick(pauses))
        begun = time.time()
        try:
            async with opened(*args, **options) as found:
                pauses.with_suffix(".start").write_text(f"{begun} {time.time()}")
                yield found
        finally:
            ticking.cancel()

    module.opened = timed
    return main.run(arguments)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
