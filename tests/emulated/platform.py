"""A CPU platform that behaves like CUDA's where Model Runner V2 asks it.

vLLM's CPU platform switches graphs and asynchronous scheduling off and has attention of its own in
C++, which a graph of torch operations cannot hold. Here the modes stay as asked, attention is
vLLM's Triton backend, and the worker captures graphs when it would on a GPU.

It cannot prove anything about attention backends that need CUDA (FlashAttention, FlashInfer), nor
about the memory that captures take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests.emulated import graphs

ATTENTION = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"


@contextmanager
def scheduling(*, asynchronous: bool) -> Iterator[None]:
    """Engines made inside schedule a step before or after the last one's tokens are known.

    vLLM's platform for CPUs switches asynchronous scheduling off.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    on_cpus = platform.check_and_update_config

    def check(_: Any, config: Any) -> None:
        on_cpus(config)
        config.scheduler_config.async_scheduling = asynchronous

    with patch.object(platform, "check_and_update_config", classmethod(check)):
        yield


@contextmanager
def like_cuda(
    mode: str = "NONE",
    sizes: Sequence[int] = (1, 2, 4),
    *,
    asynchronous: bool = False,
    compiled: bool = False,
) -> Iterator[None]:
    """Engines made inside capture and replay emulated graphs.

    Args:
        mode: a name of vLLM's `CUDAGraphMode`.
        sizes: padded numbers of rows that graphs are captured for.
        asynchronous: whether the next step is scheduled before the last one's tokens are known.
        compiled: whether models are traced and cut at attention as where they are compiled; the
            pieces then run as torch operations, since a compiler's kernels could not be recorded.
    """
    import vllm.compilation.breakable_cudagraph as breakable
    import vllm.distributed.parallel_state as parallel_state
    import vllm.v1.worker.cpu_worker as worker
    import vllm.v1.worker.gpu.cudagraph_utils as utils
    import vllm.v1.worker.gpu.model_runner as runner
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.worker_base import CompilationTimes

    from adapters.kernels import operation, triton_operation
    from steering.worker.adapting import lora_seam
    from steering.worker.adapting import triton as triton_adding
    from steering.worker.step import pieces

    platform = type(current_platform)

    def check(_: Any, config: Any) -> None:
        as_scheduled(config)
        compilation = config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode[mode]
        compilation.mode = CompilationMode.VLLM_COMPILE if compiled else CompilationMode.NONE
        compilation.backend = "eager"
        compilation.cudagraph_capture_sizes = list(sizes)
        compilation.max_cudagraph_capture_size = max(sizes)
        compilation.compile_sizes = []

    def capture(self: Any) -> Any:
        if self.model_runner.cudagraph_manager.needs_capture():
            self.model_runner.capture_model()
        return CompilationTimes(language_model=0.0, encoder=0.0)

    @contextmanager
    def no_stream(device: Any = None) -> Iterator[None]:
        yield None

    @contextmanager
    def one_pool(pool: Any, _: Any) -> Iterator[Any]:
        yield pool

    with ExitStack() as stack:
        stack.enter_context(graphs.emulated())
        stack.enter_context(scheduling(asynchronous=asynchronous))
        as_scheduled = platform.check_and_update_config
        for owner, name, value in (
            (platform, "check_and_update_config", classmethod(check)),
            (platform, "get_attn_backend_cls", classmethod(lambda *_, **__: ATTENTION)),
            (platform, "opaque_attention_op", classmethod(lambda _: True)),
            (platform, "get_global_graph_pool", lambda _: (0, 0)),
            (platform, "graph_pool_handle", classmethod(lambda _: (0, 0))),
            (platform, "support_static_graph_mode", classmethod(lambda _: True)),
            (torch.accelerator, "get_memory_info", lambda *_: (1 << 40, 1 << 40)),
            (parallel_state, "graph_capture", no_stream),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (utils, "graph_capture", no_stream),
            (utils, "capture_pool", one_pool),
            (breakable, "capture_pool", one_pool),
            (breakable, "weak_ref_tensor", lambda tensor: tensor),
            (breakable, "weak_ref_tensors", lambda tensors: tensors),
            (pieces, "weak_ref_tensor", graphs.weak_ref),
            (runner, "lock_workspace", lambda *_: None),
            (worker.CPUWorker, "compile_or_warm_up_model", capture),
            # The adapters' kernels, where CUDA would have them.
            (triton_adding, "current_platform", SimpleNamespace(is_cuda=lambda: True)),
            (triton_operation, "register", partial(triton_operation.register, key="CPU")),
            (operation, "build", lambda *_: None),
            # What is compiled for CPUs launches nothing that could be recorded.
            (lora_seam, "keep_compiling", lambda _: None),
        ):
            stack.enter_context(patch.object(owner, name, value, create=True))
        yield
