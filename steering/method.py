"""The plugin contract: a steering method says *what to mix*, as data.

A method lives in the front end only. It turns a validated config into a `Recipe` (weights and
one core operation); it never sees logits, vLLM or the network, and none of its code runs in the
worker. So a method cannot slow down or break decoding, and it needs no torch.

Contract version 1. Methods are found through the entry-point group
`coxswain.steering_methods.v1`; see docs/guide/write-a-method.md for a worked example, and
`steering.testing.MethodConformance` for the tests that every method must pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from steering.plan import BASE, Recipe

CONTRACT_VERSION = 1
ENTRY_POINT_GROUP = f"coxswain.steering_methods.v{CONTRACT_VERSION}"

Logits = npt.NDArray[np.float64]
"""[V] float64: one stream's raw scores at one position."""


def log_softmax(logits: Logits) -> Logits:
    """The log-probabilities, [V], for a method's `reference`; at least one score is finite."""
    shifted = logits - logits.max()
    normalised: Logits = shifted - np.log(np.exp(shifted).sum())
    return normalised


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on callers' steering (config section `steering`; a profile may narrow them).

    Args:
        strength: closed range for every field of type `Strength`.
        weight: closed range for every field of type `Weight`.
        top_k: largest value of every field of type `TopK`.
        best_of: largest value of every field of type `BestOf`.
        streams: what every field of type `StreamName` may name; None: anything. The caller of
            `resolve` sets it from the snapshot.
    """

    strength: tuple[float, float] = (0.0, 10.0)
    weight: tuple[float, float] = (-10.0, 10.0)
    top_k: int = 64
    best_of: int = 64
    streams: frozenset[str] | None = None


def _limits(info: ValidationInfo) -> Limits:
    context: Any = info.context
    return context if isinstance(context, Limits) else Limits()


def _within(value: float, bounds: tuple[float, float], what: str) -> float:
    low, high = bounds
    if not low <= value <= high:
        raise refusal(f"the {what} is out of range", f"[{low:g}, {high:g}]")
    return value


def refusal(message: str, allowed: str | None = None) -> PydanticCustomError:
    """The error that a config's validator raises to refuse a value; becomes a `BadValue`.

    Args:
        message: one sentence for a person.
        allowed: what would be accepted, e.g. `[0, 10]`.
    """
    return PydanticCustomError("refused", "{message}", {"message": message, "allowed": allowed})


def _check_strength(value: float, info: ValidationInfo) -> float:
    return _within(value, _limits(info).strength, "strength")


def _check_weight(value: float, info: ValidationInfo) -> float:
    return _within(value, _limits(info).weight, "weight")


def _check_fraction(value: float) -> float:
    if not 0 < value <= 1:
        raise refusal("the fraction is out of range", "(0, 1]")
    return value


def check_top_k(value: int, info: ValidationInfo) -> int:
    """Refuses more candidates than the server allows; for fields that may be null."""
    most = _limits(info).top_k
    if value > most:
        raise refusal("the number of candidates is out of range", f"1 to {most}")
    return value


def _check_best_of(value: int, info: ValidationInfo) -> int:
    most = _limits(info).best_of
    if not 1 <= value <= most:
        raise refusal("the number of replies is out of range", f"1 to {most}")
    return value


def _check_probability(value: float) -> float:
    if not 0 <= value <= 1:
        raise refusal("the probability is out of range", "[0, 1]")
    return value


def _check_stream(value: str, info: ValidationInfo) -> str:
    known = _limits(info).streams
    if known is not None and value not in known:
        names = f"one of: {', '.join(sorted(known))}"
        raise PydanticCustomError("unknown_stream", "no such stream", {"allowed": names})
    return value


def _check_companion(value: str) -> str:
    if value == BASE:
        raise refusal("must be another stream than base")
    return value


KIND = "x-kind"
"""Key in the JSON schema of a field that tells what its value is: for forms made from it."""

# The three below check defaults too: what a caller leaves out must not be more than it may write.

Strength = Annotated[
    float,
    Field(strict=True, validate_default=True, json_schema_extra={KIND: "strength"}),
    AfterValidator(_check_strength),
]
"""How strongly to steer; finite, inside the server's `steering.strength` range."""

TopK = Annotated[int, Field(strict=True, validate_default=True, ge=1), AfterValidator(check_top_k)]
"""How many of the most likely ids; 1 to the server's `steering.max_top_k`."""

BestOf = Annotated[
    int,
    Field(strict=True, validate_default=True, json_schema_extra={"minimum": 1}),
    AfterValidator(_check_best_of),
]
"""How many replies to choose from; 1 to the server's `steering.max_best_of`."""

Probability = Annotated[
    float,
    Field(strict=True, json_schema_extra={"minimum": 0, "maximum": 1}),
    AfterValidator(_check_probability),
]
"""A probability; in [0, 1]."""

Weight = Annotated[
    float, Field(strict=True, json_schema_extra={KIND: "weight"}), AfterValidator(_check_weight)
]
"""A coefficient of the read-out sum; finite, inside the server's `steering.weight` range."""

Fraction = Annotated[
    float,
    Field(strict=True, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1}),
    AfterValidator(_check_fraction),
]
"""A share of probability; in (0, 1]."""

StreamName = Annotated[
    str,
    Field(min_length=1, max_length=64, json_schema_extra={KIND: "stream"}),
    AfterValidator(_check_stream),
]
"""The name of a stream from the server's configuration."""

Companion = Annotated[StreamName, AfterValidator(_check_companion)]
"""The name of a stream that is not the base."""


class OwnPrompt(BaseModel):
    """A prompt that one stream reads instead of the request's prompt. Exactly one field is set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chat_template: str | None = Field(
        None, description="Jinja chat template; the request's messages are rendered with it."
    )
    messages: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="Other messages, rendered with the stream's chat template."
    )
    prompt: str | None = Field(None, description="Plain text.")
    token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="Token ids of the stream's own tokenizer."
    )

    def model_post_init(self, _context: Any) -> None:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of chat_template, messages, prompt, token_ids; "
                f"got {', '.join(given) or 'none'}"
            )


class MethodConfig(BaseModel):
    """Base of every method's config: what a request may write in its `steering` object.

    Subclasses narrow `method` to a `Literal` of their own name and add their fields, each with
    a description: the config is validation, OpenAPI schema and help text at once.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    method: str
    prompts: dict[StreamName, OwnPrompt] = Field(
        default_factory=dict,
        description="Own prompts by stream, which it reads instead of the request's prompt.",
    )
    report: bool | Literal["tokens"] = Field(
        False,
        description="true adds a `steering` object to the response; 'tokens' adds the per-token "
        "base and steered log-probabilities, and what each stream by itself would have chosen.",
    )
    phases: tuple[dict[str, Any], ...] = Field(
        (),
        max_length=8,
        description="Other values of the method's fields for some of the reply's tokens. Each says "
        "which: `first` (so many), `from` (the n-th on, from 0), `after` or `until` (a text); "
        "`off: true` is the base alone. Of several that hold, the last does.",
    )


def merged(*terms: tuple[str, float]) -> dict[str, float]:
    """Weights for a `Recipe`, from (stream, coefficient) terms; a stream named twice adds up."""
    weights: dict[str, float] = {}
    for stream, coefficient in terms:
        weights[stream] = weights.get(stream, 0.0) + coefficient
    return weights


C = TypeVar("C", bound=MethodConfig)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The server's streams at this moment, for `resolve`.

    Args:
        streams: stream name → head ('lm', 'q', 'value' or 'classifier'); `base` is always there.
        bodies: head → the stream whose last hidden state it reads; a head that is left out reads
            a body of its own, which runs under the head's name.
        taps: tap → the stream of which it reads a layer; taps have the head 'lm'.
    """

    streams: Mapping[str, str] = field(default_factory=lambda: {"base": "lm"})
    bodies: Mapping[str, str] = field(default_factory=dict)
    taps: Mapping[str, str] = field(default_factory=dict)


class Method(ABC, Generic[C]):
    """One steering method.

    `name` is what requests write in `steering.method`. `config` is the typed model of its
    options. `resolve` is pure: equal input gives equal output, nothing is kept between calls.
    Fields of type `StreamName` hold names that exist, and the caller checks the names in the
    returned recipe once more (unknown ones give 404), so a method need not check them.

    Where `strength` multiplies the whole change, `strength: 0` must resolve to exactly
    `Recipe({"base": 1.0})`: the request then takes the base's own path, bit for bit.
    """

    name: ClassVar[str]
    config: ClassVar[type[MethodConfig]]

    @abstractmethod
    def resolve(self, config: C, snapshot: Snapshot) -> Recipe:
        """The recipe for one request.

        Raises:
            steering.errors.SteeringError: the options contradict each other or the snapshot.
        """

    @abstractmethod
    def reference(self, config: C, logits: Mapping[str, Logits]) -> Logits:
        """The slow definition, written from the paper's formula, not from `resolve`.

        Args:
            config: validated options.
            logits: stream name → [V] float64 raw scores of that stream. For a classifier head
                the first number is its log-odds; for a value stream, number v is the value
                after id v.

        Returns:
            [V] float64 scores, up to an additive constant. An entry that is not finite rules its
            id out: −∞, and also the NaN of −∞ − (−∞), so the formula needs no special cases.
        """
