"""The engine: vLLM's `AsyncLLM` with one choke point, through which every request passes.

Here a request's plan meets its prompt: the prompt is lengthened for streams that read more, the
plan is packed for the worker, and the prefix cache is kept apart. On the way out the padding is
cut off again, so that clients see the base's own prompt and usage.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from adapters.errors import BadAdapter
from adapters.sets import AdapterSet
from server.adapting.residency import Residency
from server.steered import Steered
from steering.errors import BadValue
from steering.plan import SteeringPlan
from steering.prompts import align
from steering.wire import KEY, Freight, pack

RPC_TIMEOUT_S = 30.0
"""A remote call waits behind the running step; a longer wait means a stuck engine."""

READING_S = 0.005
"""How long the engine reads an adapter's files between two steps while requests run."""


@dataclass(frozen=True, slots=True)
class _Boarding:
    """One prompt as it goes into the engine.

    Args:
        steered: the request it belongs to.
        index: which of the request's prompts.
        base_ids: the base's own prompt.
        pad: tokens put in front of it.
        tag: names its report; '' for none.
    """

    steered: Steered
    index: int
    base_ids: list[int]
    pad: int
    tag: str


class SteeredLLM(AsyncLLM):
    """vLLM's engine client for a steered model."""

    residency: Residency | None = None
    """Which adapters it holds; None without LoRA."""

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`, for requests with or without steering.

        A plain function: what is wrong with a plan is raised here, before a response has begun.
        The client's disconnect closes the returned generator, which aborts the request.

        Raises:
            BadValue: the lengthened prompt leaves no room in the context.
            NoRoom: the engine cannot take its adapters while others are pinned.
        """
        extra = dict(sampling_params.extra_args or {})
        steered = extra.pop(KEY, None)
        if steered is None:
            return super().generate(prompt, sampling_params, request_id, **options)
        if not isinstance(steered, Steered):
            raise BadValue("use the `steering` field", field=f"vllm_xargs.{KEY}")
        index = steered.next_prompt()
        plan = steered.plan_of(index)
        sampling_params.extra_args = extra or None
        if not plan.steers and not plan.adapters and plan.report == "off":
            return super().generate(prompt, sampling_params, request_id, **options)
        prompt, boarding = self._board(prompt, sampling_params, steered, index, plan)
        if plan.adapters:
            assert self.residency is not None and steered.adapter_set is not None
            self.residency.check_room(steered.adapter_set)
            outputs = self._adapted(prompt, sampling_params, request_id, steered, options)
        else:
            outputs = super().generate(prompt, sampling_params, request_id, **options)
        return self._watch(outputs, boarding)

    async def _adapted(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        steered: Steered,
        options: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs a request while the engine holds its adapters."""
        assert self.residency is not None and steered.adapter_set is not None
        async with self.residency.holding(steered.adapter_set):
            options = {**options, "lora_request": lora_request(steered.adapter_set)}
            outputs = super().generate(prompt, params, request_id, **options)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output

    def _board(
        self,
        prompt: Any,
        params: SamplingParams,
        steered: Steered,
        index: int,
        plan: SteeringPlan,
    ) -> tuple[Any, _Boarding]:
        """The prompt as the engine gets it; `params` is changed in place."""
        if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
            raise BadValue("steering needs a prompt of text or token ids", field="prompt")
        base_ids = list(prompt["prompt_token_ids"])
        ids, pad = align(base_ids, plan)
        room = self.model_config.max_model_len - len(ids)
        if room < 1:
            raise BadValue(f"the longest prompt of the request has {len(ids)} tokens",
                           field="steering.prompts",
                           allowed=f"at most {self.model_config.max_model_len - 1}")  # fmt: skip
        if steered.max_tokens is not None and pad and steered.max_tokens > room:
            raise BadValue(
                f"a stream's own prompt of {len(ids)} tokens leaves room for {room}",
                field="max_tokens", value=steered.max_tokens, allowed=f"at most {room}",
            )  # fmt: skip
        if params.max_tokens is not None:
            params.max_tokens = min(params.max_tokens, room)
        tag = f"{steered.tag}-{index}" if plan.report != "off" else ""
        params.extra_args = {**(params.extra_args or {}), **pack(Freight(plan, pad, tag))}
        prompt = {**prompt, "prompt_token_ids": ids}
        if key := plan.cache_key(pad):
            prompt["cache_salt"] = salted(prompt.get("cache_salt"), key)
        return prompt, _Boarding(steered, index, base_ids, pad, tag)

    async def _watch(
        self, outputs: AsyncGenerator[RequestOutput, None], boarding: _Boarding
    ) -> AsyncGenerator[RequestOutput, None]:
        """Passes outputs on without the padding; fetches the report before the last one."""
        finals: dict[str, int] = {}
        taken = not boarding.tag
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    _unpad(output, boarding)
                    for choice in output.outputs:
                        if choice.token_ids:
                            finals[str(choice.index)] = choice.token_ids[-1]
                    if output.finished and not taken:
                        taken = True
                        report = await self.report(boarding.tag, finals)
                        boarding.steered.reports[boarding.index] = report
                    yield output
        finally:
            if not taken and not self.errored:
                # The client left: the worker must not keep the tally.
                task = asyncio.create_task(self._forget(boarding.tag))
                self._tasks().add(task)
                task.add_done_callback(self._tasks().discard)

    def _tasks(self) -> set[asyncio.Task[None]]:
        """Keeps background tasks from being collected while they run."""
        tasks: set[asyncio.Task[None]] = self.__dict__.setdefault("_coxswain_tasks", set())
        return tasks

    async def _forget(self, tag: str) -> None:
        try:
            await self.report(tag, {})
        except Exception:  # the engine is going down; its tallies go with it
            return

    async def load_set(self, found: AdapterSet) -> None:
        """Loads a set of adapters into a slot; see `Residency`.

        Raises:
            BadAdapter: the worker could not.
        """
        request = lora_request(found)
        try:
            # Requests run on between two pieces of reading; only the copy into the slot is left.
            while not all(await self._ask("coxswain_read_ahead", request.lora_path, READING_S)):
                continue
            await self.add_lora(request)
        except EngineDeadError:
            raise
        except Exception as error:  # a bare one, with the worker's text
            raise BadAdapter(f"the engine could not load it: {error}") from error

    async def unload_set(self, found: AdapterSet) -> None:
        """Empties the slot of a set."""
        await self.remove_lora(lora_request(found).lora_int_id)

    async def report(self, tag: str, finals: dict[str, int]) -> dict[str, dict[str, Any]]:
        """What the worker measured for one prompt; the worker forgets it.

        Args:
            tag: from the prompt's freight.
            finals: choice index (as text) → id of its last token.
        """
        answers = await self._ask("coxswain_report", tag, finals)
        return next((answer for answer in answers if answer), {})

    async def counters(self) -> dict[str, Any]:
        """The worker's cumulative counters: tokens and passes by stream, steps."""
        answers = await self._ask("coxswain_counters")
        found: dict[str, Any] = answers[0]
        return found

    async def bind(self) -> None:
        """Prepares the worker; once, after the engine is up and before it serves."""
        await self._ask("coxswain_bind")

    async def _ask(self, name: str, *args: Any) -> list[Any]:
        """One remote call to every worker.

        vLLM's own time-out would leave the late reply in the executor's queue, where the next
        call would take it for its own; giving up on this side is safe.
        """
        call = self.collective_rpc(name, args=args)
        answers: list[Any] = await asyncio.wait_for(call, RPC_TIMEOUT_S)
        return answers


def lora_request(found: AdapterSet) -> LoRARequest:
    """A set of adapters as vLLM knows it."""
    return LoRARequest(**found.lora_request())


def _unpad(output: RequestOutput, boarding: _Boarding) -> None:
    """Makes an output speak of the base's own prompt."""
    if not boarding.pad:
        return
    output.prompt_token_ids = boarding.base_ids
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = max(0, output.num_cached_tokens - boarding.pad)


def salted(user_salt: str | None, cache_key: str) -> str:
    """The prefix-cache salt of a steered request.

    A stream's KV is only valid for requests that ran that stream; the caller's own salt keeps
    its effect.
    """
    parts = json.dumps([user_salt, cache_key]).encode()
    return "coxswain-" + hashlib.sha256(parts).hexdigest()[:40]


def start_engine(arguments: dict[str, Any]) -> SteeredLLM:
    """Loads the models and starts the engine. Blocks for seconds to minutes: run in a thread.

    Args:
        arguments: from `steering.engine_args.steered_engine_args`.
    """
    args = AsyncEngineArgs(**arguments)
    config = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    # A terminal's Ctrl-C reaches every process of its group, and an engine that gets it drops its
    # requests. The processes that this thread starts inherit its mask; we alone answer, and drain.
    resource_tracker.ensure_running()  # its own start would lift the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    engine: SteeredLLM = SteeredLLM.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        disable_log_stats=args.disable_log_stats,
    )
    return engine
