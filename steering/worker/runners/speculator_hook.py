"""Lets vLLM's Model Runner V2 take our speculator, which it has no way to name (vLLM RFC 51212).

Runs in every process of vLLM, so it imports as little as it can. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import sys
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.gpu import spec_decode

from steering.engine_args import DRAFTER


def install() -> None:
    """Makes vLLM choose V2 for our drafter too, and build it; once per process, before a runner."""
    build, unsupported = (
        spec_decode.init_speculator,
        VllmConfig._get_v2_model_runner_unsupported_features,
    )
    if getattr(build, "__module__", "") == __name__:
        return

    def init_speculator(vllm_config: VllmConfig, *args: Any) -> Any:
        if _is_ours(vllm_config):
            from steering.worker.runners.v2_speculator import StreamSpeculator

            return StreamSpeculator(vllm_config, *args)
        return build(vllm_config, *args)

    def without_ours(self: VllmConfig) -> list[str]:
        features: list[str] = unsupported(self)
        ours = "speculative method 'custom_class'" if _is_ours(self) else None
        return [feature for feature in features if feature != ours]

    spec_decode.init_speculator = init_speculator
    if runner := sys.modules.get("vllm.v1.worker.gpu.model_runner"):  # has the name already
        vars(runner)["init_speculator"] = init_speculator
    VllmConfig._get_v2_model_runner_unsupported_features = without_ours


def _is_ours(vllm_config: VllmConfig) -> bool:
    config = vllm_config.speculative_config
    return config is not None and config.method == "custom_class" and config.model == DRAFTER
