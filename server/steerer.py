"""From an HTTP request to its resolved steering. All checks happen here, before any answer.

The routes call `Steerer.prepare`; what it raises becomes a 4xx answer, also for streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.auth import access
from server.errors import HttpError
from server.own_prompts import Conversation, OwnPrompts
from server.profiles import Profiles
from server.steered import Steered
from steering.errors import BadValue
from steering.method import Limits, OwnPrompt, Snapshot
from steering.resolve import Methods, Resolved, resolve
from steering.spec import FIELD, Wish, read_wish
from steering.wire import KEY


class Asking(Protocol):
    """What a request of any route has."""

    model: str | None
    steering: Any
    vllm_xargs: Any


@dataclass(frozen=True, slots=True)
class Traits:
    """What steering must know about a request beside its `steering` field.

    Args:
        conversations: gives, for each prompt, its messages; None where it has none (token ids
            that are not text). Asked only where a template needs them, in a thread.
        max_tokens: asked for explicitly, or None.
        n: choices per prompt.
        beam_search: beam search, which has no place for a plan.
        prompt_logprobs: log-probabilities of the prompt are asked for.
    """

    conversations: Callable[[], Sequence[Conversation | None]]
    max_tokens: int | None = None
    n: int = 1
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
    """

    base_name: str
    methods: Methods
    profiles: Profiles
    snapshot: Snapshot
    limits: Limits
    inline: bool
    own_prompts: OwnPrompts

    def profile_of_model(self, model: str | None) -> str | None:
        """The profile that a request names as its model; None for the base.

        Raises:
            HttpError: 404, no such model; 403, the key may not use it.
        """
        if not model or model == self.base_name:
            return None
        if model in self.profiles:
            access.get().check_steering(model)
            return model
        known = ", ".join([self.base_name, *self.profiles])
        raise HttpError(404, f"model: no such model (got {model!r}); served: {known}",
                        param="model", code="model_not_found")  # fmt: skip

    def resolve(self, request: Asking) -> tuple[Wish, Resolved] | None:
        """The request's plan without its own prompts; None if it asks for no steering.

        Raises:
            HttpError: 404, no such model; 403, the key may not use this steering.
            SteeringError: what is wrong with the `steering` field.
        """
        if isinstance(request.vllm_xargs, Mapping) and KEY in request.vllm_xargs:
            raise BadValue("use the `steering` field", field=f"vllm_xargs.{KEY}")
        wish = read_wish(
            request.steering,
            profiles=self.profiles,
            limits=self.limits,
            inline=self.inline,
            model_profile=self.profile_of_model(request.model),
        )
        if wish is None:
            return None
        access.get().check_steering(wish.profile)
        resolved = resolve(
            wish.spec, methods=self.methods, snapshot=self.snapshot, limits=wish.limits
        )
        return wish, resolved

    async def prepare(self, wish: Wish, resolved: Resolved, traits: Traits) -> Steered:
        """The complete steering of a request: limits of combination checked, prompts tokenised.

        Raises:
            SteeringError: something that does not go together, or a prompt that does not fit.
        """
        plan = resolved.plan
        if traits.beam_search and (plan.steers or plan.report != "off"):
            raise BadValue("not possible together with steering", field="use_beam_search")
        if traits.prompt_logprobs and resolved.prompts:
            raise BadValue("log-probabilities of the prompt are undefined where a stream reads a "
                           "prompt of its own", field=f"{FIELD}.prompts")  # fmt: skip
        plans = [resolved.plan]
        if resolved.prompts:
            plans = [
                resolved.with_prompts(await self._ids(wish, resolved.prompts, conversation))
                for conversation in await self._distinct(resolved, traits)
            ]
        return Steered(plans, wish.profile, traits.max_tokens, traits.n)

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
