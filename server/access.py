"""The rights of an API key, and the name under which its requests are counted.

What a key may not use does not exist for it: its names are in no list and no error, and asking
for one is answered as for a name that nobody has given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from server.errors import HttpError
from server.settings.operating import Rate
from steering.spec import FIELD, OVERRIDABLE_ALWAYS

ANYONE = "anyone"
"""The caller where no API keys are configured: all clients together."""

V = TypeVar("V")


@dataclass(frozen=True)
class Access:
    """The rights of one API key. None: everything.

    Args:
        profiles: names.
        adapters: names.
        caller: fingerprint of the key.
        group: whose private adapters it uses; None: nobody's.
        salt: what keeps its prefixes apart from other groups' in the engine's cache; None: nothing.
        rate: what it may take per minute; None: what the section `limits` says.
    """

    profiles: frozenset[str] | None = None
    adapters: frozenset[str] | None = None
    caller: str = field(default=ANYONE, compare=False)
    group: str | None = field(default=None, compare=False)
    salt: str | None = field(default=None, compare=False, repr=False)
    rate: Rate | None = field(default=None, compare=False)

    @property
    def steers(self) -> bool:
        """Whether the key may send its own steering and change a profile's options."""
        return self.profiles is None

    def seen_profiles(self, profiles: Mapping[str, V]) -> Mapping[str, V]:
        """Those of the profiles that exist for it, in the same order."""
        if self.profiles is None:
            return profiles
        return {name: profile for name, profile in profiles.items() if name in self.profiles}

    def sees_adapter(self, name: str, owners: Iterable[Collection[str]]) -> bool:
        """Whether the key may see an adapter.

        Args:
            name: the adapter's.
            owners: for each content that has this name now or soon, the groups that it is private
                to; an empty one: all may use it.
        """
        named = self.adapters is None or name in self.adapters
        return named and all(not groups or self.group in groups for groups in owners)

    def check_steering(self, steering: object, profile: str | None) -> None:
        """Refuses steering of its own, and changes of a profile, to a key that is limited to some.

        Args:
            steering: the `steering` field.
            profile: the profile that the request's model is, or None.

        Raises:
            HttpError: 403.
        """
        if self.steers or not isinstance(steering, Mapping):
            return
        named = profile is not None or steering.get("profile") is not None
        changed = sorted(map(str, steering.keys() - OVERRIDABLE_ALWAYS - {"profile"}))
        if named and changed:
            raise _forbidden("This API key takes profiles as they are; of their options only "
                             "`report` may be set.", f"{FIELD}.{changed[0]}")  # fmt: skip
        if not named and (changed or not steering.keys() & OVERRIDABLE_ALWAYS):
            raise _forbidden("This API key may use its profiles only, not steering of its own.",
                             FIELD)  # fmt: skip


def _forbidden(message: str, param: str) -> HttpError:
    return HttpError(403, message, param=param, reason="forbidden")


EVERYTHING = Access()
