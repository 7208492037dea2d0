"""A pytest plugin (`-p tests.emulated.plugin`) that prepares the process for emulated tests."""

from __future__ import annotations

import os

from tests.emulated import triton_cpu

triton_cpu.install()
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
