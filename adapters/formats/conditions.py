"""Conditional vectors: when their behaviour vectors act, by the states of the text itself (CAST).

    {"kind": "conditional", "gate": "prompt", "read": "mean", "similarity": "projected",
     "conditions": {"6": {"above": 0.04}}}

A condition compares what a decoder layer hands on, u, with its vector c, `6.condition` [H]:

    cosine      u·c / (‖u‖ ‖c‖)
    projected   cos(u, tanh((c cᵀ / c·c) u))        (arXiv 2409.05907, IBM activation-steering)

It is met `above` or `below` its threshold; one of several is enough. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from adapters.errors import BadAdapter, Fault
from adapters.formats.blocks import block, block_number, block_of
from adapters.where import Where

GATES = ("prompt", "token")
READS = ("mean", "last")
SIMILARITIES = ("projected", "cosine")
KEYS = ("gate", "read", "similarity", "conditions")
SUFFIX = ".condition"


@dataclass(frozen=True, slots=True, order=True)
class Comparison:
    """A state beside a vector.

    Args:
        module: whose output is compared, `layers[n]`.
        file: that has the vector, in the artefact's folder.
        name: of the vector's tensor, [H].
        threshold: of the similarity, −1 to 1.
        above: whether it is met above the threshold, else below it.
    """

    module: str
    file: str
    name: str
    threshold: float
    above: bool


@dataclass(frozen=True, slots=True)
class Condition:
    """When an adapter acts.

    Args:
        gate: `prompt`: the prompt decides for the whole reply. `token`: each token for itself.
        read: of a prompt, the `mean` of all states, or the `last` one.
        similarity: `projected` or `cosine`.
        comparisons: of which one must be met, by layer.
    """

    gate: Literal["prompt", "token"]
    read: Literal["mean", "last"]
    similarity: Literal["projected", "cosine"]
    comparisons: tuple[Comparison, ...]

    @property
    def last(self) -> int:
        """The number of the last layer that is compared."""
        return max(block_number(one.module) or 0 for one in self.comparisons)

    def check(self, where: Where, field: str, fault: type[Fault] = BadAdapter) -> None:
        """Whether positions can be steered under this condition.

        Raises:
            Fault: a prompt that decides shall be steered itself: what it decides is known once
                all of it has run.
        """
        if self.gate == "prompt" and where.in_prompt:
            raise fault(
                "the prompt decides whether this adapter acts, so it cannot act on the prompt's "
                "own positions (apply_behavior_on_first_call)",
                field=field, allowed="reply, or an object with from and first",
            )  # fmt: skip


def read_condition(config: dict[str, Any], tensors: set[str], at: str, file: str) -> Condition:
    """The condition of a file of kind `conditional`.

    Args:
        config: the file's.
        tensors: names of its tensors.
        at: the config's name, for errors.
        file: the tensors' file.

    Raises:
        BadAdapter: a key is missing or out of range, or a vector is missing or without a threshold.
    """
    gate: Any = config.get("gate")
    kind, read = config.get("similarity", "projected"), config.get("read", "mean")
    for key, value, allowed in (
        ("gate", gate, GATES), ("read", read, READS), ("similarity", kind, SIMILARITIES),
    ):  # fmt: skip
        if value not in allowed:
            raise _bad(f"{at}: {key}", value, ", ".join(allowed))
    if gate == "token" and "read" in config:
        raise BadAdapter("only a gate of the prompt reads several states", field=f"{at}: read")
    given = config.get("conditions")
    if not isinstance(given, dict) or not given:
        raise _bad(f"{at}: conditions", given, '{"<layer>": {"above" or "below": threshold}}')
    vectors = {block_of(n.removesuffix(SUFFIX)): n for n in sorted(tensors) if n.endswith(SUFFIX)}
    found = [_comparison(number, one, vectors, at, file) for number, one in given.items()]
    if stray := vectors.keys() - {one.module for one in found}:
        name = vectors[sorted(map(str, stray))[0]]
        raise BadAdapter("a vector without a condition", field=f"{file}: {name}")
    found.sort(key=lambda one: block_number(one.module) or 0)
    return Condition(gate, read, kind, tuple(found))


def _comparison(
    number: str, one: Any, vectors: dict[str | None, str], at: str, file: str
) -> Comparison:  # fmt: skip
    field = f"{at}: conditions.{number}"
    if not number.isdecimal() or block_of(number) is None:
        raise _bad(field, number, "the number of a decoder layer")
    if not isinstance(one, dict) or len(one) != 1 or not one.keys() <= {"above", "below"}:
        raise _bad(field, one, '{"above": threshold} or {"below": threshold}')
    ((side, threshold),) = one.items()
    if type(threshold) not in (int, float) or not -1 <= threshold <= 1:
        raise _bad(f"{field}.{side}", threshold, "−1 to 1")
    module = block(int(number))
    if module not in vectors:
        raise BadAdapter("the condition's vector is missing", field=f"{file}: {number}{SUFFIX}")
    return Comparison(module, file, vectors[module], float(threshold), side == "above")


def _bad(field: str, value: Any, allowed: str) -> BadAdapter:
    return BadAdapter("cannot be served", field=field, value=value, allowed=allowed)
