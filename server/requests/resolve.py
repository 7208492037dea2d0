"""From what came to what it stands for on this server. All checks happen here, before any answer.

The routes call `Resolver.resolve`; what it raises becomes a 4xx answer, also for streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from server.access import Access
from server.adapting.resolve import split
from server.adapting.service import Adapters
from server.context import RequestContext
from server.errors import HttpError
from server.operation.limits import check_counts
from server.pieces import shortened
from server.requests.own_prompts import Conversation, OwnPrompts
from server.requests.profiles import Profiles
from server.requests.resolved import ParsedRequest, ResolvedRequest
from server.settings.operating import LimitsConfig
from steering.adapter_ref import AdapterRef
from steering.adapters import ResolvedAdapter
from steering.errors import BadValue
from steering.method import Limits, OwnPrompt, Snapshot
from steering.phases import with_ids
from steering.placing import with_text_ids
from steering.plan import BARE
from steering.resolve import Methods, Resolved, resolve
from steering.spec import FIELD, Profile, SteeringRequest, read_steering


@dataclass(frozen=True, slots=True)
class Model:
    """Resolves a request's `model`: the base, a profile or an adapter.

    Args:
        name: as the request wrote it; None for the base.
        profile: a profile's name, or None.
        adapter: an adapter's name, with its version if the request gave one, or None.
    """

    name: str | None = None
    profile: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Resolver:
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
        most: section `limits`: what one request may take.
        aliases: more names of models, and what each stands for.
    """

    base_name: str
    methods: Methods
    profiles: Profiles
    snapshot: Snapshot
    limits: Limits
    inline: bool
    own_prompts: OwnPrompts
    adapters: Adapters | None = None
    most: LimitsConfig = field(default_factory=LimitsConfig)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def model_of(self, model: str | None, access: Access) -> Model:
        """Resolves a request's `model`: the base, a profile or an adapter.

        Raises:
            HttpError: 404, no such model for this key.
        """
        name, model = model, self.aliases.get(model, model) if model else None
        if model is None or model == self.base_name:
            return Model()
        if model in access.seen_profiles(self.profiles):
            return Model(model, profile=model)
        if self.adapters is not None and self.adapters.known(model, access):
            return Model(model, adapter=model)
        names = shortened(self.served(access))
        raise HttpError(404, f"model: no such model (got {name!r}); served: {names}",
                        param="model", code="model_not_found")  # fmt: skip

    def profile_of(self, model: str | None, steering: object, access: Access) -> Profile | None:
        """The profile that a request names by its `model` or its `steering` field; None without
        one, and where `resolve` will find fault with it.
        """
        seen = access.seen_profiles(self.profiles)
        named = steering.get("profile") if isinstance(steering, Mapping) else steering
        for name in (named, self.aliases.get(model or "", model)):
            if isinstance(name, str) and name in seen:
                return seen[name]
        return None

    def served(self, access: Access) -> list[str]:
        """Names of the models that a key may use."""
        adapters = self.adapters.names(access) if self.adapters is not None else []
        names = [self.base_name, *access.seen_profiles(self.profiles), *adapters]
        return [*names, *(name for name, target in self.aliases.items() if target in names)]

    async def resolve(self, parsed: ParsedRequest, context: RequestContext) -> ResolvedRequest:
        """The request's plans, limits checked and prompts tokenised; its adapters stay loaded until
        the context's resources are closed.

        Raises:
            HttpError: 404, no such model; 403, the key may not steer so.
            SteeringError: what is wrong with a field, or does not go together.
            NoAdapter: an adapter is not ready here.
        """
        await self.load_missing(parsed.model, parsed.adapters, context.access)
        model = self.model_of(parsed.model, context.access)
        context.model, context.method = model.name, BARE.method
        steering = self._steering(parsed, model, context.access)
        request, resolved = steering or (SteeringRequest({}, self.limits), _bare())
        if resolved.plan.phases:
            fields = resolved.phase_fields
            plan = with_ids(resolved.plan, self.own_prompts.text_ids, fields)
            resolved = replace(resolved, plan=plan)
        context.method = resolved.plan.method
        context.profile = request.profile or context.profile
        brought = self._brought(parsed, model, request)
        if self.adapters is not None:
            await self.adapters.load_profile(brought, context.access)
        resolved, result = self._with_adapters(parsed, model, request, resolved, brought, context)
        names = [(adapter.name, adapter.digest) for adapter in result.adapters]
        private = self.adapters is not None and any(self.adapters.private(n) for n, _ in names)
        context.use_adapters(names, private)
        _check(parsed, resolved)
        best, search = resolved.plan.best, resolved.plan.search
        check_counts(
            self.most, prompts=parsed.prompts, n=parsed.n,
            drawn=best.n if best else search.drawn if search else 1,
            drawn_field=f"{FIELD}.k" if search else f"{FIELD}.n",
            max_tokens=parsed.max_tokens, field=parsed.max_tokens_field,
        )  # fmt: skip
        if resolved.prompts:
            caller = context.access.caller
            result.plans = [
                resolved.with_prompts(
                    await self._ids(request, resolved.prompts, conversation, caller)
                )
                for conversation in await self._distinct(resolved, parsed)
            ]
        return result

    async def load_missing(
        self, model: str | None, refs: Sequence[AdapterRef], access: Access
    ) -> None:
        """Has adapters loaded that a request names and nobody has registered, as far as the
        configuration says so.

        Args:
            model: as the request wrote it.
            refs: its `adapters` field.
            access: what its key may use.

        Raises:
            AdapterError: one cannot be had, or not in time.
        """
        if self.adapters is None:
            return
        model = self.aliases.get(model or "", model)
        ours = not model or model == self.base_name or model in self.profiles
        await self.adapters.load_missing(
            None if ours else model, refs if self.inline else (), access
        )  # fmt: skip

    def _steering(
        self, parsed: ParsedRequest, model: Model, access: Access
    ) -> tuple[SteeringRequest, Resolved] | None:
        """The plan of the `steering` field and the profile; None without either."""
        access.check_steering(parsed.steering, model.profile)
        request = read_steering(
            parsed.steering,
            profiles=access.seen_profiles(self.profiles),
            limits=self.limits,
            inline=self.inline,
            model_profile=model.profile,
        )
        if request is None:
            return None
        return request, resolve(
            request.spec, methods=self.methods, snapshot=self.snapshot, limits=request.limits
        )

    def _with_adapters(
        self,
        parsed: ParsedRequest,
        model: Model,
        request: SteeringRequest,
        resolved: Resolved,
        brought: Sequence[tuple[str, AdapterRef]],
        context: RequestContext,
    ) -> tuple[Resolved, ResolvedRequest]:
        """The plan with the request's adapters, and with those that its profile brings."""
        profile = self.profiles.get(request.profile) if request.profile else None
        template = profile.chat_template if profile is not None else None
        plan, adapter_set = resolved.plan, None
        adapters: Sequence[ResolvedAdapter] = ()
        if parsed.adapters or brought or model.adapter is not None:
            if self.adapters is None:
                raise BadValue("this server has no adapters (its configuration lacks the section "
                               "`adapters`)", field="adapters")  # fmt: skip
            if parsed.adapters and not self.inline:
                raise BadValue("this server takes an adapter as the `model` only",
                               field="adapters")  # fmt: skip
            plan, adapter_set, adapters = self.adapters.resolve(
                plan, model.adapter, parsed.adapters, request.limits.weight, context.access,
                context.resources, brought,
            )  # fmt: skip
            plan = with_text_ids(plan, self.own_prompts.text_ids)
        stops = self.profiles.stop_token_ids(request.profile, plan) if request.profile else ()
        result = ResolvedRequest(
            [plan], request.profile, template, stops, parsed.max_tokens, parsed.max_tokens_field,
            parsed.n, adapter_set, adapters, parsed.top_n_sigma,
        )  # fmt: skip
        return replace(resolved, plan=plan), result

    def _brought(
        self, parsed: ParsedRequest, model: Model, request: SteeringRequest
    ) -> list[tuple[str, AdapterRef]]:
        """Where its profile names each adapter that the request does not name itself, and how."""
        profile = self.profiles.get(request.profile) if request.profile else None
        if profile is None or request.profile is None:
            return []
        named = {ref.adapter for ref in parsed.adapters} | {split(model.adapter or "")[0]}
        entries = [(f"profiles.{request.profile}.adapters.{i}", ref)
                   for i, ref in enumerate(profile.adapters)]  # fmt: skip
        return [(field, ref) for field, ref in entries if ref.adapter not in named]

    @staticmethod
    async def _distinct(resolved: Resolved, parsed: ParsedRequest) -> Sequence[Conversation | None]:
        """The conversations for which own prompts differ: one, unless a template renders them."""
        if any(p.chat_template is not None for p in resolved.prompts.values()):
            return await asyncio.to_thread(parsed.conversations)
        return [None]

    async def _ids(
        self,
        request: SteeringRequest,
        prompts: Mapping[str, OwnPrompt],
        conversation: Conversation | None,
        caller: str,
    ) -> dict[str, tuple[int, ...]]:
        profile = self.profiles.get(request.profile) if request.profile else None
        profile_prompts = profile.spec.get("prompts") if profile else None
        trusted = profile_prompts is not None and request.spec.get("prompts") == profile_prompts
        return await self.own_prompts.token_ids(
            prompts,
            conversation,
            field=FIELD,
            default_template=profile.chat_template if profile else None,
            trusted=trusted,
            caller=caller,
        )


def _bare() -> Resolved:
    return Resolved(BARE, MappingProxyType({}))


def _check(parsed: ParsedRequest, resolved: Resolved) -> None:
    """Refuses what does not go together.

    Raises:
        BadValue: it names the field.
    """
    plan = resolved.plan
    if parsed.beam_search and (plan.steers or plan.adapters or plan.report != "off"):
        raise BadValue("not possible together with steering or adapters", field="use_beam_search")
    if parsed.beam_search and parsed.top_n_sigma is not None:
        raise BadValue("beam search draws nothing", field="top_n_sigma", value=parsed.top_n_sigma)
    if parsed.prompt_logprobs and resolved.prompts:
        raise BadValue("log-probabilities of the prompt are undefined where a stream reads a "
                       "prompt of its own", field=f"{FIELD}.prompts")  # fmt: skip
    if parsed.prompt_logprobs and plan.valued:
        raise BadValue("log-probabilities of the prompt go with no value stream: candidates "
                       "are evaluated where a token is drawn", field=FIELD)  # fmt: skip
    if plan.best is not None and parsed.n > 1:
        raise BadValue("best_of_n returns one reply", field="n", value=parsed.n, allowed="1")
    if (plan.best or plan.search) and parsed.prompt_logprobs:
        raise BadValue("log-probabilities of the prompt go with no choice among replies",
                       field=FIELD)  # fmt: skip
