"""Keeps prefix-cache sharing right for requests whose streams lag behind (`scheduler_cls`).

A stream whose prompt is shorter by d tokens stores token t in the slot of its position t − d, so
it goes on writing into a block for d more tokens after the request has left it. As long as those
tokens belong to the stream's prompt, every request that shares the block writes the same values
there. Once they belong to the response, the block must be the request's alone. So such a request
may share blocks only up to its shortest prompt; later blocks get hashes that nobody else has.

Runs in the engine core.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from steering.engine_args import watched
from steering.wire import unpack
from steering.worker.watch import named

logger = logging.getLogger(__name__)


class SteeredScheduler(Scheduler):
    """vLLM's scheduler; only lagging requests' block hashes differ, and the room for drafts.

    And requests end whose streams gave no numbers: see `steering.worker.watch`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # The draft stream writes its KV behind the step's tokens. vLLM leaves room for that only
        # where the drafter is one of its own models.
        self.num_lookahead_tokens = self.num_spec_tokens
        self._watched = watched(self.vllm_config.additional_config["coxswain"]["streams"])
        self._flags: dict[str, int] = {}

    def add_request(self, request: Any) -> None:
        """Queues a request, its block hashes made private beyond what it may share."""
        parameters = request.sampling_params
        freight = unpack(parameters.extra_args) if parameters is not None else None
        if freight is not None and request._block_hasher is not None:
            shared = freight.shared_tokens(request.num_prompt_tokens - freight.reply)
            if shared is not None:
                _make_private(request, shared // self.hash_block_size)
        super().add_request(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Takes a step's tokens in; a flagged request ends with an error in their place."""
        self._flags = model_runner_output.num_nans_in_logits or {}
        return super().update_from_output(scheduler_output, model_runner_output)

    def _update_request_with_output(
        self, request: Any, new_token_ids: list[int], **options: Any
    ) -> tuple[list[int], bool]:
        flag = self._flags.get(request.request_id)
        if not flag:
            return super()._update_request_with_output(request, new_token_ids, **options)
        names = named(flag, self._watched)
        request.status, request.resumable = RequestStatus.FINISHED_ERROR, False
        request.stop_reason = broken(names)
        logger.error("Request %s ended: %s", request.request_id, request.stop_reason)
        return [], True


def broken(names: Sequence[str]) -> str:
    """What is wrong with streams and heads that give no numbers."""
    which = " or ".join(map(repr, names))
    return (
        f"The stream {which} gives scores that are NaN or infinite: its checkpoint is damaged, or "
        "its numbers overflow in this dtype."
    )


def _make_private(request: Any, keep: int) -> None:
    """Lets only the first `keep` block hashes of a request match another's."""
    original, secret = request._block_hasher, request.request_id.encode()

    def hasher(of: Any) -> list[bytes]:
        start = len(of.block_hashes)
        return [
            h if start + i < keep else hashlib.sha256(h + secret).digest()
            for i, h in enumerate(original(of))
        ]

    request._block_hasher = hasher
    del request.block_hashes[:]
    request.update_block_hashes()
