"""One of two streams for each token, or a mixture of both, by a gate.

With p_1 the stream `first`, p_2 the stream `second`, and q in [0, 1] the gate's number:

    soft    p = (1 − q) p_1 + q p_2        where the gate is open, else p_1
    hard    p_2                            where the gate is open, else p_1

    gate           q                            open
    constant       `share`                      always                    (soft)
    classifier     what a classifier head says  q > threshold
    confidence     1 − max p_1                  max p_1 < threshold

Memory Decoder (Cao et al., arXiv 2508.09874) is a constant share of 0.25; Co-LLM (Shen et al.,
arXiv 2403.03870) a classifier, hard, or soft above a threshold; Nudging (Fei et al., arXiv
2410.09300) confidence, hard, token by token. The paper's model speaks in whole words, which is
refused: who writes inside a word depends on what p_1 was at an earlier token. That is no function
of the text, and a step has neither those scores nor, behind a hit in the prefix cache, the states
that they come from. `critical_tokens` is one with names of its own.

`ends` says who may end the text, with E the ids that end it. `first`: p_2 counts as p_2(· | not E),
and E keeps what p_1 gives it. `second` (hard): where one of E is the most likely id of p_1, p_2
decides, as if the gate were open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from steering.kernels.reference import SET_BACK
from steering.method import (
    Logits,
    Method,
    MethodConfig,
    Probability,
    Snapshot,
    StreamName,
    log_softmax,
    refusal,
)
from steering.plan import BASE, Ender, Gate, Recipe, Rule, RuleKind

GATES = {"constant": Gate.CONSTANT, "classifier": Gate.HEAD, "confidence": Gate.DOUBT}
ENDERS = {"either": Ender.EITHER, "first": Ender.SUM, "second": Ender.STREAM}
THRESHOLDS = {("classifier", "hard"): 0.5, ("confidence", "hard"): 0.3, ("confidence", "soft"): 1.0}


def _token(value: Any) -> Any:
    if value == "word":
        raise refusal("a word's first token would decide for all of it, whose scores later steps "
                      "do not have", "token")  # fmt: skip
    return value


class SelectConfig(MethodConfig):
    """Options of a selection."""

    method: Literal["select"]
    # The validators of the later fields look at the earlier ones.
    gate: Literal["constant", "classifier", "confidence"] = Field(
        description="constant: a share of both; classifier: a head says how much of a token is the "
        "second stream's; confidence: the second stream's where the first is not sure."
    )
    mode: Literal["hard", "soft"] | None = Field(
        None,
        validate_default=True,
        description="hard: a token is one stream's; soft: the two distributions are mixed. Left "
        "out: hard, and soft for a constant share.",
    )
    first: StreamName = Field(BASE, description="The stream that writes where the gate is closed.")
    second: StreamName = Field(description="The stream that writes where the gate is open.")
    classifier: StreamName | None = Field(
        None,
        description="For the gate `classifier`: the stream with a classifier head.",
    )
    share: Probability | None = Field(
        None, description="For the gate `constant`: the second stream's share, in [0, 1]; 0.25."
    )
    threshold: Probability | None = Field(
        None,
        description="The gate is open where the classifier gives more than this (0.5; soft 0), or "
        "where the first stream's largest probability is below it (0.3; soft 1), in [0, 1].",
    )
    greedy: bool = Field(
        False, description="Hard: of the second stream's ids only the most likely one counts."
    )
    ends: Literal["either", "first", "second"] = Field(
        "either", description="Which stream may end the text; second: hard only."
    )

    unit: Annotated[Literal["token"], BeforeValidator(_token)] = Field(
        "token", description="What the gate is asked for. `word`, as Nudging's paper, is refused."
    )

    @field_validator("mode")
    @classmethod
    def _constant_is_soft(cls, value: str | None, info: ValidationInfo) -> str:
        constant = info.data.get("gate") == "constant"
        if constant and value == "hard":
            raise refusal("a constant share is soft", "soft")
        return value or ("soft" if constant else "hard")

    @field_validator("second")
    @classmethod
    def _differ(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("first"):
            raise refusal("first and second must be different streams")
        return value

    @model_validator(mode="after")
    def _has_a_classifier(self) -> SelectConfig:
        if self.gate == "classifier" and self.classifier is None:
            raise refusal("the gate classifier needs a classifier")
        return self

    @field_validator("classifier", "share", "threshold")
    @classmethod
    def _of_the_gate(cls, value: Any, info: ValidationInfo) -> Any:
        gate, name = info.data.get("gate"), info.field_name
        gates = {
            "classifier": ("classifier",),
            "share": ("constant",),
            "threshold": ("classifier", "confidence"),
        }[str(name)]
        if value is not None and gate is not None and gate not in gates:
            raise refusal(f"{name} goes with the gate {' or '.join(gates)}")
        return value

    @field_validator("greedy", "ends")
    @classmethod
    def _of_hard(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("mode") == "soft" and value in (True, "second"):
            raise refusal(f"{info.field_name} {value} goes with the mode hard")
        return value

    @property
    def gated_by(self) -> float:
        """The share, or the threshold."""
        if self.gate == "constant":
            return 0.25 if self.share is None else self.share
        if self.threshold is not None:
            return self.threshold
        return THRESHOLDS.get((self.gate, self.mode or "hard"), 0.0)


class Select(Method[SelectConfig]):
    """One of two streams, or a mixture of both, by a gate."""

    name = "select"
    config = SelectConfig

    def resolve(self, config: SelectConfig, _snapshot: Snapshot) -> Recipe:
        """The first stream in the sum, the second for the rule."""
        number = config.gated_by
        if config.gate == "constant" and number in (0, 1):
            return Recipe({config.second if number else config.first: 1.0})
        rule = Rule(
            RuleKind.SELECT,
            config.second,
            number,
            config.classifier or "",
            gate=GATES[config.gate],
            hard=config.mode == "hard",
            ender=ENDERS[config.ends],
            best=config.greedy,
        )
        return Recipe({config.first: 1.0, config.second: 1.0}, rule)

    def reference(self, config: SelectConfig, logits: Mapping[str, Logits]) -> Logits:
        """The formulas above, with no id that ends a text."""
        first, second = (np.exp(log_softmax(logits[s])) for s in (config.first, config.second))
        number = config.gated_by
        if config.gate == "constant":
            share, opened = number, True
        elif config.gate == "classifier":
            assert config.classifier is not None
            share = 1 / (1 + np.exp(-logits[config.classifier][0]))
            opened = share > number
        else:
            share = 1 - first.max()
            opened = first.max() < number
        with np.errstate(divide="ignore"):
            if not opened:
                found: Logits = np.log(first)
            elif config.mode == "soft":
                found = np.log((1 - share) * first + share * second)
            else:
                found = np.log(second)
                if config.greedy:  # what stands behind may ban the id; then the next ones come up
                    found = found - SET_BACK * (np.arange(found.size) != found.argmax())
        return found
