"""What configurations come to: `python -m tests.deploy.as_cuda` reads them from standard input.

A process of its own, since it turns vLLM's platform into CUDA's once the models' classes are
loaded: what vLLM then makes of its arguments is what it makes of them beside a GPU.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

from server.loading import engine_arguments, environment
from server.settings.config import Config
from server.settings.file import parse

PLATFORMS = ("cpu", "cuda")


def become_cuda() -> None:
    """Makes vLLM take this machine for one with eight H200."""
    from vllm.config import vllm as vllm_config
    from vllm.platforms import current_platform

    vllm_config.HAS_TRITON = True  # a GPU's build has it, and chooses its runner by it
    # What vLLM's module of this platform imports, and nobody calls here.
    sys.modules.setdefault("vllm._C_stable_libtorch", types.ModuleType("_C_stable_libtorch"))
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H200(NonNvmlCudaPlatform):
        """Answers without a driver."""

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H200"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 141 << 30

        @classmethod
        def device_count(cls) -> int:
            return 8

    current_platform.__class__ = H200


def problems(config: Config) -> list[str]:
    """Why a server with this configuration would not start, as far as that is known before its
    models are loaded; empty if it would.
    """
    from torch import nn
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from server.checks.doctor import diagnose
    from steering.refused import refused_config
    from steering.worker.adapting import lora_seam

    diagnosis = diagnose(config)
    if diagnosis.problems:
        return diagnosis.problems
    try:
        args = AsyncEngineArgs(**engine_arguments(config, diagnosis))
        found = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        lora_seam.prepare(nn.Module(), found)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    lags = found.scheduler_config.async_scheduling and not found.use_v2_model_runner
    return ["V1 does not schedule asynchronously"] * lags + refused_config(found)


def main() -> None:
    """Writes {platform: {name: problems}} of [name, folder, configuration]s."""
    configs = {n: parse(document, Path(folder), {}) for n, folder, document in json.load(sys.stdin)}
    environment(next(iter(configs.values())))
    from steering.worker import model  # noqa: F401  # as this platform can

    found = {}
    for platform in PLATFORMS:
        if platform == "cuda":
            become_cuda()
        found[platform] = {name: problems(config) for name, config in configs.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
