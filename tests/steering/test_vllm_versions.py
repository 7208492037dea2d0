"""What we use of vLLM is in every version that we allow, and is called as each takes it.

`vllm_versions/` has what each version offers, made by `python -m load_tests.vllm_symbols`.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import vllm
from packaging.requirements import Requirement
from packaging.version import Version

from load_tests.vllm_symbols import differences, snapshot, versions_page
from load_tests.vllm_uses import Call, Override, Uses, find_uses
from steering.errors import DoesNotFit
from steering.versions import DIFFERENCES, VERSIONS, check_version

ROOT = Path(__file__).parents[2]
OFFERED: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text("utf-8"))
    for file in sorted((Path(__file__).parent / "vllm_versions").glob("*.json"))
}
AGAIN = "make the snapshots again: python -m load_tests.vllm_symbols"


@pytest.fixture(scope="module")
def uses() -> Uses:
    """What our sources use."""
    return find_uses(ROOT)


def lacking(uses: Uses, offered: dict[str, Any]) -> list[str]:
    """What is used and not offered."""
    symbols = offered["symbols"]
    found = [f"{file}: {symbol}" for symbol, file in uses.symbols.items() if symbol not in symbols]
    for (symbol, member), where in uses.members.items():
        entry = symbols.get(symbol, {"kind": "nothing"})
        known = entry.get("members", {})
        if entry["kind"] in ("class", "module", "nothing") and member not in known:
            found.append(f"{where}: {symbol}.{member}")
    return found


def taken(args: list[str]) -> tuple[list[str], set[str], set[str], bool, bool]:
    """(positional, required, named, takes any positional, takes any named) of an argument list."""
    plain = [a for a in args if a != "/"]
    positional = list(takewhile(lambda a: not a.startswith("*"), plain))
    named = {a.rstrip("=") for a in plain if not a.startswith("*")}
    required = {a for a in plain if not a.endswith("=") and not a.startswith("*")}
    rest = any(a.startswith("*") and len(a) > 1 and a[1] != "*" for a in plain)
    return [a.rstrip("=") for a in positional], required, named, rest, "**" in "".join(plain)


def misfit(call: Call, args: list[str]) -> str | None:
    """Why a call does not fit an argument list; None if it does."""
    positional, required, named, rest, open_ = taken(args)
    if call.count > len(positional) and not rest:
        return f"{call.where}: {call.count} positional arguments for {args}"
    unknown = {k for k in call.keywords if k != "**"} - named
    if unknown and not open_:
        return f"{call.where}: no argument {sorted(unknown)} in {args}"
    if call.count >= 0 and "**" not in call.keywords:
        given = {*positional[: call.count], *call.keywords}
        if missing := required - given:
            return f"{call.where}: {sorted(missing)} missing for {args}"
    return None


def unlike(override: Override, args: list[str]) -> str | None:
    """Why a method of ours cannot stand for one that is called as `args` allow; None if it can."""
    positional, required, named, _, _ = taken(args)
    if missing := [n for n in override.needs if n not in named]:
        return f"{override.where}: needs {missing}, and vLLM's has {args}"
    if 0 <= override.most < len([p for p in positional if p in required]):
        return f"{override.where}: takes {override.most} positional arguments of {args}"
    # Those by position may have other names; the optional ones come by name.
    unknown = named - {*override.names, *(p for p in positional if p in required)}
    if unknown and not override.open:
        return f"{override.where}: does not take {sorted(unknown)}"
    return None


@pytest.mark.parametrize("version", OFFERED)
def test_everything_that_is_used_is_there(version: str, uses: Uses) -> None:
    assert len(uses.symbols) > 100 and len(uses.members) > 100
    assert lacking(uses, OFFERED[version]) == [], AGAIN


@pytest.mark.parametrize("version", OFFERED)
def test_every_call_fits(version: str, uses: Uses) -> None:
    symbols = OFFERED[version]["symbols"]
    found = []
    for call in uses.calls:
        entry = symbols[call.symbol]
        args = entry["members"].get(call.member) if call.member else entry.get("args")
        found += [misfit(call, args)] if args is not None else []
    assert len(found) > 60 and {*found} == {None}


@pytest.mark.parametrize("version", OFFERED)
def test_every_override_fits(version: str, uses: Uses) -> None:
    symbols = OFFERED[version]["symbols"]
    found = []
    for override in uses.overrides:
        args = symbols[override.symbol]["members"].get(override.member)
        found += [unlike(override, args)] if args is not None else []
    assert len(found) > 15 and {*found} == {None}


def test_what_differs_is_known(uses: Uses) -> None:
    first, last = (OFFERED[v]["symbols"] for v in (min(OFFERED), max(OFFERED)))
    changed = differences(OFFERED[min(OFFERED)], OFFERED[max(OFFERED)])
    assert changed.keys() == DIFFERENCES.keys()
    for call in uses.calls:  # what we give by position is the same argument in both
        if call.count > 0 and not call.member and "args" in first[call.symbol]:
            before, after = (taken(v[call.symbol]["args"])[0] for v in (first, last))
            assert before[: call.count] == after[: call.count], call


def test_every_allowed_version_has_a_snapshot() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (wanted,) = map(Requirement, project["optional-dependencies"]["gpu"])
    assert wanted.name == "vllm" and all(Version(v) in wanted.specifier for v in OFFERED)
    assert [".".join(v.split(".")[:2]) for v in OFFERED] == [*VERSIONS]
    assert all(offered["version"] == v for v, offered in OFFERED.items())
    minor = int(VERSIONS[-1].split(".")[1])
    assert Version(f"0.{minor + 1}.0") not in wanted.specifier
    assert Version("0.31.9") not in wanted.specifier


@pytest.mark.slow
def test_the_installed_version_is_what_its_snapshot_says(uses: Uses) -> None:
    version = vllm.__version__.split("+")[0]
    folder = Path(vllm.__file__).parents[1]
    assert snapshot(folder, uses, version) == OFFERED[version], AGAIN
    check_version(vllm.__version__)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.3.2"])
def test_another_version_is_refused(version: str) -> None:
    with pytest.raises(DoesNotFit, match=rf"vllm: .*{version}.*allowed: 0.32 and 0.33"):
        check_version(version)
    check_version("0.33.1+cu130")


def test_the_page_tells_what_differs() -> None:
    page = (ROOT / "docs" / "reference" / "vllm-versions.md").read_text("utf-8")
    table = versions_page([OFFERED[v] for v in OFFERED], dict(DIFFERENCES))
    assert table in page, (
        "write the table again: python -m load_tests.vllm_symbols tests/steering/vllm_versions"
    )


def test_what_does_not_fit_is_seen(uses: Uses) -> None:
    """Each check fails on what it is for."""
    offered = OFFERED[max(OFFERED)]
    more = Uses({**uses.symbols, "vllm.nowhere:nothing": "a.py"}, dict(uses.members))
    more.members[("vllm.config:VllmConfig", "no_such_setting")] = "a.py:1"
    assert lacking(more, offered) == [
        "a.py: vllm.nowhere:nothing",
        "a.py:1: vllm.config:VllmConfig.no_such_setting",
    ]
    args = ["a", "b=", "*", "c"]
    call = Call("a.py:1", "s", "", 1, ("c",))
    assert misfit(call, args) is None
    for bad in (
        replace(call, count=3),
        replace(call, keywords=()),
        replace(call, keywords=("c", "d")),
        replace(call, count=0),
    ):
        assert misfit(bad, args)
    override = Override("a.py:1", "s", "m", ("a",), 2, False, ("a", "b", "c"))
    assert unlike(override, args) is None
    for other in (
        replace(override, needs=("a", "x")),
        replace(override, most=0),
        replace(override, names=("a", "b")),
    ):
        assert unlike(other, args)
