"""Discovery: built-ins, allowed packages, and everything that must stop the start."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from steering import plugins
from steering.method import ENTRY_POINT_GROUP
from steering.plugins import BUILT_INS, PluginError, discover

Install = Callable[..., None]

GOOD = """
from typing import Literal
from steering.method import Method, MethodConfig
from steering.plan import Recipe

class Config(MethodConfig):
    method: Literal["toy"]

class Toy(Method):
    name = "toy"
    config = Config
    def resolve(self, config, snapshot):
        return Recipe({"base": 1.0})
    def reference(self, config, logits):
        return logits["base"]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that puts a distribution of one module on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(
        package: str,
        source: str = GOOD,
        entry: str = "toy = {module}:Toy",
        group: str = ENTRY_POINT_GROUP,
    ) -> None:
        module = package.replace("-", "_").replace(".", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry.format(module=module)}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


def test_built_ins_are_always_there() -> None:
    registry = discover()
    assert registry.keys() == BUILT_INS.keys()
    assert all(registry[name].name == name for name in registry)
    assert {plugin.package for plugin in registry.plugins.values()} == {"coxswain"}


def test_built_ins_are_those_that_the_package_registers() -> None:
    root = Path(plugins.__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][ENTRY_POINT_GROUP] == dict(BUILT_INS)


def test_a_source_checkout_has_the_built_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(plugins, "distributions", list)
    monkeypatch.setattr(plugins, "version", absent)
    registry = discover()
    assert registry.keys() == BUILT_INS.keys()
    assert registry.plugins["mix"].version == "source"


def test_an_allowed_package_is_served(install: Install) -> None:
    install("Some.Toy-Package")
    registry = discover(allow=["some_toy.package"])
    assert registry["toy"].name == "toy"
    plugin = registry.plugins["toy"]
    assert (plugin.package, plugin.version) == ("some-toy-package", "1.2")
    assert registry.ignored == ()


def test_a_package_that_is_not_allowed_is_not_even_imported(install: Install) -> None:
    install("toy-package", source="raise SystemExit('imported')")
    registry = discover()
    assert "toy" not in registry
    assert registry.ignored == ("toy-package",)


def test_the_registry_cannot_be_changed() -> None:
    registry = discover()
    with pytest.raises(TypeError):
        registry.plugins["toy"] = registry.plugins["mix"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        registry.plugins = {}  # type: ignore[misc]


def test_an_allowed_package_that_is_absent_stops_the_start() -> None:
    with pytest.raises(PluginError, match="pip install no-such-package"):
        discover(allow=["no-such-package"])


@pytest.mark.parametrize("version", ["v2", "v0", "v10"])
def test_another_contract_version_is_refused_by_name(install: Install, version: str) -> None:
    group = f"coxswain.steering_methods.{version}"
    install("toy-package", group=group)
    with pytest.raises(PluginError, match=f"toy-package .*{group}.* speaks {ENTRY_POINT_GROUP}"):
        discover(allow=["toy-package"])


@pytest.mark.parametrize(
    ("source", "entry", "match"),
    [
        ("import no_such_module.part", "toy = {module}:Toy", "'no_such_module'.*pip install"),
        ("import numpy.no_such_part", "toy = {module}:Toy", "reinstall numpy"),
        ("1 / 0", "toy = {module}:Toy", "ZeroDivisionError"),
        (GOOD, "toy = {module}:Missing", "Missing"),
        (GOOD, "toy = {module}:Recipe", "not a subclass of steering.method.Method"),
        (GOOD, "other = {module}:Toy", "its name is 'toy'"),
        (GOOD.replace('Literal["toy"]', "str"), "toy = {module}:Toy", "Literal"),
        (GOOD.replace("(MethodConfig)", ""), "toy = {module}:Toy", "subclass of .*MethodConfig"),
        (GOOD.replace("def reference", "def other"), "toy = {module}:Toy", "lacks reference"),
        (GOOD + "    def __init__(self, x): pass", "toy = {module}:Toy", "cannot be created"),
    ],
)
def test_a_broken_plugin_stops_the_start(
    install: Install, source: str, entry: str, match: str
) -> None:
    install("toy-package", source=source, entry=entry)
    with pytest.raises(PluginError, match=match) as caught:
        discover(allow=["toy-package"])
    assert "toy-package" in str(caught.value)


def test_two_methods_of_one_name_stop_the_start(install: Install) -> None:
    install("toy-one")
    install("toy-two")
    assert "toy" in discover(allow=["toy-one"])
    with pytest.raises(PluginError, match="toy-one and toy-two"):
        discover(allow=["toy-one", "toy-two"])


def test_a_built_in_cannot_be_replaced(install: Install) -> None:
    install("toy-package", source=GOOD.replace("toy", "mix"), entry="mix = {module}:Toy")
    with pytest.raises(PluginError, match="coxswain and toy-package"):
        discover(allow=["toy-package"])
