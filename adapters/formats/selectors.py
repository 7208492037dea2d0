"""Which layers a PEFT config names, and with what rank and alpha, by PEFT's own rules.

As `check_target_module_exists` and `get_pattern_key` of peft 0.21.2 (Apache-2.0). PEFT drops
tensors of layers that the config leaves out without a word; we refuse them, and say which key left
them out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from adapters.errors import BadAdapter
from adapters.formats.config import bad_key
from adapters.formats.patterns import Budget, Pattern, PatternError

ALL_LINEAR = "all-linear"
"""A `target_modules` that names every linear layer but the read-out."""

READ_OUTS = ("lm_head", "embed_out")
"""Last names of layers that turn hidden states into scores."""

UNNAMED = "must name the layers: without it PEFT takes those that it lists for the model's type"

_LONGEST_NAME = 300
"""Letters of a layer's name."""

_PLAIN = re.compile(r"[\w.]+")

_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
"""PEFT's own, for a config without `layers_pattern`: the first number is the layer's."""

Rule = Callable[[str], bool]


class Selectors:
    """The keys of a config that choose layers.

    Args:
        config: the adapter's.
        keys: those of the four that its kind has.

    Raises:
        BadAdapter: PEFT refuses the config, or an expression is broken or too costly.
    """

    def __init__(self, config: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        self._config, self.budget = config, Budget()
        options = {key: config.get(key) for key in keys}
        targets = options["target_modules"]
        self._target = _by_name(targets, "target_modules", self.budget)
        if self._target is None:
            raise bad_key("target_modules", UNNAMED, targets)
        self._excluded = _by_name(options.get("exclude_modules"), "exclude_modules", self.budget)
        layers, pattern = options.get("layers_to_transform"), options.get("layers_pattern")
        if isinstance(targets, str) and (layers is not None or pattern is not None):
            key = "layers_to_transform" if layers is not None else "layers_pattern"
            raise bad_key(key, "goes with a list of target_modules only", options[key])
        if pattern and layers is None:
            raise bad_key("layers_pattern", "goes with layers_to_transform only", pattern)
        self._named = frozenset(targets) if isinstance(targets, list) else frozenset()
        self._layers = _numbers(layers)
        self._indexes = _indexes(pattern)

    def left_out_by(self, module: str) -> str | None:
        """The key of the config that leaves a layer out, None if the config names the layer.

        Raises:
            BadAdapter: the name is too long, or an expression would take too long.
        """
        if len(module) > _LONGEST_NAME:
            raise BadAdapter(
                "the name of its layer is too long",
                field=module,
                allowed=f"{_LONGEST_NAME} letters",
            )
        if self._excluded is not None and self._excluded(module):
            return "exclude_modules"
        assert self._target is not None
        if not self._target(module):
            return "target_modules"
        if self._layers is None or module in self._named:  # That wins over the layer's number.
            return None
        index = next((i for p in self._indexes if (i := self._index(p, module))), None)
        return None if index is not None and int(index) in self._layers else "layers_to_transform"

    def _index(self, pattern: re.Pattern[str], module: str) -> str | None:
        """The number of a layer, if it stands behind what `layers_pattern` says."""
        if pattern is not _FIRST_NUMBER:
            _tried(self._spend, module, pattern.pattern, "layers_pattern")
        match = pattern.match(module)
        return match["index"] if match else None

    def _spend(self, module: str) -> bool:
        self.budget.spend(len(module))
        return True

    def lookup(self, key: str, default: Any) -> Callable[[str], Any]:
        """Layer → its value by `rank_pattern` or `alpha_pattern`.

        The first key that matches the end of a name wins; a key may be an expression.

        Raises:
            BadAdapter: it is no object, or an expression is broken or too costly.
        """
        patterns = self._config.get(key) or {}
        if not isinstance(patterns, dict):
            raise bad_key(key, "not an object", patterns)
        first = _Endings(list(patterns), key, self.budget)

        def find(module: str) -> Any:
            pattern = first(module)
            return patterns.get(module, default) if pattern is None else patterns[pattern]

        return find


def named_by(value: Any, key: str, budget: Budget) -> Rule:
    """The rule of `feedforward_modules`: a full match, or the end of a name wherever it begins.

    Raises:
        BadAdapter: it is neither an expression nor a list of names.
    """
    if isinstance(value, str):
        return _full(value, key, budget)
    ends = set(_names(value, key))
    lengths = sorted({len(end) for end in ends})
    return lambda module: any(
        module[len(module) - n :] in ends for n in lengths if n <= len(module)
    )


def _by_name(value: Any, key: str, budget: Budget) -> Rule | None:
    """The rule of `target_modules` and `exclude_modules`; None if there is none."""
    if value is None or (key == "exclude_modules" and not value):
        return None
    if isinstance(value, str):
        if key == "target_modules" and value.lower() == ALL_LINEAR:
            return lambda module: module.rsplit(".", 1)[-1] not in READ_OUTS
        return _full(value, key, budget)
    names = set(_names(value, key))
    return lambda module: any(end in names for end in _endings(module))


def _endings(module: str) -> list[str]:
    """A name, and what follows each of its dots."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _names(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise bad_key(key, "neither an expression nor a list of names", value)
    return value


def _full(text: str, key: str, budget: Budget) -> Rule:
    pattern = _pattern(text, text, key, budget)
    return lambda module: _tried(pattern.fullmatch, module, text, key)


class _Endings:
    """Which of some keys is the first to match the end of a name.

    EVA writes a key for every layer, so most are plain names, whose dots stand for any letter.
    Those with dots at the same places are looked up together.

    Args:
        texts: the keys, in order.
        key: of the config.
        budget: what it may cost.
    """

    def __init__(self, texts: list[str], key: str, budget: Budget) -> None:
        self._key, self._budget = key, budget
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[tuple[int, str, Pattern]] = []
        self._texts, self._cost = texts, 0
        for i, text in enumerate(texts):
            if _PLAIN.fullmatch(text):
                dots = tuple(at for at, letter in enumerate(text) if letter == ".")
                same = self._plain.setdefault(len(text), {}).setdefault(dots, {})
                same.setdefault(text, i)
            else:
                self._others.append((i, text, _pattern(rf"(.*\.)?({text})$", text, key, budget)))

    def __call__(self, module: str) -> str | None:
        """The key, None if none matches."""
        matches = [i for end in _endings(module) for i in self._fitting(end)]
        for i, text, pattern in self._others:
            if _tried(pattern.match, module, text, self._key):
                matches.append(i)
                break
        return self._texts[min(matches)] if matches else None

    def _fitting(self, end: str) -> Iterator[int]:
        """The plain keys that are this end of a name, letter for letter or dot."""
        for dots, texts in self._plain.get(len(end), {}).items():
            self._cost = 1 + len(dots)
            _tried(self._spend, end, end, self._key)
            letters = list(end)
            for at in dots:
                letters[at] = "."
            if (i := texts.get("".join(letters))) is not None:
                yield i

    def _spend(self, _: str) -> bool:
        self._budget.spend(self._cost)
        return True


def _pattern(whole: str, text: str, key: str, budget: Budget) -> Pattern:
    try:
        return Pattern(whole, budget)
    except PatternError as error:
        raise bad_key(key, f"not an expression that is taken: {error}", text) from error


def _tried(match: Rule, module: str, text: str, key: str) -> bool:
    try:
        return match(module)
    except PatternError as error:
        raise bad_key(key, str(error), text) from error


def _numbers(value: Any) -> frozenset[int] | None:
    """`layers_to_transform`; an empty list means all."""
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(n) is int for n in numbers):
        raise bad_key("layers_to_transform", "neither a number nor a list of numbers", value)
    return frozenset(numbers)


def _indexes(value: Any) -> list[re.Pattern[str]]:
    """`layers_pattern`: what stands before a layer's number."""
    if not value:
        return [_FIRST_NUMBER]
    names = [value] if isinstance(value, str) else _names(value, "layers_pattern")
    for name in names:
        if not re.fullmatch(r"[\w.]{1,100}", name):
            raise bad_key("layers_pattern", "an expression here is not taken", name, "plain names")
    return [re.compile(rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.") for name in names]
