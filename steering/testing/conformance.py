"""Tests that every steering method must pass: subclass, give the fixtures, get the tests.

    class TestProxyTuning(MethodConformance):
        method = ProxyTuning()
        configs = ({"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"},)
        zero_config = {**configs[0], "strength": 0}
        bad_configs = (({**configs[0], "strength": -1}, "strength"),)

Needs pytest, which the server itself does not.
"""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from steering.errors import SteeringError
from steering.kernels.reference import mix_reference
from steering.method import Limits, Logits, Method, MethodConfig, Snapshot
from steering.plan import BASE, Recipe
from steering.resolve import Resolved, parse, resolve
from steering.wire import SteeringPayload, pack, unpack

Spec = Mapping[str, Any]

TOLERANCE = 1e-9
"""Largest difference to the reference, relative to the largest score, after the constant."""

VOCABULARIES = (1, 63, 32003)
"""Sizes V of the random logits: none is a multiple of anything a kernel might tile by."""


class MethodConformance:
    """The kit. Lives in the tests of the package that offers the method.

    Class attributes to give:

    - `method`: an instance.
    - `configs`: valid steering objects, as a request would write them; at least one.
    - `zero_config`: one that must be the base itself (strength 0), or None if there is none.
    - `bad_configs`: (steering object, field at fault) pairs; the field is a dotted path inside
      the object, '' for the object as a whole.
    - `streams`: stream name → head, for the configs above.
    - `taps`: of these, tap → the stream of which it reads a layer.

    A test may be overridden only to mark it as an expected failure, with a reason:
    `@pytest.mark.xfail(reason="…")`.
    """

    method: ClassVar[Method[Any]]
    configs: ClassVar[Sequence[Spec]]
    zero_config: ClassVar[Spec | None]
    bad_configs: ClassVar[Sequence[tuple[Spec, str]]]
    streams: ClassVar[Mapping[str, str]] = {
        "base": "lm",
        "chat": "lm",
        "plain": "lm",
        "twin": "lm",
        "value": "value",
    }
    taps: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses a subclass without fixtures, or with a test removed or overridden."""
        super().__init_subclass__(**kwargs)
        for fixture in ("method", "configs", "zero_config", "bad_configs"):
            if not hasattr(cls, fixture):
                raise TypeError(f"{cls.__name__} must give {fixture}")
        if not cls.configs:
            raise TypeError(f"{cls.__name__}.configs must hold at least one config")
        for name, test in vars(MethodConformance).items():
            found = getattr(cls, name, None)
            if name.startswith("test_") and found is not test and not _expected_failure(found):
                raise TypeError(
                    f"{cls.__name__} removes or overrides {name}; an expected failure is marked "
                    "@pytest.mark.xfail(reason='…')"
                )

    def test_config_survives_a_round_trip(self) -> None:
        """What a config dumps, as Python and as JSON, validates to an equal config."""
        for spec in self.configs:
            config = self._config(spec)
            again = self._config(config.model_dump(exclude_unset=True))
            from_json = type(config).model_validate_json(config.model_dump_json(exclude_unset=True))
            assert config == again == from_json

    def test_every_field_is_described(self) -> None:
        """The config is the help text."""
        fields = self.method.config.model_fields
        silent = [n for n, f in fields.items() if not f.description and n != "method"]
        assert not silent, f"fields without a description: {silent}"

    def test_equal_specs_give_equal_plans(self) -> None:
        """Equal, with equal hashes, and equal after the trip to the worker."""
        for spec in self.configs:
            plan, again = self._resolve(spec).plan, self._resolve(copy.deepcopy(spec)).plan
            assert plan == again
            assert hash(plan) == hash(again)
            payload = unpack(pack(SteeringPayload(plan)))
            assert payload is not None
            assert payload.plan == plan

    def test_resolve_is_pure(self) -> None:
        """The same recipe whatever was resolved before, also by another instance."""
        snapshot = Snapshot(self.streams, taps=self.taps)
        configs = [self._config(spec) for spec in self.configs]
        first = [self.method.resolve(config, snapshot) for config in configs]
        another = type(self.method)()
        assert [another.resolve(c, snapshot) for c in reversed(configs)] == first[::-1]
        assert [self.method.resolve(config, snapshot) for config in configs] == first
        assert configs == [self._config(spec) for spec in self.configs]

    def test_zero_strength_is_exactly_the_base(self) -> None:
        """The recipe itself, so that the request takes the base's own path, bit for bit."""
        if self.zero_config is None:
            pytest.skip("the method has no strength that multiplies the whole change")
        recipe = self.method.resolve(
            self._config(self.zero_config), Snapshot(self.streams, taps=self.taps)
        )
        assert recipe == Recipe({BASE: 1.0})
        assert not self._resolve(self.zero_config).plan.steers

    def test_recipe_matches_the_reference(self) -> None:
        """The recipe's scores equal the method's own definition, up to a constant."""
        zero = () if self.zero_config is None else (self.zero_config,)
        for spec in (*self.configs, *zero):
            config = self._config(spec)
            recipe = self.method.resolve(config, Snapshot(self.streams, taps=self.taps))
            for logits in self._logits(recipe):
                with np.errstate(invalid="ignore"):
                    expected = self.method.reference(config, logits)
                _assert_same_scores(mix_reference(recipe, logits), expected)

    def test_front_end_loads_no_torch(self) -> None:
        """Importing the method in a fresh process leaves torch and vLLM out."""
        code = (
            f"import sys, {type(self.method).__module__}\n"
            "print(*({'torch', 'vllm'} & sys.modules.keys()))"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        loaded = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        assert loaded.stdout.split() == []

    def test_bad_configs_name_their_field(self) -> None:
        """Each is refused, with the dotted path of the field at fault."""
        for spec, field in self.bad_configs:
            with pytest.raises(SteeringError) as caught:
                self._resolve(spec)
            assert caught.value.field == ".".join(filter(None, ("steering", field))), spec

    def _config(self, spec: Spec) -> MethodConfig:
        return parse(spec, self.method, Snapshot(self.streams, taps=self.taps), Limits())

    def _resolve(self, spec: Spec) -> Resolved:
        return resolve(
            spec,
            methods={self.method.name: self.method},
            snapshot=Snapshot(self.streams, taps=self.taps),
            limits=Limits(),
        )

    def _logits(self, recipe: Recipe) -> Iterator[dict[str, Logits]]:
        """Random logits; then with ids (not all) that are −∞ in the base and every stream that
        counts.

        What an id gets that only some streams lack is not a method's to say.
        """
        random = np.random.default_rng(0)
        for size in VOCABULARIES:
            logits = {name: random.normal(0, 4, size) for name in self.streams}
            yield logits
            forbidden = random.random(size) < 0.1
            forbidden[random.integers(size)] = False
            counted = {BASE, *(name for name, weight in recipe.weights.items() if weight != 0)}
            yield {
                name: np.where(forbidden & (name in counted), -np.inf, scores)
                for name, scores in logits.items()
            }


def _expected_failure(test: object) -> bool:
    if not inspect.isfunction(test):
        return False
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "xfail"]
    return bool(marks) and all(mark.kwargs.get("reason") for mark in marks)


def _assert_same_scores(got: Logits, expected: Logits) -> None:
    """Equal up to an additive constant; an entry of `expected` that is not finite means −∞."""
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    assert (np.isfinite(got) == finite).all(), "the ids that are ruled out differ"
    assert (got[~finite] == -np.inf).all()
    if finite.any():
        difference = got[finite] - expected[finite]
        scale = max(1.0, float(np.abs(got[finite]).max()), float(np.abs(expected[finite]).max()))
        assert np.ptp(difference) <= TOLERANCE * scale
