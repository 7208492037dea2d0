"""A profile's defaults for requests: sampling, and a system prompt."""

from __future__ import annotations

from typing import Any

from steering.spec import Profile

_REPLY = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""What the APIs call the length of a reply."""

_SYSTEM = ("system", "developer")


def use_profile(request: Any, profile: Profile | None) -> None:
    """Puts a profile's defaults into a body, as if the request had brought them.

    Args:
        request: a body with `steering`; changed in place.
        profile: that it names, or None.
    """
    if profile is None:
        return
    use_system(request, profile)
    for name, value in profile.sampling.model_dump(exclude_none=True).items():
        names = _REPLY if name == "max_tokens" else (name,)
        fields = [field for field in names if field in type(request).model_fields]
        if fields and not any(request.given(field) for field in fields):
            setattr(request, fields[0], value)


def use_system(request: Any, profile: Profile | None) -> None:
    """Puts a profile's system prompt in front of a conversation that has none.

    Args:
        request: a body; changed in place. A text completion is no conversation.
        profile: that it names, or None.
    """
    if profile is None or profile.system is None:
        return
    fields = type(request).model_fields
    if "messages" in fields:
        if not any(_role(message) in _SYSTEM for message in request.messages):
            request.messages = [{"role": "system", "content": profile.system}, *request.messages]
    elif "instructions" in fields and request.instructions is None:
        items = request.input if isinstance(request.input, list) else []
        if not any(_role(item) in _SYSTEM for item in items):
            request.instructions = profile.system


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
