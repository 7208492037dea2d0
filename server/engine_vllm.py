"""The engine: vLLM's `AsyncLLM` with our remote calls. Requests reach it through
`server.requests.run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from multiprocessing import resource_tracker
from typing import Any

from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from adapters.errors import AdapterError, EngineAway, RankFault, ServerFault, from_wire
from adapters.sets import AdapterSet
from server.adapting.residency import Residency
from server.adapting.served_names import ServedNames
from server.engine_series import BoundedSeries
from server.requests import probing
from server.requests.echo import echoed
from server.requests.engine_request import EngineRequest, prepare
from server.requests.failures import raised
from steering.plan import SteeringPlan

RPC_TIMEOUT_S = 30.0
"""A remote call waits behind the running step; a longer wait means a stuck engine."""

READING_S = 0.005
"""How long the engine reads an adapter's files between two steps while requests run."""


class SteeredLLM(AsyncLLM):
    """vLLM's engine client for a steered model."""

    residency: Residency | None = None
    """Which adapters it holds; None without LoRA."""

    served_names: ServedNames
    """What clients call them."""

    def submit(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        """Runs a prepared request; closing the generator aborts it."""
        outputs = self.generate(request.prompt, request.params, request.id, **request.options)
        return raised(echoed(outputs, request.params))

    def forget(self, tag: str) -> None:
        """Makes the worker drop a report that nobody will fetch: the client left."""
        if self.errored:
            return
        self._in_background(self._forget(tag))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work that goes on when its caller has gone."""
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

    async def load_set(self, adapter_set: AdapterSet) -> None:
        """Loads a set of adapters into a slot of every engine, or of none; see `Residency`.

        Raises:
            BadAdapter, DoesNotFit: the worker cannot use it.
            ServerFault: the engine could not, for a reason of its own.
        """
        path = str(adapter_set.lora_request()["lora_path"])
        try:
            # Requests run on between two pieces of reading; only the copy into the slot is left.
            while not all(await self._adapters("coxswain_read_ahead", path, READING_S)):
                continue
            await self._adapters("coxswain_load", path)
        except BaseException:
            # Where a load is late, this stands behind it in the engine's queue, and before all
            # that comes later: nothing is left of it then, whether we hear of that or not.
            with contextlib.suppress(AdapterError):
                await asyncio.shield(self._in_background(self.unload_set(adapter_set)))
            raise

    async def unload_set(self, adapter_set: AdapterSet) -> None:
        """Leaves nothing of a set in any engine.

        Raises:
            ServerFault: the engine does not say that it is so.
        """
        await self._adapters("coxswain_unload", str(adapter_set.lora_request()["lora_path"]))

    async def _adapters(self, name: str, *args: Any) -> list[Any]:
        """One remote call to every worker of every engine, about adapters; their results.

        Raises:
            AdapterError: what the first answered that had no result, and knows why.
            EngineAway: no answer in time, or the engine has ended.
        """
        try:
            answers = [answer for workers in await self._ask(name, *args) for answer in workers]
        except TimeoutError as error:
            raise EngineAway(f"the engine did not answer within {RPC_TIMEOUT_S:g} s") from error
        except EngineDeadError as error:
            raise EngineAway("the engine has ended") from error
        except Exception as error:  # a bare one, with the engine's text
            raise ServerFault(f"the engine failed: {error}") from error
        errors = [from_wire(answer["error"]) for answer in answers if "error" in answer]
        if errors:
            raise next((error for error in errors if not isinstance(error, RankFault)), errors[0])
        return [answer["done"] for answer in answers]

    async def report(self, tag: str, tokens: dict[str, int]) -> dict[str, dict[str, Any]]:
        """The worker's measurements for one prompt; the worker deletes them.

        Args:
            tag: from the prompt's payload.
            tokens: choice index (as text) → how many tokens it has; see `ReportBook.take`.
        """
        engines = await self._ask("coxswain_report", tag, tokens)
        return one_report(engines)

    async def counters(self) -> dict[str, Any]:
        """The workers' cumulative counters: tokens and passes by stream, steps."""
        # The ranks of an engine take the same steps.
        engines = [workers[0] for workers in await self._ask("coxswain_counters")]
        return {
            "steps": sum(engine["steps"] for engine in engines),
            **{what: {stream: sum(engine[what][stream] for engine in engines)
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
        bound: dict[str, Any] = (await self._ask("coxswain_bind"))[0][0]
        settings = self.vllm_config.additional_config["coxswain"]
        await self._try(probing.plan(settings["streams"]))
        return bound

    async def _try(self, plan: SteeringPlan) -> None:
        """Draws one token."""
        params = SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        ids = probing.prompt(self.model_config.get_vocab_size())
        prompt = {"prompt_token_ids": ids, "type": "token"}
        request = prepare(EngineRequest(prompt, params, "probe", {}), plan, "probe")
        async with aclosing(self.submit(request)) as outputs:
            async for _ in outputs:
                pass
        await self.report(request.tag, {})

    async def _ask(self, name: str, *args: Any) -> list[list[Any]]:
        """One remote call to every worker of every engine; the answers by engine.

        vLLM's own time-out would leave the late reply in the executor's queue, where the next
        call would take it for its own; giving up on this side is safe.
        """
        # `collective_rpc` answers for the first engine only.
        call = self.engine_core.call_utility_all_async("collective_rpc", name, None, args, None)
        answers: list[list[Any]] = await asyncio.wait_for(call, RPC_TIMEOUT_S)
        return answers


def one_report(engines: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """A report from every worker's part of it, by engine.

    The choices of one report may have run in several engines; the workers of an engine measure
    the same, and some measure nothing.
    """
    found: dict[str, Any] = {}
    for answer in (answer for workers in engines for answer in workers):
        found = answer | found
    return found


def start_engine(arguments: dict[str, Any]) -> SteeredLLM:
    """Loads the models and starts the engine. Blocks for seconds to minutes: run in a thread.

    Args:
        arguments: from `steering.engine_args.steered_engine_args`.
    """
    args = AsyncEngineArgs(**arguments)
    if isinstance(args.structured_outputs_config, dict):
        # vLLM writes the reasoning parser into it, as into an object.
        args.structured_outputs_config = StructuredOutputsConfig(**args.structured_outputs_config)
    config = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    # A terminal's Ctrl-C reaches every process of its group, and an engine that gets it drops its
    # requests. The processes that this thread starts inherit its mask; we alone answer, and drain.
    resource_tracker.ensure_running()  # its own start would lift the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    served = ServedNames()
    engine: SteeredLLM = SteeredLLM.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        # Any logger of one's own turns statistics on.
        stat_loggers=None if args.disable_log_stats else [BoundedSeries.naming(served)],
        disable_log_stats=args.disable_log_stats,
    )
    engine.served_names = served
    return engine
