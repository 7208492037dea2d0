"""Carries a plan on a vLLM request: `SamplingParams.extra_args[KEY]`, and back."""

from __future__ import annotations

from typing import Any

import msgspec

from steering.plan import SteeringPlan

KEY = "coxswain"
"""The key in `SamplingParams.extra_args`."""

TOP_N_SIGMA = "coxswain_top_n_sigma"
"""The key beside it: n > 0 of a request that is drawn by top-nσ (`steering.kernels.truncation`)."""

FIELDS = {KEY: "steering", TOP_N_SIGMA: "top_n_sigma"}
"""Key → the request's field that stands for it."""


class SteeringPayload(msgspec.Struct, frozen=True):
    """The data that travels with one vLLM request.

    Args:
        plan: the resolved plan.
        pad: tokens put in front of the base's prompt so that the longest stream prompt fits.
        tag: names the request in reports; '' when nothing is reported.
        reply: tokens at the end of the request's prompt that are an earlier reply: every stream
            reads them behind its own prompt.
        salt: of the prefix cache, as it would be without the plan.
    """

    plan: SteeringPlan
    pad: int = 0
    tag: str = ""
    reply: int = 0
    salt: str | None = None

    def untouched_tokens(self, prompt_len: int) -> int:
        """How many leading tokens have the base's own KV: those in front of an aLoRA's invocation.

        Args:
            prompt_len: as for `shared_tokens`.
        """
        plan = self.plan
        alone = not plan.streams and not plan.prompts and not self.pad and plan.runs_base
        if not alone or not plan.adapters or not all(use.invocation for use in plan.adapters):
            return 0
        return prompt_len - max(where.last for use in plan.adapters for where in use.where)

    def shared_tokens(self, prompt_len: int) -> int | None:
        """How many leading tokens' KV blocks the request may share; None for no limit.

        The length of the shortest prompt, if any stream's is shorter than the request's: the
        stream writes the KV of its response into blocks that the request has left already. And no
        more than have the same KV in every longer prompt that begins so: an adapter may act on the
        prompt and not on the reply, which the next prompt of a conversation contains.

        Args:
            prompt_len: tokens of the vLLM request's prompt, padding included, without `reply`.
        """
        own = {name: len(ids) for name, ids in self.plan.prompts}
        lengths = [prompt_len - self.pad, *own.values()]
        found = [min(lengths)] if min(lengths) < prompt_len else []
        for use in self.plan.adapters:
            length = own.get(use.stream, prompt_len - self.pad)
            alike = (where.shared(length) for where in use.where)
            found += [tokens for tokens in alike if tokens is not None]
        return min(found, default=None)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SteeringPayload)


def pack(payload: SteeringPayload) -> dict[str, Any]:
    """The entry to merge into `extra_args`."""
    return {KEY: _encoder.encode(payload)}


def unpack(extra_args: dict[str, Any] | None) -> SteeringPayload | None:
    """The payload of a request, or None for a request that carries none."""
    data = (extra_args or {}).get(KEY)
    return None if data is None else _decoder.decode(data)
