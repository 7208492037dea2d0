"""What an API key may use, and the name under which its requests are counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.errors import HttpError
from server.settings.operating import Rate

ANYONE = "anyone"
"""The caller where no API keys are configured: all clients together."""


@dataclass(frozen=True)
class Access:
    """The rights of one API key. None: everything.

    Args:
        profiles: names.
        adapters: names.
        caller: fingerprint of the key.
        rate: what it may take per minute; None: what the section `limits` says.
    """

    profiles: frozenset[str] | None = None
    adapters: frozenset[str] | None = None
    caller: str = field(default=ANYONE, compare=False)
    rate: Rate | None = field(default=None, compare=False)

    def check_steering(self, profile: str | None) -> None:
        """Lets steering pass or raises.

        Args:
            profile: where it comes from; None: it is the caller's own.

        Raises:
            HttpError: 403.
        """
        if self.profiles is None or profile in self.profiles:
            return
        if profile is None:
            raise HttpError(403, "This API key may use its profiles only, not steering of its "
                            "own.", param="steering", reason="forbidden")  # fmt: skip
        raise HttpError(403, f"This API key may not use the profile {profile!r}.",
                        param="steering", reason="forbidden")  # fmt: skip

    def check_adapter(self, name: str) -> None:
        """Lets an adapter pass or raises.

        Raises:
            HttpError: 403.
        """
        if self.adapters is not None and name not in self.adapters:
            raise HttpError(403, f"This API key may not use the adapter {name!r}.",
                            param="adapters", reason="forbidden")  # fmt: skip


EVERYTHING = Access()
