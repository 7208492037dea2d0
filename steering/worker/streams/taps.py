"""Taps: streams that read out the hidden state between two layers of another stream.

The layer in front of which a tap reads keeps its input, at a place that stays, so compiled code and
captured graphs keep it too. What enters layer n is what left layer n − 1, with whatever adds to
that; layers are counted from 0, and in front of layer 0 are the embeddings.

vLLM's own auxiliary hidden states (EAGLE-3) are those of some architectures only. Here it is shown
once, on numbers, that the state behind the last layer makes the model's own output; where it does
not, the tap is refused.

Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import (
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
    set_forward_context,
)
from vllm.model_executor.layers.attention import Attention

Finish = Callable[[torch.Tensor], torch.Tensor]
"""[T, H] states between layers → what the model's `compute_logits` takes."""

KEPT = "coxswain_kept"
"""Buffer of a layer that keeps its input: [most tokens of a pass, H]."""

TOKENS = 3
"""Tokens of the pass on which a model is tried."""


class Taps:
    """The taps of an engine.

    Args:
        sources: the streams beside the base, as `steering.engine_args.StreamSource` fields.
        tapped: tap → the stream of which it reads a layer.
        models: stream that runs → its model; twins have their originals'.
        vllm_config: the engine's.

    Raises:
        ValueError: a model's layers cannot be tapped; the message names the tap.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping[str, Any]],
        tapped: Mapping[str, str],
        models: Mapping[str, Any],
        vllm_config: VllmConfig,
    ) -> None:
        self._config = vllm_config
        self._sources = sources
        self._tapped = tapped
        self._stacks: dict[int, _Stack] = {}
        self._of: dict[str, _Stack] = {}
        self._tried = not tapped
        for name, stream in tapped.items():
            model = models[stream]
            if id(model) not in self._stacks:
                self._stacks[id(model)] = _Stack.of(name, model)
            stack = self._of[name] = self._stacks[id(model)]
            stack.keep(name, sources[name]["layer"], vllm_config)

    def try_models(self) -> None:
        """Finds out, once and before anything is compiled, how each tapped model ends.

        Raises:
            ValueError: as the class.
        """
        if self._tried:
            return
        for stack in self._stacks.values():
            stack.try_model(self._config)
        self._tried = True

    def kept(self, name: str) -> torch.Tensor:
        """[most tokens of a pass, H] where the states lie that a tap reads."""
        layer = self._of[name].layers[self._sources[name]["layer"]]
        found: torch.Tensor = getattr(layer, KEPT)
        return found

    def finish(self, name: str) -> Finish:
        """What makes a tap's states those that `compute_logits` takes."""
        if not self._sources[name]["norm"]:
            return _as_it_is
        stack = self._of[name]
        return lambda states: stack.finish(states)


@dataclass
class _Stack:
    """The layers of one model.

    Args:
        tap: one that reads them, for errors.
        model: whose they are.
        owner: the module that runs them.
        layers: in order.
    """

    tap: str
    model: Any
    owner: Any
    layers: Sequence[Any]
    _norm: Any = field(default=None, init=False)

    @classmethod
    def of(cls, tap: str, model: Any) -> _Stack:
        """The layers of a model: its outermost list of modules that take hidden states."""
        for _, owner in model.named_modules():
            for child in owner.children():
                if isinstance(child, nn.ModuleList) and child and all(map(_is_layer, child)):
                    return cls(tap, model, owner, [*child])
        raise _refused(tap, model, "no list of layers that take hidden_states was found in it")

    def keep(self, tap: str, number: int, config: VllmConfig) -> None:
        """Has a layer keep its input."""
        if not 0 <= number < len(self.layers):
            raise _refused(tap, self.model, f"it has layers 0 to {len(self.layers) - 1}, and the "
                                            f"tap reads in front of layer {number}")  # fmt: skip
        layer = self.layers[number]
        if hasattr(layer, KEPT):
            return
        width = self.model.config.get_text_config().hidden_size
        most, dtype = config.scheduler_config.max_num_batched_tokens, config.model_config.dtype
        layer.register_buffer(KEPT, torch.zeros(most, width, dtype=dtype), persistent=False)
        layer.__class__ = _keeping(type(layer))

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        """[T, H] through the final norm."""
        return _first(states if self._norm is None else self._norm(states))

    def try_model(self, config: VllmConfig) -> None:
        """Tries by which of a few rules the last layer's output becomes the model's."""
        seen: list[Any] = []
        hook = self.layers[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
        ids = torch.arange(1, TOKENS + 1, device=getattr(self._kept(), KEPT).device)
        with _uncompiled(config), _without_attention(config), torch.inference_mode():
            want = self.model(
                input_ids=ids.int(),
                positions=ids - 1,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        hook.remove()
        for together in (True, False):
            state = _state(seen[-1], together)
            for norm in self._norms():
                self._norm = norm
                if state is not None and self._ends_in(state, want):
                    for layer in self.layers:
                        layer.coxswain_together = together
                    return
        raise _refused(self.tap, self.model, "its output is not its final norm of what its last "
                                             "layer returns")  # fmt: skip

    def _kept(self) -> Any:
        return next(layer for layer in self.layers if hasattr(layer, KEPT))

    def _norms(self) -> list[Any]:
        found = [module for name, module in self.owner.named_children() if _is_norm(name)]
        return [*reversed(found), None]

    def _ends_in(self, state: torch.Tensor, want: Any) -> bool:
        try:
            with torch.inference_mode():
                got = self.finish(state)
        except (RuntimeError, TypeError, ValueError, AssertionError):
            return False
        if not isinstance(want, torch.Tensor) or got.shape != want.shape:
            return False
        # Kernels that add and norm at once may round once less.
        size = want.float().abs().amax(-1, keepdim=True)
        error = (got.float() - want.float()).abs()
        return bool((size > 0).all() and (error <= _ROUNDING[want.dtype] * size).all())


_ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def _keeping(kind: type) -> type:
    """A class of layers as another, which keeps its input; `super` is not for compilers."""
    names = [*inspect.signature(kind.forward).parameters][1:]  # type: ignore[attr-defined]
    at = names.index("hidden_states")
    residual_at = names.index("residual") if "residual" in names else None
    forward = kind.forward  # type: ignore[attr-defined]

    def kept_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[at]
        residual = kwargs.get("residual")
        if residual is None and residual_at is not None and residual_at < len(args):
            residual = args[residual_at]
        if not self.coxswain_together:
            residual = None
        torch.ops.coxswain.keep_state(self.coxswain_kept, states, residual)
        return forward(self, *args, **kwargs)

    # By its module and name a class tells how its layers hand states on (`families.BLOCKS`).
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**own, "forward": kept_forward, "coxswain_together": True})


def _keep(out: torch.Tensor, states: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Writes [T, H] states, or their sum with a residual, into the first rows of `out`."""
    states = states.reshape(-1, out.shape[1])
    if states.shape[0] > out.shape[0]:
        raise RuntimeError(f"a pass of {states.shape[0]} tokens; a tap has room for {out.shape[0]}")
    place = out[: states.shape[0]]
    if residual is None:
        place.copy_(states)
    else:
        torch.add(states, residual.reshape(-1, out.shape[1]), out=place)


def _changes_out(out: torch.Tensor, states: torch.Tensor, residual: torch.Tensor | None) -> None:
    """What a compiler needs to know: it changes `out` in place and returns nothing."""


_library = torch.library.Library("coxswain", "FRAGMENT")
_library.define("keep_state(Tensor(a!) out, Tensor states, Tensor? residual) -> ()")
_library.impl("keep_state", _keep, "CompositeExplicitAutograd")
torch.library.register_fake("coxswain::keep_state", _changes_out, lib=_library)


def _is_layer(module: Any) -> bool:
    return "hidden_states" in inspect.signature(type(module).forward).parameters


def _is_norm(name: str) -> bool:
    return "norm" in name or name.startswith("ln")


def _state(out: Any, together: bool) -> torch.Tensor | None:
    """[T, H] the state that a layer returned; None if it is not of that form."""
    parts = out if isinstance(out, tuple | list) else (out,)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if not tensors:
        return None
    found = tensors[0]
    if together and len(tensors) > 1:
        if tensors[1].shape != found.shape:
            return None
        found = found + tensors[1]
    return found.reshape(-1, found.shape[-1])


def _first(out: Any) -> torch.Tensor:
    """Some norms return the residual as well."""
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _as_it_is(states: torch.Tensor) -> torch.Tensor:
    return states


def _refused(tap: str, model: Any, why: str) -> ValueError:
    return ValueError(f"stream {tap!r}: {type(model).__name__} cannot be tapped: {why}")


@contextmanager
def _without_attention(config: VllmConfig) -> Iterator[None]:
    """Attention gives zeros: without requests it may leave its output as the memory was."""
    layers = config.compilation_config.static_forward_context.values()
    quiet: list[Any] = [layer for layer in layers if isinstance(layer, Attention)]
    for layer in quiet:
        layer.forward = _Zeros(layer.forward)
    try:
        yield
    finally:
        for layer in quiet:
            del layer.forward


@dataclass(frozen=True)
class _Zeros:
    forward: Callable[..., torch.Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(self.forward(*args, **kwargs))


@contextmanager
def _uncompiled(config: VllmConfig) -> Iterator[None]:
    """A forward context without requests, in which models run as they are written."""
    if not is_forward_context_available():
        with set_forward_context(None, config, num_tokens=TOKENS, skip_compiled=True):
            yield
        return
    inner = copy(get_forward_context())
    inner.skip_compiled = True
    with override_forward_context(inner):
        yield
