"""A real server process for tests: tiny random models, the real command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import yaml

from tests.models import make_model

START_S = 240.0
"""A start takes about 15 s on two free cores, and much longer when others use them."""

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


CHAT_END = 6
"""The token, `<|end|>`, that ends the texts of `chat`, as tuned models have one of their own."""


def make_models(root: Path) -> None:
    """A base without chat template, and two companions."""
    make_model(root / "base", "llama", seed=1)
    make_model(root / "chat", "qwen2", seed=2)
    ends = root / "chat" / "generation_config.json"
    said = json.loads(ends.read_text()) if ends.is_file() else {}
    ends.write_text(json.dumps({**said, "eos_token_id": [2, CHAT_END]}))
    make_model(root / "plain", "qwen2", seed=3)
    for file in (root / "base").glob("chat_template*"):
        file.unlink()
    file = root / "base" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings))


def document(**changes: Any) -> dict[str, Any]:
    """A configuration for the models above."""
    return {
        "model": "./base",
        "served_model_name": "big",
        "streams": {
            "chat": {"model": "./chat"},
            "plain": {"model": "./plain"},
            "twin": {"same_as": "base"},
        },
        "profiles": {
            "big-chat": {
                "method": "proxy_tuning",
                "expert": "chat",
                "anti_expert": "plain",
                "strength": 1.0,
                "chat_template": TEMPLATE,
                "limits": {"strength": [0, 2]},
            },
            "own": {
                "method": "proxy_tuning",
                "expert": "chat",
                "anti_expert": "plain",
                "prompts": {"chat": {"chat_template": "<|user|>" + TEMPLATE}},
                "chat_template": TEMPLATE,
            },
        },
        "chat": {"tool_call_parser": "hermes"},
        "server": {"port": 0, "max_body_bytes": 100_000, "counters_every_s": 0.2},
        "engine": {
            "max_model_len": 256,
            "dtype": "float32",
            "kv_cache_memory_bytes": 256 * 1024 * 1024,
            "enforce_eager": True,
            "max_num_seqs": 16,
            # A random model would fill its room with the white space that JSON allows.
            "structured_outputs_config": {"disable_any_whitespace": True},
        },
        **changes,
    }


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class Server:
    """One `coxswain serve` process.

    Args:
        folder: of the models; the configuration and the log go there too.
        config: the configuration.
        flags: further command-line arguments.
        environ: further environment variables.
        prefix: a command that runs the server as its arguments, in its own place.
        model: served in place of the configuration.
    """

    folder: Path
    config: dict[str, Any]
    flags: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    model: str | None = None
    port: int = field(default_factory=free_port)
    early: list[tuple[str, int, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """(path, status, body, headers) of answers before it was ready."""

    def __post_init__(self) -> None:
        self.file = self.folder / f"config-{self.port}.yaml"
        self.file.write_text(yaml.safe_dump(self.config))
        self.log = self.folder / f"log-{self.port}.txt"
        command = [
            *self.prefix,
            sys.executable,
            "-m",
            "server.main",
            "serve",
            self.model or str(self.file),
        ]
        command += ["--port", str(self.port), *self.flags]
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "COXSWAIN_"))}
        environ["PYTHONPATH"] = str(Path(__file__).parents[2])
        # Models this small gain nothing from a second thread, and threads that wait for each
        # other crawl when something else uses the cores.
        environ["OMP_NUM_THREADS"] = "1"
        environ |= self.environ
        # A server that is started again goes on in its file.
        with self.log.open("a") as log:
            # A group of its own, so that a test can play the terminal that signals all of it.
            self.process = subprocess.Popen(
                command, stderr=log, stdout=log, env=environ, start_new_session=True
            )

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self.port}"

    def key(self, path: str) -> dict[str, str]:
        """The header with the key that a path needs: the admin's, or the first API key."""
        auth = self.config.get("auth")
        if auth is None:
            return {}
        if path == "/metrics" and "metrics_key" in auth:
            return {"authorization": f"Bearer {auth['metrics_key']}"}
        admin = path.startswith("/admin") or path.endswith("load_lora_adapter")
        return {"authorization": f"Bearer {auth['admin_key'] if admin else auth['api_keys'][0]}"}

    def get(self, path: str, **options: Any) -> httpx.Response:
        """One GET."""
        return httpx.get(self.url + path, timeout=60, **{"headers": self.key(path), **options})

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """One POST of JSON."""
        options = {"headers": self.key(path), **options}
        return httpx.post(self.url + path, json=body, timeout=120, **options)

    def delete(self, path: str) -> httpx.Response:
        """One DELETE."""
        return httpx.delete(self.url + path, timeout=60, headers=self.key(path))

    def wait_ready(self) -> None:
        """Waits until it serves; keeps what it answered before.

        Raises:
            AssertionError: it ended or takes too long.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.get("/ready").status_code == 200:
                    return
                for path in ("/health", "/ready", "/v1/models", "/metrics"):
                    answer = self.get(path)
                    body = {"page": answer.text} if path == "/metrics" else answer.json()
                    found = (path, answer.status_code, body, dict(answer.headers))
                    self.early.append(found)
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"not ready after {START_S:g} s:\n{self.log.read_text()}")

    def engine_process(self) -> int:
        """The id of vLLM's engine process."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(int(c.pid) for c in children if "EngineCor" in c.name())

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it and waits.

        Returns:
            Its exit status.
        """
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
