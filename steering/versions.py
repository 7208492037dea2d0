"""The versions of vLLM that the streams run on, and what differs between them. Needs no vLLM.

`tests/steering/test_vllm_versions.py` compares what each version offers with what we use; what is
not alike stands here, and where it matters the code that minds it is named.
"""

from __future__ import annotations

from collections.abc import Mapping

from steering.errors import DoesNotFit

VERSIONS = ("0.32", "0.33")
"""The first two numbers of those that may be used."""

_OPTIONAL = "an optional argument, which we leave out"
_SETTING = "a setting, off unless `engine` gives it"
_FIELD = "a field that a request or response may have; vLLM's own code handles it"
_DRAFT = "for layers of vLLM's own drafters, which are no streams"

DIFFERENCES: Mapping[str, str] = {
    "vllm.config:CacheConfig": _SETTING,
    "vllm.config:VllmConfig": _SETTING,
    "vllm.engine.arg_utils:AsyncEngineArgs": _SETTING,
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": _FIELD,
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionResponseChoice": _FIELD,
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest": _FIELD,
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion": _OPTIONAL,
    "vllm.entrypoints.openai.responses.protocol:ResponsesRequest": _FIELD,
    "vllm.entrypoints.openai.responses.protocol:ResponsesResponse": _FIELD,
    "vllm.renderers.online_renderer:OnlineRenderer": _OPTIONAL,
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend": "a property of the backend, unused",
    "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec": _DRAFT,
    "vllm.v1.kv_cache_interface:FullAttentionSpec": _DRAFT,
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": _DRAFT,
    "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs": _DRAFT,
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p": _OPTIONAL,
    "vllm.v1.worker.gpu.block_table:BlockTables": (
        "blocks below a sliding window are hidden from the step, which a lagging stream still "
        "reads; no layer of a stream counts as sliding (`steering/worker/streams/kv_layers.py`)"
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "context parallelism keeps its fields elsewhere; it is refused (`steering/refused.py`)"
    ),
}
"""What differs from the first version to the last: 'module:name' → why the streams stay right."""


def check_version(version: str) -> None:
    """Whether the streams may run on a version of vLLM.

    Args:
        version: as `vllm.__version__` has it, e.g. `0.32.0` or `0.33.1+cu130`.

    Raises:
        DoesNotFit: it was not compared.
    """
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        raise DoesNotFit(
            "the streams were not compared with this version of vLLM",
            field="vllm",
            value=version,
            allowed=" and ".join(VERSIONS),
        )
