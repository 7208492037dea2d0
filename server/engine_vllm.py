"""The engine: vLLM's `AsyncLLM` with one choke point, through which every request passes.

Here a request's plan meets its prompt (`server.requests.boarding`). On the way out the padding is
cut off again, so that clients see the base's own prompt and usage.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from multiprocessing import resource_tracker
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import RetryableRequestError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from adapters.errors import AdapterError, EngineAway, RankFault, ServerFault, from_wire, passing
from adapters.sets import AdapterSet
from server.adapting.residency import Residency
from server.engine_series import BoundedSeries
from server.operation import metrics
from server.operation.counting import counted
from server.requests import best_of_n, probing
from server.requests.boarding import Boarding, Ride, board, limit_tokens, refuse_lag
from server.requests.echo import echoed
from server.requests.ended import sound
from server.requests.steered import Report, Steered
from server.settings.operating import LimitsConfig
from server.trail import Trail, trail
from steering.errors import BadValue
from steering.plan import SteeringPlan
from steering.wire import KEY

RPC_TIMEOUT_S = 30.0
"""A remote call waits behind the running step; a longer wait means a stuck engine."""

READING_S = 0.005
"""How long the engine reads an adapter's files between two steps while requests run."""


class SteeredLLM(AsyncLLM):
    """vLLM's engine client for a steered model."""

    residency: Residency | None = None
    """Which adapters it holds; None without LoRA."""

    limits: LimitsConfig = LimitsConfig()
    """What one request may take."""

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`, for requests with or without steering.

        A plain function: what is wrong with a plan is raised here, before a response has begun.
        The client's disconnect closes the returned generator, which aborts the request.

        Raises:
            BadValue: the prompt is too long, or, lengthened, leaves no room in the context.
            NoRoom: the engine cannot take its adapters while others are pinned.
        """
        self._limit(prompt, sampling_params)
        extra = dict(sampling_params.extra_args or {})
        steered = extra.pop(KEY, None)
        if steered is None:
            plain = Ride(prompt, sampling_params, request_id, options)
            return counted(self.submit(plain), trail(), sampling_params)
        if not isinstance(steered, Steered):
            raise BadValue("use the `steering` field", field=f"vllm_xargs.{KEY}")
        index = steered.next_prompt()
        plan = steered.plan_of(index)
        sampling_params.extra_args = extra or None
        if plan.adapters:
            assert steered.adapter_set is not None
            options["lora_request"] = lora_request(steered.adapter_set)
        ride = Ride(prompt, sampling_params, request_id, options)
        if plan.best is not None:
            outputs = best_of_n.start(self, ride, steered, index)
        else:
            outputs = self.ride(ride, plan, steered, index, steered.reports)
        if plan.adapters:
            return self._holding(outputs, steered)
        return outputs

    def _limit(self, prompt: Any, params: SamplingParams) -> None:
        """Keeps prompt and reply inside what the configuration allows.

        Raises:
            BadValue: the prompt is longer.
        """
        most, longest = self.limits.max_prompt_tokens, self.limits.max_output_tokens
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if most is not None and ids is not None and len(ids) > most:
            raise BadValue("the prompt has more tokens than this server takes", field="prompt",
                           value=len(ids), allowed=f"at most {most}")  # fmt: skip
        if longest is not None and params.max_tokens is not None:
            params.max_tokens = min(params.max_tokens, longest)

    def ride(
        self,
        ride: Ride,
        plan: SteeringPlan,
        steered: Steered,
        index: int,
        reports: dict[int, Report],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs one prompt under a plan.

        Args:
            ride: the request; its `params` are changed in place.
            plan: complete.
            steered: the HTTP request that it belongs to.
            index: which of the request's prompts.
            reports: gets the report under `index`.

        Raises:
            BadValue: the lengthened prompt leaves no room in the context, or the base cannot lag
                behind it.
        """
        if not plan.steers and not plan.adapters and plan.report == "off":
            return counted(self.submit(ride), trail(), ride.params)
        tag = f"{steered.tag}-{index}" if plan.report != "off" else ""
        prompt, boarding = board(ride.prompt, ride.params, plan, tag)
        length, context = len(prompt["prompt_token_ids"]), self.model_config.max_model_len
        refuse_lag(boarding.pad, self.model_config.is_hybrid)
        limit_tokens(ride.params, steered.max_tokens, length, boarding.pad, context)
        outputs = counted(self.submit(replace(ride, prompt=prompt)), trail(), ride.params)
        delta = ride.params.output_kind == RequestOutputKind.DELTA
        return self._watch(outputs, boarding, index, reports, delta, trail())

    def submit(self, ride: Ride) -> AsyncGenerator[RequestOutput, None]:
        """Runs a request that has boarded; closing the generator aborts it."""
        outputs = super().generate(ride.prompt, ride.params, ride.request_id, **ride.options)
        return sound(echoed(outputs, ride.params))

    def _holding(
        self, outputs: AsyncGenerator[RequestOutput, None], steered: Steered
    ) -> AsyncGenerator[RequestOutput, None]:
        """Passes outputs on while the engine holds the request's adapters.

        Raises:
            NoRoom: the engine cannot take them.
        """
        residency, wanted = self.residency, steered.adapter_set
        assert residency is not None and wanted is not None
        residency.check_room(wanted)

        async def held() -> AsyncGenerator[RequestOutput, None]:
            began = time.perf_counter()
            async with AsyncExitStack() as stack:
                try:
                    await stack.enter_async_context(residency.holding(wanted))
                except AdapterError as error:
                    if not passing(error):
                        raise
                    # Of what vLLM does not know it makes a 500, and a traceback, in streams.
                    raise RetryableRequestError(str(error)) from error
                await stack.enter_async_context(aclosing(outputs))
                metrics.WAIT_SECONDS.observe(time.perf_counter() - began)
                async for output in outputs:
                    yield output

        return held()

    async def _watch(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        boarding: Boarding,
        index: int,
        reports: dict[int, Report],
        delta: bool,
        noted: Trail,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Passes outputs on without the padding; fetches the report before the last one."""
        tokens: dict[str, int] = {}
        taken = not boarding.tag
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    boarding.unpad(output)
                    for choice in output.outputs:
                        # Each output of a stream has what is new, each of others has all.
                        before = tokens.get(str(choice.index), 0) if delta else 0
                        tokens[str(choice.index)] = before + len(choice.token_ids)
                    if output.finished and not taken:
                        taken = True
                        reports[index] = await self.report(boarding.tag, tokens)
                        metrics.measured(noted, reports[index])
                    yield output
        finally:
            if not taken:
                self.forget(boarding.tag)

    def forget(self, tag: str) -> None:
        """Makes the worker drop a report that nobody will fetch: the client left."""
        if self.errored:
            return
        self._in_background(self._forget(tag))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work that goes on when whoever asked for it has gone."""
        task = asyncio.create_task(work)
        self._tasks().add(task)
        task.add_done_callback(self._tasks().discard)
        return task

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
        """Loads a set of adapters into a slot of every engine, or of none; see `Residency`.

        Raises:
            BadAdapter, DoesNotFit: the worker cannot use it.
            ServerFault: the engine could not, for a reason of its own.
        """
        path = lora_request(found).lora_path
        try:
            # Requests run on between two pieces of reading; only the copy into the slot is left.
            while not all(await self._adapters("coxswain_read_ahead", path, READING_S)):
                continue
            await self._adapters("coxswain_load", path)
        except BaseException:
            # Where a load is late, this stands behind it in the engine's queue, and before all
            # that comes later: nothing is left of it then, whether we hear of that or not.
            with contextlib.suppress(AdapterError):
                await asyncio.shield(self._in_background(self.unload_set(found)))
            raise

    async def unload_set(self, found: AdapterSet) -> None:
        """Leaves nothing of a set in any engine.

        Raises:
            ServerFault: the engine does not say that it is so.
        """
        await self._adapters("coxswain_unload", lora_request(found).lora_path)

    async def _adapters(self, name: str, *args: Any) -> list[Any]:
        """One remote call to every worker of every engine, about adapters; their results.

        Raises:
            AdapterError: what the first answered that had no result, and knows why.
            EngineAway: no answer in time, or the engine has ended.
        """
        try:
            answers = [one for workers in await self._ask(name, *args) for one in workers]
        except TimeoutError as error:
            raise EngineAway(f"the engine did not answer within {RPC_TIMEOUT_S:g} s") from error
        except EngineDeadError as error:
            raise EngineAway("the engine has ended") from error
        except Exception as error:  # a bare one, with the engine's text
            raise ServerFault(f"the engine failed: {error}") from error
        errors = [from_wire(one["error"]) for one in answers if "error" in one]
        if errors:
            raise next((error for error in errors if not isinstance(error, RankFault)), errors[0])
        return [one["done"] for one in answers]

    async def report(self, tag: str, tokens: dict[str, int]) -> dict[str, dict[str, Any]]:
        """What the worker measured for one prompt; the worker forgets it.

        Args:
            tag: from the prompt's payload.
            tokens: choice index (as text) → how many tokens it has; see `ReportBook.take`.
        """
        engines = await self._ask("coxswain_report", tag, tokens)
        return next((answer for workers in engines for answer in workers if answer), {})

    async def counters(self) -> dict[str, Any]:
        """The workers' cumulative counters: tokens and passes by stream, steps."""
        # The ranks of an engine take the same steps.
        engines = [workers[0] for workers in await self._ask("coxswain_counters")]
        return {
            "steps": sum(one["steps"] for one in engines),
            **{what: {stream: sum(one[what][stream] for one in engines)
                      for stream in engines[0][what]}
               for what in ("tokens", "passes")},
        }  # fmt: skip

    async def bind(self) -> dict[str, Any]:
        """Prepares the workers and tries every stream and head; once, before the engine serves.

        Returns:
            What `coxswain_bind` says; all workers say the same.

        Raises:
            GenerationError: a stream or head gives no numbers.
        """
        found: dict[str, Any] = (await self._ask("coxswain_bind"))[0][0]
        settings = self.vllm_config.additional_config["coxswain"]
        await self._try(probing.plan(settings["streams"]))
        return found

    async def _try(self, plan: SteeringPlan) -> None:
        """Draws one token."""
        params = SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        ids = probing.prompt(self.model_config.get_vocab_size())
        prompt, boarding = board({"prompt_token_ids": ids, "type": "token"}, params, plan, "probe")
        async with aclosing(self.submit(Ride(prompt, params, boarding.tag, {}))) as outputs:
            async for _ in outputs:
                pass
        await self.report(boarding.tag, {})

    async def _ask(self, name: str, *args: Any) -> list[list[Any]]:
        """One remote call to every worker of every engine; the answers by engine.

        vLLM's own time-out would leave the late reply in the executor's queue, where the next
        call would take it for its own; giving up on this side is safe.
        """
        # `collective_rpc` answers for the first engine only.
        call = self.engine_core.call_utility_all_async("collective_rpc", name, None, args, None)
        answers: list[list[Any]] = await asyncio.wait_for(call, RPC_TIMEOUT_S)
        return answers


def lora_request(found: AdapterSet) -> LoRARequest:
    """A set of adapters as vLLM knows it."""
    return LoRARequest(**found.lora_request())


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
        # Any logger of one's own turns statistics on.
        stat_loggers=None if args.disable_log_stats else [BoundedSeries],
        disable_log_stats=args.disable_log_stats,
    )
    return engine
