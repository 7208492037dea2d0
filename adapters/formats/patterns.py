"""Regular expressions of strangers, matched in time that grows with their length, not beyond.

PEFT's configs select layers with Python's regular expressions. Python's own matcher tries one way
after the other, so that `(a+)+b` takes minutes on thirty letters. This one keeps the set of all
places that a match can have reached (Thompson 1968, doi:10.1145/363347.363387). It knows whether
there is a match, not which; expressions in which that depends on the way (back references, atomic
groups, possessive quantifiers) are refused, and so are flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_c: Any = import_module("re._constants")
_parser: Any = import_module("re._parser")
"""Python's own parser of expressions, which has no public name."""

_LONGEST = 10_000
"""Letters of an expression; lists of layer names get long."""

_MOST_STEPS = 1_500_000
"""Letters that may be compared for all expressions of a config and all names of a file: some
seconds. An ordinary expression needs about a thousand for a name."""

_PARSING = 10
"""What reading a letter of an expression costs, in comparisons."""

_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    _c.CATEGORY_DIGIT: str.isdecimal,
    _c.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    _c.CATEGORY_SPACE: str.isspace,
    _c.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    _c.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    _c.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class PatternError(ValueError):
    """An expression that is broken, or that this matcher does not take: one sentence says why."""


@dataclass
class Budget:
    """The cost limit of all expressions of a config together.

    Args:
        left: letters that may still be compared.
    """

    left: int = _MOST_STEPS

    def spend(self, steps: int) -> None:
        """Takes some off.

        Raises:
            PatternError: nothing is left.
        """
        self.left -= steps
        if self.left < 0:
            raise PatternError("the expressions take too long on names of this number and length")


class Pattern:
    """An expression.

    Args:
        text: in Python's syntax, without flags.
        budget: what its matches may cost.

    Raises:
        PatternError: it is broken, longer than 10,000 letters, or of a kind that is not taken.
    """

    def __init__(self, text: str, budget: Budget) -> None:
        self._budget = budget
        if len(text) > _LONGEST:
            raise PatternError(f"longer than {_LONGEST} letters")
        budget.spend(_PARSING * len(text))
        try:
            self._tree = _parser.parse(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"broken: {error}") from error
        if self._tree.state.flags & ~re.UNICODE.value:
            raise PatternError("flags are not taken")
        self._check(self._tree)

    def _check(self, tree: Any) -> None:
        for kind, argument in tree:
            if kind not in _NODES:
                raise PatternError(f"{str(kind).lower()} is not taken")
            for part in _parts(kind, argument):
                self._check(part)

    def fullmatch(self, name: str) -> bool:
        """Whether it matches all of a name, as `re.fullmatch`.

        Raises:
            PatternError: it would take too long.
        """
        return bool(self._ends(name) >> len(name) & 1)

    def match(self, name: str) -> bool:
        """Whether it matches the beginning of a name, as `re.match`.

        Raises:
            PatternError: it would take too long.
        """
        return bool(self._ends(name))

    def _ends(self, name: str) -> int:
        try:
            return _Run(name, self._budget).sequence(self._tree, 1)
        except RecursionError as error:
            raise PatternError("nested too deeply") from error


def _parts(kind: Any, argument: Any) -> list[Any]:
    """The expressions inside of a node."""
    if kind is _c.BRANCH:
        return list(argument[1])
    if kind is _c.SUBPATTERN:
        if argument[1] or argument[2]:
            raise PatternError("flags are not taken")
        return [argument[3]]
    if kind in (_c.MAX_REPEAT, _c.MIN_REPEAT):
        return [argument[2]]
    if kind not in (_c.ASSERT, _c.ASSERT_NOT):
        return []
    if argument[0] < 0 and len(set(argument[1].getwidth())) > 1:
        raise PatternError("broken: a look-behind needs one width")
    return [argument[1]]


class _Run:
    """One name. Sets of places in it are whole numbers: bit i stands for the place before letter i.

    Args:
        name: it.
        budget: what it may cost.
    """

    def __init__(self, name: str, budget: Budget) -> None:
        self._name, self._budget = name, budget

    def sequence(self, tree: Any, places: int) -> int:
        """The places that can be reached from some places."""
        for kind, argument in tree:
            if not places:
                return 0
            self._budget.spend(1)
            places = _NODES[kind](self, argument, places)
        return places

    def letters(self, fits: Callable[[str], bool], places: int) -> int:
        """One letter on, where it fits."""
        self._budget.spend(places.bit_count())
        matched, size = 0, len(self._name)
        while places:
            place = places & -places
            places ^= place
            i = place.bit_length() - 1
            if i < size and fits(self._name[i]):
                matched |= place << 1
        return matched

    def one_of(self, items: Any, places: int) -> int:
        """A set of letters in brackets."""
        negated = items[0][0] is _c.NEGATE
        # Each letter may be compared with each item: sets can have thousands.
        self._budget.spend(len(items) * (1 + places.bit_count()))
        tests = [_single(kind, value) for kind, value in items[negated:]]
        return self.letters(lambda c: any(test(c) for test in tests) != negated, places)

    def branch(self, argument: Any, places: int) -> int:
        """Any of some."""
        matched = 0
        for tree in argument[1]:
            matched |= self.sequence(tree, places)
        return matched

    def repeat(self, argument: Any, places: int) -> int:
        """So many times; whether greedy or not makes no difference to whether there is a match."""
        least, most, tree = argument
        for _ in range(least):
            reached = self.sequence(tree, places)
            if reached == places:  # nothing changes any more, however often
                break
            places = reached
        matched, new, times = places, places, least
        while new and times < most:
            new = self.sequence(tree, new) & ~matched
            matched |= new
            times += 1
        return matched

    def at(self, where: Any, places: int) -> int:
        """A place of a kind."""
        name, size = self._name, len(self._name)
        if where in (_c.AT_BEGINNING, _c.AT_BEGINNING_STRING):
            return places & 1
        if where is _c.AT_END_STRING:
            return places & 1 << size
        if where is _c.AT_END:
            before = 1 << (size - 1) if name.endswith("\n") else 0
            return places & (1 << size | before)
        if not size:  # Python finds neither \b nor \B in nothing.
            return 0
        self._budget.spend(size)
        word = [_CATEGORIES[_c.CATEGORY_WORD](c) for c in name]
        edges = [False, *word], [*word, False]
        boundary = sum(1 << i for i, (a, b) in enumerate(zip(*edges, strict=True)) if a != b)
        return places & (boundary if where is _c.AT_BOUNDARY else ~boundary)

    def ahead(self, argument: Any, places: int) -> int:
        """The places where an expression matches from there on, or up to there."""
        direction, tree = argument
        back = tree.getwidth()[0] if direction < 0 else 0
        matched = 0
        for i in range(back, len(self._name) + 1):
            if places >> i & 1:
                reached = self.sequence(tree, 1 << (i - back))
                matched |= (reached >> i & 1 if direction < 0 else bool(reached)) << i
        return matched

    def not_ahead(self, argument: Any, places: int) -> int:
        """The other places."""
        return places & ~self.ahead(argument, places)


def _single(kind: Any, value: Any) -> Callable[[str], bool]:
    """Whether a letter belongs to an item of a set."""
    if kind is _c.LITERAL:
        return lambda c: ord(c) == value
    if kind is _c.RANGE:
        return lambda c: value[0] <= ord(c) <= value[1]
    return _CATEGORIES[value]


_NODES: dict[Any, Callable[[_Run, Any, int], int]] = {
    _c.LITERAL: lambda run, value, p: run.letters(lambda c: ord(c) == value, p),
    _c.NOT_LITERAL: lambda run, value, p: run.letters(lambda c: ord(c) != value, p),
    _c.ANY: lambda run, _, p: run.letters(lambda c: c != "\n", p),
    _c.IN: _Run.one_of,
    _c.BRANCH: _Run.branch,
    _c.SUBPATTERN: lambda run, argument, p: run.sequence(argument[3], p),
    _c.MAX_REPEAT: _Run.repeat,
    _c.MIN_REPEAT: _Run.repeat,
    _c.AT: _Run.at,
    _c.ASSERT: _Run.ahead,
    _c.ASSERT_NOT: _Run.not_ahead,
}
