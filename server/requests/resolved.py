"""The types of a request on its way: what came, and what it stands for. What the engine gets of it
is `server.requests.engine_request.EngineRequest`.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapters.sets import AdapterSet
from server.requests.own_prompts import Conversation
from steering.adapter_ref import AdapterRef
from steering.adapters import ResolvedAdapter
from steering.plan import SteeringPlan

Report = Mapping[str, Mapping[str, Any]]
"""What the worker measured for one prompt, by choice index (as text)."""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as it came, from any API: validated, but not yet against the server.

    Args:
        model: as the request wrote it; None or "" for the base.
        steering: its `steering` field.
        adapters: its `adapters` field.
        conversations: gives, for each prompt, its messages; None where it has none (token ids
            that are not text). Asked only where a template needs them, in a thread.
        max_tokens: asked for explicitly, or None.
        max_tokens_field: what the request calls that.
        fields: vLLM's names of its fields → its own, where they differ.
        n: choices per prompt.
        prompts: how many it has.
        beam_search: beam search, which has no place for a plan.
        prompt_logprobs: log-probabilities of the prompt are asked for.
        top_n_sigma: n of top-nσ sampling, > 0; None: without.
    """

    model: str | None
    steering: object
    adapters: Sequence[AdapterRef]
    conversations: Callable[[], Sequence[Conversation | None]]
    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    fields: Mapping[str, str] = field(default_factory=dict)
    n: int = 1
    prompts: int = 1
    beam_search: bool = False
    prompt_logprobs: bool = False
    top_n_sigma: float | None = None


@dataclass
class ResolvedRequest:
    """A request as this server understands it. One per HTTP request; owned by the event loop.

    Args:
        plans: the plan of each of the request's prompts, in order; a single one holds for all.
        profile: the profile it came from, or None.
        chat_template: the base's, if the profile brings one.
        stop_token_ids: the profile's token ids that end a reply, beside the base's own.
        max_tokens: what the caller asked for explicitly, or None.
        max_tokens_field: what the request calls that.
        n: choices per prompt.
        adapter_set: the adapters of the plans as the engine wants them; None: there are none.
        adapters: those that the request names.
        top_n_sigma: as in `ParsedRequest`.
        tag: names its reports.
        reports: prompt index → the worker's report, once the prompt is finished.
        measured: it is measured for the metrics alone: the response tells nothing of it.
        invoked: (stream, digest) of an aLoRA → in how many prompts it acts.
    """

    plans: Sequence[SteeringPlan]
    profile: str | None = None
    chat_template: str | None = None
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    n: int = 1
    adapter_set: AdapterSet | None = None
    adapters: Sequence[ResolvedAdapter] = ()
    top_n_sigma: float | None = None
    tag: str = field(default_factory=lambda: secrets.token_hex(8))
    reports: dict[int, Report] = field(default_factory=dict)
    measured: bool = False
    invoked: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def plan(self) -> SteeringPlan:
        """The first prompt's plan; the others differ in own prompts only."""
        return self.plans[0]

    @property
    def reporting(self) -> bool:
        """Whether the response gets a `steering` object."""
        return self.plan.report != "off" and not self.measured

    def measure(self) -> None:
        """Has it measured for the metrics, if it is steered and brings no report of its own."""
        if self.plan.steers and self.plan.report == "off":
            self.plans = [replace(plan, report="summary") for plan in self.plans]
            self.measured = True

    def plan_of(self, index: int) -> SteeringPlan:
        """The plan of prompt `index`."""
        return self.plans[index] if len(self.plans) > 1 else self.plans[0]
