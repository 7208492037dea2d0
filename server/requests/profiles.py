"""The profiles: the configuration's (read-only) and those put over the admin API (in memory)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from pydantic import ValidationError

from server.checks.templates import check_profile_templates
from server.errors import HttpError
from server.settings.config import NAME
from server.validation import problems
from steering.errors import BadValue, NotFound
from steering.method import Limits, Snapshot
from steering.plan import SteeringPlan
from steering.resolve import Methods, Resolved, check_profile
from steering.spec import Profile

MOST = 1000
"""Profiles that may be put at run time: each is a metric label and a model card."""

Origin = Literal["config", "admin"]


class Profiles(Mapping[str, Profile]):
    """Profiles by name. Touched from the event loop only.

    Args:
        configured: the configuration's.
        base_name: what clients call the base; no profile may have this name.
        aliases: more names that are taken.
        methods: the installed methods.
        snapshot: the server's streams.
        limits: the server's ranges.
        vocabulary: rows of the base's embedding table; None: unknown.
        end_tokens: by stream, the tokens of the base that end the stream's texts and not the
            base's.

    Raises:
        SteeringError: a profile that cannot be resolved, with fields under `profiles.<name>`.
    """

    def __init__(
        self,
        configured: Mapping[str, Profile],
        *,
        base_name: str,
        methods: Methods,
        snapshot: Snapshot,
        limits: Limits,
        aliases: Collection[str] = (),
        vocabulary: int | None = None,
        end_tokens: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        self._aliases = aliases
        self._configured = dict(configured)
        self._put: dict[str, Profile] = {}
        self._base_name = base_name
        self._methods, self._snapshot, self._limits = methods, snapshot, limits
        self._vocabulary, self._end_tokens = vocabulary, end_tokens
        for name, profile in self._configured.items():
            self._check(name, profile)

    def __getitem__(self, name: str) -> Profile:
        return self._configured.get(name) or self._put[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._configured
        yield from self._put

    def __len__(self) -> int:
        return len(self._configured) + len(self._put)

    def stop_token_ids(self, name: str, plan: SteeringPlan | None = None) -> tuple[int, ...]:
        """The tokens that end replies of a profile, beside the base's own; by rising id.

        Args:
            name: of the profile.
            plan: of a request with it; None: the profile's own.
        """
        profile = self[name]
        if profile.stop_token_ids is not None:
            return profile.stop_token_ids
        terms = (plan or self._check(name, profile).plan).terms
        token_ids = {
            end for stream, c in terms if c > 0 for end in self._end_tokens.get(stream, ())
        }
        return tuple(sorted(token_ids))

    def origin(self, name: str) -> Origin:
        """Where a profile comes from."""
        return "config" if name in self._configured else "admin"

    def put(self, name: str, document: object) -> bool:
        """Adds or replaces a profile.

        Args:
            name: as clients will write it.
            document: the profile as JSON.

        Returns:
            Whether it is new.

        Raises:
            HttpError: 409, the configuration owns the name, or it is the base's.
            SteeringError: the profile is not valid.
        """
        if not NAME.fullmatch(name):
            raise BadValue("not a usable name", field="name", value=name,
                           allowed="letters, digits, . _ : -; at most 64 characters")  # fmt: skip
        if name == self._base_name:
            raise HttpError(409, f"{name!r} is the name of the base model.", param="name")
        if name in self._aliases:
            raise HttpError(409, f"{name!r} is an alias of the configuration.", param="name")
        self._refuse_configured(name)
        if name not in self._put and len(self._put) >= MOST:
            raise HttpError(409, f"There are {MOST} profiles already; delete one first.")
        try:
            profile = Profile.model_validate(document)
        except ValidationError as error:
            raise problems([dict(e) for e in error.errors()], f"profiles.{name}")[0] from None
        self._check(name, profile)
        new = name not in self._put
        self._put[name] = profile
        return new

    def delete(self, name: str) -> None:
        """Forgets a profile; requests under way keep their plan.

        Raises:
            HttpError: 409, the configuration owns it.
            NotFound: there is none.
        """
        if name in self._aliases:
            raise HttpError(409, f"{name!r} is an alias of the configuration.", param="name")
        self._refuse_configured(name)
        if name not in self._put:
            raise NotFound("no such profile", field="name", value=name)
        del self._put[name]

    def _refuse_configured(self, name: str) -> None:
        if name in self._configured:
            raise HttpError(409, f"The profile {name!r} is in the configuration file: change it "
                            "there and restart.", param="name")  # fmt: skip

    def _check(self, name: str, profile: Profile) -> Resolved:
        resolved = check_profile(
            name, profile, methods=self._methods, snapshot=self._snapshot, limits=self._limits
        )
        check_profile_templates(name, profile, resolved)
        for i, end in enumerate(profile.stop_token_ids or ()):
            if self._vocabulary is not None and end >= self._vocabulary:
                raise BadValue("no token of the base", value=end, allowed=f"< {self._vocabulary}",
                               field=f"profiles.{name}.stop_token_ids.{i}")  # fmt: skip
        return resolved
