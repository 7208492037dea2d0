"""Runs one HTTP request's prompts: the engine client that vLLM's serving classes get for it.

Here a request's plan meets its prompt. On the way out the padding is cut off again, so that clients
see the base's own prompt and usage.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any, Protocol

from vllm.exceptions import RetryableRequestError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from adapters.errors import AdapterError, passing
from adapters.sets import AdapterSet
from server.adapting.residency import Residency
from server.adapting.served_names import ServedNames
from server.context import RequestContext
from server.operation import metrics
from server.operation.counting import counted
from server.operation.limits import check_prompt, fit_context, limit_reply
from server.requests import best_of_n, guided_search
from server.requests.engine_request import (
    EngineRequest,
    end_at,
    keep_apart,
    prepare,
    refuse_keys,
    refuse_lag,
    truncate,
)
from server.requests.failures import ours, ours_in
from server.requests.resolved import Report, ResolvedRequest
from server.settings.operating import LimitsConfig
from steering.errors import BadValue
from steering.placing import invoked
from steering.plan import SteeringPlan


class Engine(Protocol):
    """The part of `SteeredLLM` that is used here."""

    model_config: Any
    vllm_config: Any
    renderer: Any
    residency: Residency | None
    served_names: ServedNames

    def submit(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        """Runs a prepared request; closing the generator aborts it."""
        ...

    async def report(self, tag: str, tokens: dict[str, int]) -> dict[str, dict[str, Any]]:
        """The worker's measurements."""
        ...

    def forget(self, tag: str) -> None:
        """Drops a report."""
        ...


class RequestEngine:
    """The engine, for one HTTP request. Everything that is not here is the engine's own.

    Args:
        engine: the server's.
        context: of the request.
        resolved: what it asks for.
        limits: section `limits`.
    """

    def __init__(
        self,
        engine: Engine,
        context: RequestContext,
        resolved: ResolvedRequest,
        limits: LimitsConfig,
    ) -> None:
        self.engine, self.resolved = engine, resolved
        self._context, self._limits = context, limits
        self._prompts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`, for the request's next prompt, steered as it asks.

        A plain function: what is wrong with the request is raised here, before a response has
        begun. Closing the generator, as the client's disconnect does, aborts it.

        Raises:
            BadValue: the prompt is too long, or, lengthened, leaves no room in the context.
            NoRoom: the engine cannot take its adapters while others are pinned.
        """
        with ours():
            index, self._prompts = self._prompts, self._prompts + 1
            request = EngineRequest(prompt, sampling_params, request_id, options)
            request = keep_apart(request, self._context.access.salt)
            return ours_in(self._start(request, index))

    def _start(self, request: EngineRequest, index: int) -> AsyncGenerator[RequestOutput, None]:
        """Checks prompt `index`, and runs it with the engine holding its adapters."""
        refuse_keys(request.params.extra_args)
        if (n := self.resolved.top_n_sigma) is not None:
            if self.engine.vllm_config.speculative_config is not None:
                raise BadValue("not possible with speculation, as min_p", field="top_n_sigma",
                               value=n)  # fmt: skip
            truncate(request.params, n)
        if isinstance(request.prompt, dict) and "prompt_token_ids" in request.prompt:
            check_prompt(self._limits, len(request.prompt["prompt_token_ids"]))
        limit_reply(request.params, self._limits.max_output_tokens)
        end_at(request.params, self.resolved.stop_token_ids)
        plan, wanted = self.resolved.plan_of(index), self.resolved.adapter_set
        if plan.adapters:
            assert wanted is not None
            lora = LoRARequest(**wanted.lora_request())
            request = replace(request, options={**request.options, "lora_request": lora})
            if any(use.invocation for use in plan.adapters):
                acting = invoked(plan, request.prompt_ids)
                self.resolved.invoked.update((use.stream, use.digest) for use in acting)
        if plan.best is not None:
            outputs = best_of_n.start(self, request, index)
        elif plan.search is not None:
            outputs = guided_search.start(self, request, index)
        else:
            outputs = self.run(request, plan, index, self.resolved.reports)
        return self._holding(outputs, wanted) if plan.adapters and wanted else outputs

    def run(
        self, request: EngineRequest, plan: SteeringPlan, index: int, reports: dict[int, Report]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs one prompt under a plan.

        Args:
            request: its `params` are changed in place.
            plan: complete.
            index: which of the HTTP request's prompts.
            reports: gets the report under `index`.

        Raises:
            BadValue: the lengthened prompt leaves no room in the context, or the base cannot lag
                behind it.
        """
        if not plan.steers and not plan.adapters and plan.report == "off":
            return counted(self.engine.submit(request), self._context, request.params)
        tag = f"{self.resolved.tag}-{index}" if plan.report != "off" else ""
        request, model = prepare(request, plan, tag), self.engine.model_config
        refuse_lag(request.pad, model.is_hybrid)
        self.fit(request.params, len(request.prompt_ids), request.pad, model.max_model_len)
        outputs = counted(self.engine.submit(request), self._context, request.params)
        return self._watch(outputs, request, index, reports)

    def counted(
        self, request: EngineRequest, *, again: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs a prepared request and counts its tokens.

        Args:
            request: prepared.
            again: the prompt has been counted.
        """
        outputs = self.engine.submit(request)
        return counted(outputs, self._context, request.params, again=again)

    def measured(self, report: Report) -> None:
        """Counts a report for the metrics."""
        metrics.measured(self._context, report)

    def fit(self, params: SamplingParams, prompt: int, pad: int, context: int) -> None:
        """Keeps the reply inside the context: `server.operation.limits.fit_context`."""
        resolved = self.resolved
        fit_context(
            params, resolved.max_tokens, resolved.max_tokens_field, prompt, pad, context
        )  # fmt: skip

    def _holding(
        self, outputs: AsyncGenerator[RequestOutput, None], wanted: AdapterSet
    ) -> AsyncGenerator[RequestOutput, None]:
        """Passes outputs on while the engine holds the request's adapters.

        Raises:
            NoRoom: the engine cannot take them.
        """
        residency = self.engine.residency
        assert residency is not None
        residency.check_room(wanted)
        private, served = self._context.private, self.engine.served_names
        names = [metrics.PRIVATE] if private else [a.name for a in self.resolved.adapters]

        async def held() -> AsyncGenerator[RequestOutput, None]:
            began = time.perf_counter()
            async with AsyncExitStack() as stack:
                try:
                    with served.waiting(names), metrics.WAITING.track_inprogress():
                        await stack.enter_async_context(residency.holding(wanted))
                except AdapterError as error:
                    if not passing(error):
                        raise
                    # vLLM answers an unknown error in a stream with a 500 and a traceback.
                    raise RetryableRequestError(str(error)) from error
                stack.enter_context(served.using(wanted.name, names))
                await stack.enter_async_context(aclosing(outputs))
                metrics.WAIT_SECONDS.observe(time.perf_counter() - began)
                async for output in outputs:
                    yield output

        return held()

    async def _watch(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        request: EngineRequest,
        index: int,
        reports: dict[int, Report],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Passes outputs on without the padding; fetches the report before the last one."""
        delta = request.params.output_kind == RequestOutputKind.DELTA
        tokens: dict[str, int] = {}
        taken = not request.tag
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    request.unpad(output)
                    for choice in output.outputs:
                        # Each output of a stream has what is new, each of others has all.
                        before = tokens.get(str(choice.index), 0) if delta else 0
                        tokens[str(choice.index)] = before + len(choice.token_ids)
                    if output.finished and not taken:
                        taken = True
                        reports[index] = await self.engine.report(request.tag, tokens)
                        metrics.measured(self._context, reports[index])
                    yield output
        finally:
            if not taken:
                self.engine.forget(request.tag)
