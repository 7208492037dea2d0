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
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from steering import broken
from steering.engine_args import watched
from steering.wire import SteeringPayload, unpack
from steering.worker.readout.watch import named
from steering.worker.step.scratch import scratch_blocks

logger = logging.getLogger(__name__)


class SteeredScheduler(Scheduler):
    """vLLM's scheduler; only lagging requests' block hashes differ, and the room for drafts.

    And requests end whose streams gave no numbers: see `steering.worker.readout.watch`. Made with
    asynchronous scheduling it is a `SteeredAsyncScheduler`.
    """

    def __new__(cls, vllm_config: Any, *_: Any, **__: Any) -> SteeredScheduler:
        if vllm_config.scheduler_config.async_scheduling:
            cls = SteeredAsyncScheduler
        return super().__new__(cls)

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **options: Any) -> None:
        kept = kv_cache_config.num_blocks - scratch_blocks(vllm_config, kv_cache_config)
        super().__init__(vllm_config, replace(kv_cache_config, num_blocks=kept), *args, **options)
        # The draft stream writes its KV behind the step's tokens. vLLM leaves room for that only
        # where the drafter is one of its own models.
        self.num_lookahead_tokens = self.num_spec_tokens
        self._watched = watched(self.vllm_config.additional_config["coxswain"]["streams"])
        self._flags: dict[str, int] = {}
        self._draft: str | None = self.vllm_config.additional_config["coxswain"]["draft"]
        # Requests that do not draft.
        self._undrafted: set[str] = set()
        # Blocks that hold no numbers, until nobody uses them; and those to clean in the next step.
        self._unclean: set[int] = set()
        self._to_zero: list[int] = []
        _refuse_empty(self.structured_output_manager)

    def add_request(self, request: Any) -> None:
        """Queues a request, its block hashes made private beyond what it may share."""
        parameters = request.sampling_params
        payload = unpack(parameters.extra_args) if parameters is not None else None
        if self._draft is not None and not _drafts(payload, self._draft):
            self._undrafted.add(request.request_id)
        if payload is not None and any(use.reads_prompt for use in payload.plan.adapters):
            # A cached block has keys and values, not the states that a condition reads.
            request.skip_reading_prefix_cache = True
        if payload is not None and request._block_hasher is not None:
            shared = payload.shared_tokens(request.num_prompt_tokens - payload.reply)
            if shared is not None:
                keep = shared // self.hash_block_size
                tokens = payload.untouched_tokens(request.num_prompt_tokens - payload.reply)
                base = _AsBase(request, payload.salt) if tokens else None
                _make_private(request, keep, base)
        super().add_request(request)

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Takes drafts in, of requests that draft: Model Runner V2 has some for every request."""
        super().update_draft_token_ids(draft_token_ids)
        self._undrafted.intersection_update(self.requests)
        for request_id in self._undrafted:
            self.requests[request_id].spec_token_ids = []

    def schedule(self, *args: Any, **options: Any) -> Any:
        """Schedules a step. Blocks that held no numbers are zeroed in it before others get them:
        attention kernels multiply what they may not see by 0, and of NaN that makes NaN.
        """
        if self._unclean:
            blocks = self.kv_cache_manager.block_pool.blocks
            self._to_zero = [i for i in self._unclean if blocks[i].ref_cnt == 0]
            self._unclean.difference_update(self._to_zero)
        return super().schedule(*args, **options)

    def _get_new_block_ids_to_zero(self) -> list[int] | None:
        new, self._to_zero = self._to_zero, []
        return [*(super()._get_new_block_ids_to_zero() or ()), *new] or None

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Takes a step's tokens in; a flagged request ends with an error in their place."""
        flags = {i: f for i, f in (model_runner_output.num_nans_in_logits or {}).items() if f}
        # One that is still in its prompt ends when it draws.
        self._flags = {i: f for i, f in self._flags.items() if i in self.requests} | flags
        for request_id, flag in flags.items():
            if named(flag, self._watched) and request_id in self.requests:
                # What these blocks hold is no longer what their hash says.
                ids = {i for g in self.kv_cache_manager.get_block_ids(request_id) for i in g}
                self.kv_cache_manager.evict_blocks(ids)
                if self.use_v2_model_runner:  # V1's view cleans them at once
                    self._unclean |= ids
        refused = {
            i: broken.of_grammar(self.requests[i].structured_output_request.grammar)
            for i in self.grammar_compile_error_reqs
            if i in self.requests
        }
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for output in (o for of in outputs.values() for o in of.outputs) if refused else ():
            output.stop_reason = refused.get(output.request_id, output.stop_reason)
        return outputs

    def _update_request_with_output(
        self, request: Any, new_token_ids: list[int], **options: Any
    ) -> tuple[list[int], bool]:
        flag = self._flags.get(request.request_id)
        if not flag:
            found: tuple[list[int], bool] = super()._update_request_with_output(
                request, new_token_ids, **options
            )
            return found
        names = named(flag, self._watched)
        reason = broken.of_streams(names) if names else broken.NOTHING_LEFT
        request.status, request.resumable = RequestStatus.FINISHED_ERROR, False
        request.stop_reason = reason
        if names:
            logger.error("Request %s ended: %s", request.request_id, reason)
        return [], True


def _drafts(payload: SteeringPayload | None, draft: str) -> bool:
    """Whether a request drafts: it runs the stream that does, and its values, which are evaluated
    at one position per step, are none.
    """
    if payload is None or payload.plan.valued:
        return False
    return draft in {*payload.plan.bodies, *payload.plan.summed}


class SteeredAsyncScheduler(SteeredScheduler, AsyncScheduler):
    """The same, on vLLM's asynchronous scheduler."""


def _refuse_empty(manager: Any) -> None:
    """Makes a grammar without any text an error like one that cannot be compiled.

    The backends compile such grammars (`{"$ref": "#"}`); then no token is allowed, one is drawn all
    the same, and the request ends with an error that says nothing.

    Args:
        manager: vLLM's manager of grammars.
    """
    create = manager._create_grammar

    def created(request: Any) -> Any:
        grammar = create(request)
        mask = manager.backend.allocate_token_bitmask(1)
        grammar.fill_bitmask(mask, 0)
        if not mask.any():
            raise ValueError(broken.NO_TEXT)
        return grammar

    manager._create_grammar = created


class _AsBase:
    """A request as the base's own would be hashed.

    Args:
        request: vLLM's.
        salt: of the base's own.
    """

    lora_request = None

    def __init__(self, request: Any, salt: str | None) -> None:
        self._request, self.cache_salt = request, salt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def _make_private(request: Any, keep: int, base: _AsBase | None = None) -> None:
    """Lets only the first `keep` block hashes of a request match another's.

    Args:
        request: vLLM's.
        keep: how many.
        base: how these blocks are hashed; None: as the request's own.
    """
    original, secret = request._block_hasher, request.request_id.encode()

    def hasher(of: Any) -> list[bytes]:
        start = len(of.block_hashes)
        return [
            h if start + i < keep else hashlib.sha256(h + secret).digest()
            for i, h in enumerate(original(base or of))
        ]

    request._block_hasher = hasher
    del request.block_hashes[:]
    request.update_block_hashes()
