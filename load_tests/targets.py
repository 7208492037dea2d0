"""The servers that `load_tests.load` asks, each started with the same models and threads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from load_tests.load_models import COMPANIONS, Shapes, configuration
from load_tests.with_server import free_port, running_command, running_server

MIXED = {"base": 1.0, COMPANIONS[0]: 1.0, COMPANIONS[1]: -1.0}
"""Proxy-tuning with strength 1, by model."""

ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 4096,
    "kv_cache_memory_bytes": 2 << 30,
    # Prompts share no prefixes; without this, a server would know them from the scenario before.
    "enable_prefix_caching": False,
}
"""vLLM's arguments, the same for its own servers and for ours."""

VLLM_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "GOMP_SPINCOUNT": "20000",  # as our server sets it
}


class Targets:
    """Starts servers.

    Args:
        folder: with the models (`load_models.write_models`).
        shapes: theirs.
        engine: arguments over `ENGINE`.
    """

    def __init__(self, folder: Path, shapes: Shapes, engine: dict[str, object]) -> None:
        self._folder, self._shapes = folder, shapes
        self._engine: dict[str, object] = {**ENGINE, **engine}

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[str]:
        """One of scenario.Target, ready; yields its URL.

        Raises:
            NotReadyError: it ended, or was not ready in time.
        """
        with getattr(self, f"_{name}")() as url:
            yield url

    def _plain(self) -> contextlib.AbstractContextManager[str]:
        return self._vllm("base", self._engine)

    def _vllm(
        self, model: str, engine: dict[str, object]
    ) -> contextlib.AbstractContextManager[str]:
        port = free_port()
        module = "vllm.entrypoints.launchers.api_server.entry"
        command = [sys.executable, "-m", module, "--model", str(self._folder / model)]
        command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--disable-uvicorn-access-log"]
        for key, value in engine.items():
            flag = key.replace("_", "-")
            command += (
                [f"--{flag}", str(value)]
                if not isinstance(value, bool)
                else [f"--{flag}" if value else f"--no-{flag}"]
            )
        return running_command(command, f"http://127.0.0.1:{port}", VLLM_ENVIRONMENT)

    @contextlib.contextmanager
    def _coxswain(self) -> Iterator[str]:
        file = self._folder / "server.yaml"
        file.write_text(yaml.safe_dump(configuration(self._shapes, self._engine)))
        with running_server(file) as url:
            yield url

    def _transformers(self) -> contextlib.AbstractContextManager[str]:
        port = free_port()
        command = [sys.executable, "-m", "load_tests.sequential_server", str(port)]
        for name, weight in MIXED.items():
            command += [str(self._folder / name), str(weight)]
        return running_command(command, f"http://127.0.0.1:{port}", {})

    @contextlib.contextmanager
    def _client_mix(self) -> Iterator[str]:
        # Small blocks: with each token, a server computes the last, unfinished block again.
        # Not compiled: its requests cost more than its steps, and three compilations take minutes.
        small = {"block_size": 32, "enable_prefix_caching": True, "enforce_eager": True}
        engine = {**self._engine, **small, "kv_cache_memory_bytes": 1 << 30}
        with contextlib.ExitStack() as stack:
            urls = {m: stack.enter_context(self._vllm(m, engine)) for m in MIXED}
            port = free_port()
            command = [sys.executable, "-m", "load_tests.client_mix", str(port)]
            command += [str(self._folder / "base")]
            for name, weight in MIXED.items():
                command += [urls[name], str(weight)]
            url = f"http://127.0.0.1:{port}"
            yield stack.enter_context(running_command(command, url, {}))
