"""One engine step: its plan on the host, and the passes of its streams."""
