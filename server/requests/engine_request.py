"""Prepares a request for the engine: pads the prompt, packs the plan, salts the prefix cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from steering.bans import banned, with_bans
from steering.errors import BadValue
from steering.phases import begun
from steering.placing import placed
from steering.plan import SteeringPlan
from steering.prompts import align
from steering.wire import FIELDS, TOP_N_SIGMA, SteeringPayload, pack


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt as `AsyncLLM.generate` takes it, and what is undone on its outputs.

    Args:
        prompt: token ids with what vLLM's front end knows of them.
        params: of the request.
        id: of the request.
        options: the other arguments.
        base_ids: the base's own prompt.
        pad: tokens put in front of it.
        tag: names its report; '' for none.
    """

    prompt: Any
    params: SamplingParams
    id: str
    options: Mapping[str, Any]
    base_ids: Sequence[int] = ()
    pad: int = 0
    tag: str = ""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's token ids.

        Raises:
            BadValue: it has none.
        """
        if not isinstance(self.prompt, dict) or "prompt_token_ids" not in self.prompt:
            raise BadValue("steering needs a prompt of text or token ids", field="prompt")
        return list(self.prompt["prompt_token_ids"])

    def unpad(self, output: RequestOutput) -> None:
        """Makes an output speak of the base's own prompt."""
        if not self.pad:
            return
        output.prompt_token_ids = list(self.base_ids)
        if output.num_cached_tokens is not None:
            output.num_cached_tokens = max(0, output.num_cached_tokens - self.pad)


def prepare(
    request: EngineRequest, plan: SteeringPlan, tag: str, reply: Sequence[int] = ()
) -> EngineRequest:
    """Puts a plan into a request; its `params` are changed in place.

    Args:
        request: as vLLM's front end made it.
        plan: complete.
        tag: for its report; '' for none.
        reply: ids behind the prompt that every stream reads.

    Raises:
        BadValue: the prompt has no token ids.
    """
    base_ids, params = request.prompt_ids, request.params
    plan = placed(begun(plan, base_ids), base_ids)
    ids, pad = align(base_ids, plan)
    salt = request.prompt.get("cache_salt")
    payload = SteeringPayload(plan, pad, tag, len(reply), salt)
    params.extra_args = {**(params.extra_args or {}), **pack(payload)}
    params.logit_bias = with_bans(params.logit_bias, plan)
    prompt = {**request.prompt, "prompt_token_ids": [*ids, *reply]}
    if key := plan.cache_key(pad):
        prompt["cache_salt"] = salted(salt, key)
    return replace(request, prompt=prompt, base_ids=base_ids, pad=pad, tag=tag)


def refuse_keys(args: Any) -> None:
    """Refuses arguments of the engine in which plans and what goes with them travel.

    Args:
        args: a request's `vllm_xargs`, or what became of them.

    Raises:
        BadValue: the place is taken.
    """
    for key, field in FIELDS.items() if isinstance(args, Mapping) else ():
        if key in args:
            raise BadValue(f"use the `{field}` field", field=f"vllm_xargs.{key}")


def truncate(params: SamplingParams, n: float) -> None:
    """Has a request drawn by top-nσ; `params` is changed in place.

    A banned id is in no standard deviation.

    Args:
        params: of the request.
        n: > 0.
    """
    params.extra_args = {**(params.extra_args or {}), TOP_N_SIGMA: n}
    if params.logit_bias is not None:
        params.logit_bias = banned(params.logit_bias)


def end_at(params: SamplingParams, ids: Sequence[int]) -> None:
    """Lets more tokens end a reply, as the model's own end does; `params` is changed in place.

    Args:
        params: of a request; nothing is changed where it ignores the model's own end.
        ids: tokens of the base.
    """
    if ids and not params.ignore_eos:
        params.stop_token_ids = [*dict.fromkeys([*(params.stop_token_ids or ()), *ids])]
        params._all_stop_token_ids |= set(ids)


def refuse_lag(pad: int, hybrid: bool) -> None:
    """Refuses own prompts that the base would lag behind, if its layers keep a state.

    Args:
        pad: by how many tokens the longest prompt of the request is longer than the base's.
        hybrid: whether the base is such a model.

    Raises:
        BadValue: the base would lag.
    """
    if hybrid and pad:
        raise BadValue(
            f"a stream's own prompt has {pad} tokens more than the base's; this base keeps a state "
            "that cannot lag behind a longer prompt",
            field="steering.prompts",
            allowed="prompts that are not longer than the base's",
        )


def keep_apart(request: EngineRequest, salt: str | None) -> EngineRequest:
    """Keeps a request's prefixes from those of other tenants, so that neither times nor
    `cached_tokens` tell what they asked.

    Args:
        request: as vLLM's front end made it.
        salt: of the caller's group; None: there are no tenants.
    """
    if salt is None:
        return request
    if not isinstance(request.prompt, dict):
        raise TypeError(f"a prompt without a place for a salt: {type(request.prompt).__name__}")
    cache_salt = salted(request.prompt.get("cache_salt"), salt)
    return replace(request, prompt={**request.prompt, "cache_salt": cache_salt})


def salted(salt: str | None, key: str) -> str:
    """The prefix-cache salt of a request: a cached block answers only where salt and key are equal.

    A stream's KV is only valid for requests that ran that stream, and a tenant's for that tenant;
    the caller's own salt keeps its effect.

    Args:
        salt: the request's before; None: none.
        key: what is to be kept apart.
    """
    parts = json.dumps([salt, key]).encode()
    return "coxswain-" + hashlib.sha256(parts).hexdigest()[:40]
