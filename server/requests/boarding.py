"""How a plan boards the engine: its prompt lengthened, its bytes packed, its cache kept apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from steering.bans import with_bans
from steering.errors import BadValue
from steering.plan import SteeringPlan
from steering.prompts import align
from steering.wire import SteeringPayload, pack


@dataclass(frozen=True, slots=True)
class Ride:
    """What `AsyncLLM.generate` takes.

    Args:
        prompt: as vLLM's front end made it, or as it boards.
        params: of the request.
        request_id: of the request.
        options: the other arguments.
    """

    prompt: Any
    params: SamplingParams
    request_id: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Boarding:
    """One request as it goes into the engine.

    Args:
        base_ids: the base's own prompt.
        pad: tokens put in front of it.
        tag: names its report; '' for none.
    """

    base_ids: list[int]
    pad: int
    tag: str

    def unpad(self, output: RequestOutput) -> None:
        """Makes an output speak of the base's own prompt."""
        if not self.pad:
            return
        output.prompt_token_ids = self.base_ids
        if output.num_cached_tokens is not None:
            output.num_cached_tokens = max(0, output.num_cached_tokens - self.pad)


def prompt_ids(prompt: Any) -> list[int]:
    """The ids of a prompt on its way to the engine.

    Raises:
        BadValue: it has none.
    """
    if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
        raise BadValue("steering needs a prompt of text or token ids", field="prompt")
    return list(prompt["prompt_token_ids"])


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


def limit_tokens(
    params: SamplingParams, asked: int | None, prompt: int, pad: int, context: int
) -> None:
    """Keeps the reply inside what the context leaves it; `params` is changed in place.

    Args:
        params: of the request.
        asked: the caller's own `max_tokens`, or None.
        prompt: tokens of the longest prompt of the request.
        pad: by how many it is longer than the base's.
        context: tokens of prompt and reply together.

    Raises:
        BadValue: there is no room, or a stream's own prompt takes what was asked for. Where the
            base's prompt does, the reply is cut, as vLLM does it.
    """
    room = context - prompt
    if room < 1:
        raise BadValue(f"the longest prompt of the request has {prompt} tokens",
                       field="steering.prompts" if pad else "prompt",
                       allowed=f"at most {context - 1}")  # fmt: skip
    if asked is not None and pad and asked > room:
        raise BadValue(f"a stream's own prompt of {prompt} tokens leaves room for {room}",
                       field="max_tokens", value=asked, allowed=f"at most {room}")  # fmt: skip
    if params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, room)


def board(
    prompt: Any, params: SamplingParams, plan: SteeringPlan, tag: str, reply: Sequence[int] = ()
) -> tuple[Any, Boarding]:
    """The prompt as the engine gets it; `params` is changed in place.

    Args:
        prompt: as vLLM's front end made it.
        params: of the request.
        plan: complete.
        tag: for its report; '' for none.
        reply: ids behind the prompt that every stream reads.
    """
    base_ids = prompt_ids(prompt)
    ids, pad = align(base_ids, plan)
    payload = SteeringPayload(plan, pad, tag, len(reply))
    params.extra_args = {**(params.extra_args or {}), **pack(payload)}
    params.logit_bias = with_bans(params.logit_bias, plan)
    prompt = {**prompt, "prompt_token_ids": [*ids, *reply]}
    if key := plan.cache_key(pad):
        prompt["cache_salt"] = salted(prompt.get("cache_salt"), key)
    return prompt, Boarding(base_ids, pad, tag)


def salted(user_salt: str | None, cache_key: str) -> str:
    """The prefix-cache salt of a steered request.

    A stream's KV is only valid for requests that ran that stream; the caller's own salt keeps
    its effect.
    """
    parts = json.dumps([user_salt, cache_key]).encode()
    return "coxswain-" + hashlib.sha256(parts).hexdigest()[:40]
