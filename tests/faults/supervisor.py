"""What keeps a server running on a machine: systemd, Docker, Kubernetes; here a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tests.server.live import Server
from tests.server.reading import last_line


class Supervisor:
    """Starts a server, and again whenever it ends with another status than 0.

    Args:
        start: starts it.
    """

    def __init__(self, start: Callable[[], Server]) -> None:
        self._start = start
        self.server = start()
        self.ends: list[tuple[int, str]] = []
        """Exit status and last line of each that had to be started again."""
        self._over = False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            status = self.server.process.wait()
            if self._over or status == 0:
                return
            self.ends.append((status, last_line(self.server)))
            self.server = self._start()

    def stop(self) -> None:
        """Ends the server and does not start it again."""
        self._over = True
        self.server.stop()
        self._thread.join()
