"""From an HTTP request to its resolved steering. All checks happen here, before any answer.

The routes call `Steerer.prepare`; what it raises becomes a 4xx answer, also for streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

from adapters.sets import AdapterSet
from server.adapting.choice import AdapterWish, Picked
from server.adapting.service import Adapters
from server.errors import HttpError
from server.operation.auth import access
from server.requests.own_prompts import Conversation, OwnPrompts
from server.requests.profiles import Profiles
from server.requests.steered import Steered
from steering.errors import BadValue
from steering.method import Limits, OwnPrompt, Snapshot
from steering.plan import BARE
from steering.resolve import Methods, Resolved, resolve
from steering.spec import FIELD, OVERRIDABLE_ALWAYS, Wish, read_wish
from steering.wire import KEY


class Asking(Protocol):
    """What a request of any route has."""

    model: str | None
    steering: Any
    vllm_xargs: Any

    @property
    def adapters(self) -> Sequence[AdapterWish] | None:
        """Its `adapters` field."""
        ...


@dataclass(frozen=True, slots=True)
class Model:
    """What a request's `model` stands for.

    Args:
        name: as the request wrote it; None for the base.
        profile: a profile's name, or None.
        adapter: an adapter's name, with its version if the request gave one, or None.
    """

    name: str | None = None
    profile: str | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, its own prompts not yet tokenised.

    Args:
        wish: its steering.
        resolved: its plan, with its adapters.
        found: the adapters as the engine wants them, or None.
        picked: the adapters that it names.
    """

    wish: Wish
    resolved: Resolved
    found: AdapterSet | None = None
    picked: Sequence[Picked] = ()


@dataclass(frozen=True, slots=True)
class Traits:
    """What steering must know about a request beside its `steering` field.

    Args:
        conversations: gives, for each prompt, its messages; None where it has none (token ids
            that are not text). Asked only where a template needs them, in a thread.
        max_tokens: asked for explicitly, or None.
        n: choices per prompt.
        prompts: how many it has.
        beam_search: beam search, which has no place for a plan.
        prompt_logprobs: log-probabilities of the prompt are asked for.
    """

    conversations: Callable[[], Sequence[Conversation | None]]
    max_tokens: int | None = None
    n: int = 1
    prompts: int = 1
    beam_search: bool = False
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Steerer:
    """Resolves what requests ask for. One per server; owned by the event loop.

    Args:
        base_name: what clients call the base.
        methods: the installed methods.
        profiles: the profiles.
        snapshot: the streams.
        limits: the server's ranges.
        inline: callers may bring methods of their own.
        own_prompts: tokenises prompts of streams.
        adapters: the server's; None: it has none.
    """

    base_name: str
    methods: Methods
    profiles: Profiles
    snapshot: Snapshot
    limits: Limits
    inline: bool
    own_prompts: OwnPrompts
    adapters: Adapters | None = None

    def model_of(self, model: str | None) -> Model:
        """What a request's `model` stands for.

        Raises:
            HttpError: 404, no such model; 403, the key may not use it.
        """
        if not model or model == self.base_name:
            return Model()
        if model in self.profiles:
            access.get().check_steering(model)
            return Model(model, profile=model)
        if self.adapters is not None and self.adapters.known(model):
            return Model(model, adapter=model)
        known = ", ".join(self.served())
        raise HttpError(404, f"model: no such model (got {model!r}); served: {known}",
                        param="model", code="model_not_found")  # fmt: skip

    def served(self) -> list[str]:
        """Names of the models that the current request's key may use."""
        allowed = access.get()
        profiles = [n for n in self.profiles if allowed.profiles is None or n in allowed.profiles]
        names = self.adapters.names if self.adapters is not None else []
        adapters = [n for n in names if allowed.adapters is None or n in allowed.adapters]
        return [self.base_name, *profiles, *adapters]

    def resolve(self, request: Asking, held: ExitStack) -> Asked | None:
        """The request's plan without its own prompts; None if it asks for nothing but the base.

        Args:
            request: what came.
            held: keeps its adapters loaded until it is closed.

        Raises:
            HttpError: 404, no such model; 403, the key may not use this steering or adapter.
            SteeringError: what is wrong with the `steering` or the `adapters` field.
            NoAdapter: an adapter is not ready here.
        """
        model = self.model_of(request.model)
        wished = self._steering(request, model)
        wishes = list(request.adapters or ())
        if not wishes and model.adapter is None:
            return Asked(*wished) if wished is not None else None
        if self.adapters is None:
            raise BadValue("this server has no adapters (its configuration lacks the section "
                           "`adapters`)", field="adapters")  # fmt: skip
        if wishes and not self.inline:
            raise BadValue("this server takes an adapter as the `model` only", field="adapters")
        bare = (Wish({}, self.limits), Resolved(BARE, MappingProxyType({})))
        wish, resolved = wished or bare
        plan, found, picked = self.adapters.board(
            resolved.plan, model.adapter, wishes, wish.limits.weight, held
        )
        return Asked(wish, replace(resolved, plan=plan), found, picked)

    def _steering(self, request: Asking, model: Model) -> tuple[Wish, Resolved] | None:
        """The plan of the `steering` field and the profile; None without either."""
        if isinstance(request.vllm_xargs, Mapping) and KEY in request.vllm_xargs:
            raise BadValue("use the `steering` field", field=f"vllm_xargs.{KEY}")
        wish = read_wish(
            request.steering,
            profiles=self.profiles,
            limits=self.limits,
            inline=self.inline,
            model_profile=model.profile,
        )
        if wish is None:
            return None
        if wish.profile is not None or wish.spec.keys() != OVERRIDABLE_ALWAYS:
            access.get().check_steering(wish.profile)
        resolved = resolve(
            wish.spec, methods=self.methods, snapshot=self.snapshot, limits=wish.limits
        )
        return wish, resolved

    async def prepare(self, asked: Asked, traits: Traits) -> Steered:
        """The complete steering of a request: limits of combination checked, prompts tokenised.

        Raises:
            SteeringError: something that does not go together, or a prompt that does not fit.
        """
        wish, resolved, plan = asked.wish, asked.resolved, asked.resolved.plan
        if traits.beam_search and (plan.steers or plan.adapters or plan.report != "off"):
            raise BadValue("not possible together with steering or adapters",
                           field="use_beam_search")  # fmt: skip
        if traits.prompt_logprobs and resolved.prompts:
            raise BadValue("log-probabilities of the prompt are undefined where a stream reads a "
                           "prompt of its own", field=f"{FIELD}.prompts")  # fmt: skip
        if traits.prompt_logprobs and plan.values is not None:
            raise BadValue("log-probabilities of the prompt go with no value stream: candidates "
                           "are evaluated where a token is drawn", field=FIELD)  # fmt: skip
        if plan.best is not None and traits.n > 1:
            raise BadValue("best_of_n returns one reply", field="n", value=traits.n, allowed="1")
        if plan.best is not None and traits.prompt_logprobs:
            raise BadValue("log-probabilities of the prompt go with no choice among replies",
                           field=FIELD)  # fmt: skip
        plans = [resolved.plan]
        if resolved.prompts:
            plans = [
                resolved.with_prompts(await self._ids(wish, resolved.prompts, conversation))
                for conversation in await self._distinct(resolved, traits)
            ]
        return Steered(plans, wish.profile, traits.max_tokens, traits.n, asked.found, asked.picked)

    @staticmethod
    async def _distinct(resolved: Resolved, traits: Traits) -> Sequence[Conversation | None]:
        """The conversations for which own prompts differ: one, unless a template renders them."""
        if any(p.chat_template is not None for p in resolved.prompts.values()):
            return await asyncio.to_thread(traits.conversations)
        return [None]

    async def _ids(
        self, wish: Wish, prompts: Mapping[str, OwnPrompt], conversation: Conversation | None
    ) -> dict[str, tuple[int, ...]]:
        profile = self.profiles.get(wish.profile) if wish.profile else None
        given = profile.spec.get("prompts") if profile else None
        trusted = given is not None and wish.spec.get("prompts") == given
        return await self.own_prompts.token_ids(
            prompts,
            conversation,
            field=FIELD,
            default_template=profile.chat_template if profile else None,
            trusted=trusted,
        )
