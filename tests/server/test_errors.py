"""The one table from error classes to HTTP statuses."""

from __future__ import annotations

import pytest

import adapters.errors
from adapters.errors import AdapterError
from server.errors import from_adapters, response

EXPECTED = {
    "ServerFault": 500, "RankFault": 500,
    "EngineAway": 503,
    "NoAdapter": 404, "Conflict": 409, "TooLarge": 413, "BadAdapter": 422, "DoesNotFit": 422,
    "BadSource": 400, "StoreFull": 507, "NoRoom": 503, "SourceAway": 503, "RegistryAway": 503,
    "FilesLost": 503, "AdapterError": 422,
}  # fmt: skip


def test_every_adapter_error_has_its_status() -> None:
    classes = {
        name: kind
        for name, kind in vars(adapters.errors).items()
        if isinstance(kind, type) and issubclass(kind, AdapterError)
    }
    assert {n: from_adapters(k("x", field="f")).status for n, k in classes.items()} == EXPECTED


@pytest.mark.parametrize("name", ["SourceAway", "RegistryAway"])
def test_what_may_pass_says_when_to_try_again(name: str) -> None:
    found = from_adapters(getattr(adapters.errors, name)("gone"))
    assert found.param is None
    assert int(response(found, "/v1/models").headers["retry-after"]) > 0
