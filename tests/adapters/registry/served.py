"""A server's registry side as a process of its own, to be killed.

`python -m tests.adapters.registry.served ROOT PAUSE_S REMOTE [NAME=SOURCE …]`: its registry in
ROOT/registry, store in ROOT/store, sources under ROOT/in or REMOTE; loading takes PAUSE_S. Asks
for the named adapters, then prints a JSON line whenever something changed:
{name: [state, reason, attempts, what it answers]}.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from adapters.registry.connection import open_store
from tests.adapters.registry.kit import Replica


async def main(root: Path, pause_s: float, remote: str, wanted: dict[str, str]) -> None:
    """Runs until it is killed."""
    async with open_store(root / "registry") as records:
        replica = Replica(records, root / "in", root / "store", remotes=(remote,), pause_s=pause_s)
        async with replica.running():
            for name, source in wanted.items():
                await replica.manager.submit(name, source, replace=True)
            said = ""
            while True:
                states = {
                    name: [record.state, record.reason, record.attempts, replica.answers(name)]
                    for name, record in sorted(replica.manager.records.items())
                }
                if states and (line := json.dumps(states)) != said:
                    print(line, flush=True)
                    said = line
                await asyncio.sleep(0.01)


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[4:])
    asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], dict(pairs)))
