"""Carries a plan on a vLLM request: `SamplingParams.extra_args[KEY]`, and back."""

from __future__ import annotations

from typing import Any

import msgspec

from steering.plan import SteeringPlan

KEY = "coxswain"
"""The key in `SamplingParams.extra_args`."""


class Freight(msgspec.Struct, frozen=True):
    """What travels with one vLLM request.

    Args:
        plan: the resolved plan.
        pad: tokens put in front of the base's prompt so that the longest stream prompt fits.
        tag: names the request in reports; '' when nothing is reported.
    """

    plan: SteeringPlan
    pad: int = 0
    tag: str = ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Freight)


def pack(freight: Freight) -> dict[str, Any]:
    """The entry to merge into `extra_args`."""
    return {KEY: _encoder.encode(freight)}


def unpack(extra_args: dict[str, Any] | None) -> Freight | None:
    """The freight of a request, or None for a request that carries none."""
    data = (extra_args or {}).get(KEY)
    return None if data is None else _decoder.decode(data)
