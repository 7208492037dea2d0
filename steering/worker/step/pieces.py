"""A pass as graphs with attention launched between them: for rows of any lengths, as prompts are.

Everything that a stream does to a token without its others is the same for prompts and decoding;
only attention differs with the rows, and backends capture it for rows of one length at most. So it
is left out of the graphs: while a pass is captured, each attention layer is stood in for by a copy
that ends one graph, notes the call and begins the next. What a call reads and writes lies in the
graphs' pool, at fixed places, and is valid from the graph before to the last one that reads it, as
long as the pieces run in their order.

vLLM's own graphs of this kind (its mode PIECEWISE) are captured before the streams are bound, all
over the runner's own ids. The idea of breaking a capture is that of vLLM 0.32's
`compilation/breakable_cudagraph.py`.

Checked on vLLM 0.32.0, emulated; has not been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import weak_ref_tensor


class Pieces:
    """A pass in pieces.

    Args:
        pool: of the graphs.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph: Any = None
        self._calls: list[Callable[[], Any]] = []

    def replay(self) -> None:
        """Launches all of them, in a forward context that has attention's metadata by name."""
        for call in self._calls:
            call()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Captures what runs inside; on the stream that is current."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def leave_out(self, call: Callable[[], Any]) -> None:
        """Has a call between two graphs, not made now."""
        self._end()
        self._calls.append(call)
        self._begin()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool)
        self._graph = graph

    def _end(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.capture_end()
            self._calls.append(graph.replay)


def left_out(layer: Any, name: str, pieces: Pieces) -> Any:
    """An attention layer as a capture in pieces sees it.

    Args:
        layer: vLLM's.
        name: under which its model asks for it.
        pieces: that it leaves its call to.
    """
    found = copy(layer)
    found.impl = _LeftOut(layer, name, pieces)
    return found


class _LeftOut:
    """The backend of such a layer: writes keys and values in the graph, and attends outside."""

    def __init__(self, layer: Any, name: str, pieces: Pieces) -> None:
        self._layer, self._name, self._pieces = layer, name, pieces

    def __getattr__(self, key: str) -> Any:
        return getattr(self._layer.impl, key)

    def forward(
        self,
        _layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        _metadata: Any,
        output: torch.Tensor,
        **scales: torch.Tensor | None,
    ) -> torch.Tensor:
        """Notes the call; see `vllm.v1.attention.backend.AttentionImpl.forward`."""
        output.zero_()  # nothing is written for padding
        layer, name = self._layer, self._name
        # Held, they would take their place in the pool for each size and layer.
        query, key, value, there = map(weak_ref_tensor, (query, key, value, output))
        scales = {which: weak_ref_tensor(scale) for which, scale in scales.items()}

        def attend() -> None:
            metadata = get_forward_context().attn_metadata[name]
            layer.impl.forward(layer, query, key, value, kv_cache, metadata, output=there, **scales)

        self._pieces.leave_out(attend)
        return output
