"""The one vLLM entry point (group `vllm.general_plugins`): makes the steered model known."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import threading

from steering.engine_args import ARCHITECTURE, HYBRID
from steering.versions import check_version


def register() -> None:
    """Registers the model class by name; vLLM calls this in every process it starts.

    Raises:
        DoesNotFit: this version of vLLM was not compared.
    """
    from vllm import ModelRegistry
    from vllm.version import __version__

    check_version(__version__)
    from steering.worker.runners import speculator_hook
    from steering.worker.streams.config import register_hooks

    end_with_parent()
    log_like_vllm()
    register_hooks()
    speculator_hook.install()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "steering.worker.model:SteeredForCausalLM")
        ModelRegistry.register_model(HYBRID, "steering.worker.hybrid:SteeredHybridForCausalLM")


def log_like_vllm() -> None:
    """Gives this package's lines vLLM's form in the engine's processes, where nothing else has."""
    own, vllm = logging.getLogger("steering"), logging.getLogger("vllm")
    if own.handlers or not vllm.handlers or multiprocessing.parent_process() is None:
        return
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(vllm.handlers[0].formatter)
    own.addHandler(handler)


@functools.cache
def end_with_parent() -> None:
    """Ends this process when its parent was killed; does nothing in a process without one.

    vLLM's engine waits for its server's messages for ever, and holds the memory that the
    restarted server needs.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
