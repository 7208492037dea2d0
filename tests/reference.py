"""Multi-stream decoding, slow and obvious: what the engine tests compare with.

Plain `transformers` models in float32, one request at a time, as in the papers' own loops (with
transformers' own KV cache, which a test holds against none): every stream reads its own prompt
and all chosen tokens; at each step the streams' scores at the last position are mixed in float64.
Letters: V the base's vocabulary, T positions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from steering.method import Logits, log_softmax
from steering.plan import BASE

Mix = Callable[[Mapping[str, Logits]], Logits]
"""Stream name → [V] raw scores, to [V] steered scores up to an additive constant: a method's
`reference` with its config bound, `steering.kernels.reference.mix_reference` with its recipe, or
a formula of the test's own. An entry that is not finite rules its id out."""


@dataclass(frozen=True)
class Step:
    """One decoded token.

    Args:
        token: its id.
        logprob: log-probability under the steered model.
        base_logprob: under the base.
        kl: KL(steered ‖ base) of the step's distributions, nats.
        changed: whether the steered model's most likely id differs from the base's.
        logprobs: [V] the steered log-probabilities, if they were asked for.
    """

    token: int
    logprob: float
    base_logprob: float
    kl: float
    changed: bool
    logprobs: Logits | None = None


@functools.cache
def load(folder: Path) -> PreTrainedModel:
    """The checkpoint in float32, in inference mode."""
    return fresh(folder)


def fresh(folder: Path) -> PreTrainedModel:
    """As `load`, a model that the caller may change."""
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the others leave the cap out
    if model.config.model_type == "cohere2":
        # vLLM's window has one token more: its source says that the models were trained so.
        model.config.sliding_window += 1
    if model.config.model_type == "bloom":
        # vLLM computes the activation, which BLOOM's own code approximates.
        for block in model.transformer.h:
            block.mlp.gelu_impl = torch.nn.GELU()
    return model.eval()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For models this small, torch's threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scores(model: PreTrainedModel, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """[T, V_model] float64 scores of the next token after each of the T ids."""
    with one_thread(), torch.inference_mode():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    found: npt.NDArray[np.float64] = logits.double().numpy()
    return found


class TapModel:
    """A model that is read out after fewer than all of its layers.

    Args:
        model: the model.
        layer: index into its `hidden_states`.
        norm: whether its final norm stands before the unembedding.
    """

    def __init__(self, model: PreTrainedModel, layer: int, norm: bool) -> None:
        self._model, self._layer = model, layer
        body = next(m for m in model.modules() if any(_is_stack(c) for c in m.children()))
        norms = [m for n, m in body.named_children() if "norm" in n or n.startswith("ln")]
        self._norm = norms[-1] if norm else torch.nn.Identity()
        self._body = body

    def __call__(self, ids: torch.Tensor, **options: object) -> object:
        """As the model's, with the scores of the layer."""

        def early(_module: object, _inputs: object, out: Any) -> Any:
            out.last_hidden_state = self._norm(out.hidden_states[self._layer])
            return out

        handle = self._body.register_forward_hook(early)
        try:
            return self._model(ids, output_hidden_states=True, **options)
        finally:
            handle.remove()


def _is_stack(module: object) -> bool:
    return isinstance(module, torch.nn.ModuleList) and len(module) > 0


class Reader:
    """A model that reads a text bit by bit.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: object = None

    def read(self, ids: Sequence[int]) -> Logits:
        """[V_model] float64 scores of the next token after all that was read, `ids` included."""
        with one_thread(), torch.inference_mode():
            out = self._model(
                torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True
            )
        self._cache = out.past_key_values
        found: Logits = out.logits[0, -1].double().numpy()
        return found


def greedy(logprobs: Logits) -> int:
    """The most likely id, the lowest of equals."""
    return int(logprobs.argmax())


def decode(
    models: Mapping[str, PreTrainedModel],
    prompts: Mapping[str, Sequence[int]],
    mix: Mix,
    *,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    choose: Callable[[Logits], int] = greedy,
    read_as: Mapping[str, Sequence[int]] | None = None,
    keep_logprobs: bool = False,
) -> list[Step]:
    """Decodes one request.

    Args:
        models: stream name → model; `base` is one of them. A stream with `same_as: base` is the
            base's model once more.
        prompts: stream name → prompt ids. A stream that is left out reads the base's.
        mix: the method.
        max_tokens: how many tokens, unless one of `stop_ids` comes first (it is the last step).
        stop_ids: ids that end the response.
        choose: [V] steered log-probabilities → the id to append.
        read_as: stream name → [V], the id that the stream reads for each of the base's; a stream
            that is left out reads them as they are. A prompt of the stream's own is not translated.
        keep_logprobs: fill `Step.logprobs`.
    """
    read_as = read_as or {}

    def reads(name: str, ids: Sequence[int]) -> list[int]:
        return [read_as[name][i] for i in ids] if name in read_as else list(ids)

    news = {
        name: list(prompts[name]) if name in prompts else reads(name, prompts[BASE])
        for name in models
    }
    readers = {name: Reader(model) for name, model in models.items()}
    steps: list[Step] = []
    while len(steps) < max_tokens:
        rows = {name: reader.read(news[name]) for name, reader in readers.items()}
        steered, base = _distributions(rows, mix)
        token = choose(steered)
        steps.append(
            Step(
                token=token,
                logprob=float(steered[token]),
                base_logprob=float(base[token]),
                kl=kl(steered, base),
                changed=greedy(steered) != greedy(base),
                logprobs=steered if keep_logprobs else None,
            )
        )
        news = {name: reads(name, [token]) for name in models}
        if token in stop_ids:
            break
    return steps


def prompt_logprobs(
    models: Mapping[str, PreTrainedModel], ids: Sequence[int], mix: Mix
) -> npt.NDArray[np.float64]:
    """The steered model's log-probabilities along a prompt that all streams read.

    Returns:
        [T − 1, V] float64: row t is the distribution of `ids[t + 1]` after `ids[: t + 1]`. The
        first id has none.
    """
    rows = {name: scores(model, ids) for name, model in models.items()}
    return np.stack(
        [
            _distributions({name: r[t] for name, r in rows.items()}, mix)[0]
            for t in range(len(ids) - 1)
        ]
    )


def kl(steered: Logits, base: Logits) -> float:
    """KL(steered ‖ base) of two [V] vectors of log-probabilities, nats."""
    possible = np.isfinite(steered)
    return float(np.sum(np.exp(steered[possible]) * (steered[possible] - base[possible])))


def over_vocabularies(
    mix: Mix, unshared: Mapping[str, Collection[int]], padded: Collection[int] = ()
) -> Mix:
    """A mix for streams whose vocabularies differ from the base's.

    Args:
        mix: `mix_reference` with a recipe, which knows what an id without a delta gets.
        unshared: stream → ids that it lacks.
        padded: ids of the base's table that stand for no token; never chosen.
    """

    def mixed(rows: Mapping[str, Logits]) -> Logits:
        rows = {name: row.copy() for name, row in rows.items()}
        for name, row in rows.items():
            row[[*padded, *unshared.get(name, ())]] = -np.inf
        z = mix(rows)
        z[list(padded)] = -np.inf
        return z

    return mixed


def _distributions(rows: Mapping[str, Logits], mix: Mix) -> tuple[Logits, Logits]:
    """The steered and the base's log-probabilities, [V] each."""
    base = rows[BASE]
    with np.errstate(invalid="ignore"):  # −∞ − (−∞) where a stream lacks an id
        z = mix({name: _fit(row, base.size) for name, row in rows.items()})
    return log_softmax(np.where(np.isfinite(z), z, -np.inf)), log_softmax(base)


def _fit(row: Logits, size: int) -> Logits:
    """A stream's scores over the base's ids: cut, or −∞ where its table is shorter."""
    return np.concatenate([row[:size], np.full(max(0, size - row.size), -np.inf)])
