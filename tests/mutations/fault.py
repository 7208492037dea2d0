"""A fault: one small change of one file, as a slip of the hand would make it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One.

    Args:
        file: that it is in, from the repository's root.
        old: text of the file, there once.
        new: what stands there instead.
        tests: files or tests of pytest, separated by blanks; at least one must fail.
        why: what users would see.
    """

    file: str
    old: str
    new: str
    tests: str
    why: str
