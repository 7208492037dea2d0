"""Finds the steering methods: our own, and those of allowed packages. Front end, once at start.

Methods are entry points of the group `coxswain.steering_methods.v1`; the group's name carries
the contract version. No code of a package is imported unless the configuration allows it, and
whatever is wrong with an allowed one stops the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, distributions, packages_distributions, version
from types import MappingProxyType
from typing import Any, get_args

from steering.method import CONTRACT_VERSION, ENTRY_POINT_GROUP, Method, MethodConfig

OURS = "coxswain"
"""Our own distribution; always allowed."""

BUILT_INS: Mapping[str, str] = MappingProxyType(
    {
        "proxy_tuning": "steering.methods.proxy_tuning:ProxyTuning",
        "emulated_fine_tuning": "steering.methods.emulated_fine_tuning:EmulatedFineTuning",
        "contrastive": "steering.methods.contrastive:Contrastive",
        "mix": "steering.methods.mix:Mix",
        "context_aware": "steering.methods.context_aware:ContextAware",
        "guidance": "steering.methods.guidance:Guidance",
        "value_augmented": "steering.methods.value_augmented:ValueAugmented",
        "critical_tokens": "steering.methods.critical_tokens:CriticalTokens",
        "best_of_n": "steering.methods.best_of_n:BestOfN",
        "guided_search": "steering.methods.guided_search:GuidedSearch",
        "dola": "steering.methods.dola:Dola",
        "sled": "steering.methods.sled:Sled",
        "select": "steering.methods.select:Select",
        "safe_decoding": "steering.methods.safe_decoding:SafeDecoding",
    }
)
"""Our own methods, as pyproject.toml registers them."""

_ANY_VERSION = ENTRY_POINT_GROUP.removesuffix(str(CONTRACT_VERSION))


class PluginError(Exception):
    """A steering plugin that must not be served; the operator's to solve. Stops the start."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One method with its origin, for listing.

    Args:
        method: the instance.
        package: name of the distribution that it comes from.
        version: that distribution's version; 'source' for ours in a source checkout.
    """

    method: Method[Any]
    package: str
    version: str


@dataclass(frozen=True)
class Registry(Mapping[str, Method[Any]]):
    """Methods by name; immutable.

    Args:
        plugins: name → method and origin.
        ignored: installed packages with steering methods that the configuration does not allow.
    """

    plugins: Mapping[str, Plugin]
    ignored: tuple[str, ...] = ()
    _methods: Mapping[str, Method[Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        plugins = MappingProxyType(dict(sorted(self.plugins.items())))
        object.__setattr__(self, "plugins", plugins)
        methods = MappingProxyType({name: plugin.method for name, plugin in plugins.items()})
        object.__setattr__(self, "_methods", methods)

    def __getitem__(self, name: str) -> Method[Any]:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)


def discover(allow: Sequence[str] = ()) -> Registry:
    """All methods that this server may serve.

    Args:
        allow: names of the distributions whose methods may load, beside our own.

    Raises:
        PluginError: an allowed distribution offers no method, or only methods of another
            contract version; two methods of one name; a method that cannot be imported or does
            not keep the contract.
    """
    allowed = {_normal(name) for name in allow}
    found = _entry_points()
    # Not from the installed entry points: those of an editable install lag behind its source.
    ours = [EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in BUILT_INS.items()]
    theirs = [e for e in found if _package(e) in allowed - {OURS}]
    for name in sorted(allowed - {OURS}):
        _refuse_absent(name, [e for e in theirs if _package(e) == name])
    plugins: dict[str, Plugin] = {}
    for entry in [*ours, *(e for e in theirs if e.group == ENTRY_POINT_GROUP)]:
        if entry.name in plugins:
            raise PluginError(
                f"two packages offer the steering method {entry.name!r}: "
                f"{plugins[entry.name].package} and {_package(entry)}; allow only one of them"
            )
        plugins[entry.name] = _plugin(entry)
    ignored = {_package(e) for e in found} - allowed - {OURS}
    return Registry(plugins, tuple(sorted(ignored)))


def _entry_points() -> list[EntryPoint]:
    """Every installed steering method's, of any contract version.

    A distribution that lies on the path twice counts where it comes first, as on import.
    """
    first = {_normal(dist.name or ""): dist for dist in reversed([*distributions()])}
    return [
        entry
        for _, dist in sorted(first.items())
        for entry in dist.entry_points
        if entry.group.startswith(_ANY_VERSION)
    ]


def _refuse_absent(package: str, entries: Iterable[EntryPoint]) -> None:
    """Raises unless `package` has an entry point of our contract version."""
    groups = sorted({entry.group for entry in entries})
    if not groups:
        raise PluginError(
            f"the configuration allows steering methods of {package}, but no installed package "
            f"of that name has any; pip install {package}, or take it off the list"
        )
    if ENTRY_POINT_GROUP not in groups:
        raise PluginError(
            f"{package} offers steering methods for another contract version "
            f"({', '.join(groups)}); this server speaks {ENTRY_POINT_GROUP}"
        )


def _plugin(entry: EntryPoint) -> Plugin:
    package = _package(entry)
    what = f"the steering method {entry.name!r} of {package}"
    try:
        loaded = entry.load()
    except ModuleNotFoundError as error:
        raise PluginError(
            f"{what} needs the module {error.name!r}, which is not installed: {_hint(error.name)}"
        ) from error
    except Exception as error:
        # Foreign code may raise anything; whatever it is, the start stops with the name on it.
        raise PluginError(f"{what} cannot be imported: {error!r}") from error
    fault = _breach(loaded, entry.name)
    if fault:
        raise PluginError(f"{what} ({entry.value}) does not keep the contract: {fault}")
    try:
        method = loaded()
    except Exception as error:
        raise PluginError(f"{what} cannot be created: {error!r}") from error
    return Plugin(method, package, entry.dist.version if entry.dist else _own_version())


def _breach(loaded: object, name: str) -> str | None:
    """What is wrong with a loaded entry point, or None."""
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        return "it is not a subclass of steering.method.Method"
    missing = sorted(getattr(loaded, "__abstractmethods__", ()))
    if missing:
        return f"it lacks {', '.join(missing)}"
    if getattr(loaded, "name", None) != name:
        return f"its name is {getattr(loaded, 'name', None)!r}, not the entry point's"
    config: Any = getattr(loaded, "config", None)
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        return "its config is not a subclass of steering.method.MethodConfig"
    if get_args(config.model_fields["method"].annotation) != (name,):
        return f"its config's field `method` is not Literal[{name!r}]"
    return None


def _hint(module: str | None) -> str:
    top = (module or "").partition(".")[0]
    providers = packages_distributions().get(top, [])
    if providers:
        return f"reinstall {', '.join(sorted(set(providers)))}"
    return f"pip install the package that provides {top!r}"


def _normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _package(entry: EntryPoint) -> str:
    return _normal(entry.dist.name) if entry.dist else OURS


def _own_version() -> str:
    try:
        return version(OURS)
    except ImportError:  # PackageNotFoundError: a source checkout
        return "source"
