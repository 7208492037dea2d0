"""What the zoo must answer: plain `transformers` and PEFT in float32, one request at a time.

Nothing here uses the server's loading, kernels or caches. The linear methods are mixed by their
own slow definitions (`Method.reference`), values and critical tokens by the papers' formulas, with
a full forward for every candidate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from load_tests.soak.kinds import CHANGING, CONTENTS, GREEDY, PROMPTS, TOKENS, Kind, key_of
from steering.method import log_softmax
from steering.plan import BASE
from steering.plugins import discover
from tests.adapters.models import Applied, adapted
from tests.reference import load, one_thread, scores
from tests.server.adapting.answers import Expected

Float = npt.NDArray[np.float64]
METHODS = discover()


class Oracle:
    """Knows all answers.

    Args:
        config: the server's configuration, its paths absolute.
        adapters: the folder with the adapters.
    """

    def __init__(self, config: Mapping[str, Any], adapters: Path) -> None:
        self._config, self._adapters = config, adapters
        self._tokenizer: Any = AutoTokenizer.from_pretrained(config["model"])
        self._end = int(self._tokenizer.eos_token_id)
        self._template = Path(config["chat"]["template"]).read_text()

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation."""
        text = self._tokenizer.apply_chat_template(
            list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return found

    def greedy(self, kind: Kind, prompt: Sequence[int], content: str = "") -> Expected:
        """The greedy reply, at most `TOKENS` tokens; `content` stands for a changing name."""
        rows: list[tuple[int, float, int, float]] = []
        reply: list[int] = []
        while len(reply) < TOKENS and self._end not in reply:
            row = self._rows(kind, prompt, reply, len(reply), content)[0]
            best, second = (int(i) for i in np.argsort(-row, kind="stable")[:2])
            rows.append((best, float(row[best]), second, float(row[second])))
            reply.append(best)
        columns = tuple(zip(*rows, strict=True))
        return Expected(columns[0], columns[1], columns[2], columns[3])

    def logprobs(
        self, kind: Kind, prompt: Sequence[int], reply: Sequence[int], content: str = ""
    ) -> list[float]:
        """The log-probability of each token of a reply."""
        rows = self._rows(kind, prompt, reply[:-1], 0, content)
        return [float(row[token]) for row, token in zip(rows, reply, strict=True)]

    def value(self, stream: str, ids: Sequence[int]) -> float:
        """What a value stream says after a text."""
        return float(self._values(stream, [list(ids)])[0])

    # --- distributions ------------------------------------------------------------------------

    def _rows(
        self, kind: Kind, prompt: Sequence[int], reply: Sequence[int], first: int, content: str
    ) -> Float:
        """[T + 1 − first, V] log-probabilities of the next token after `first` … T tokens of it."""
        spec = self._spec(kind)
        own = {
            stream: self._tokenizer.encode(one["prompt"])
            for stream, one in spec.pop("prompts", {}).items()
        }
        read = {
            stream: [*own.get(stream, prompt), *reply] for stream in (BASE, *self._streams(spec))
        }
        with one_thread(), torch.inference_mode():
            rows = {
                stream: scores(self._model(stream, kind, content), ids)[first - len(reply) - 1 :]
                for stream, ids in read.items()
            }
            formula = getattr(self, f"_{spec['method']}", self._linear) if spec else self._alone
            found: Float = formula(spec, rows, prompt, reply, first, (kind, content))
        return found

    def _spec(self, kind: Kind) -> dict[str, Any]:
        if kind.steering is not None:
            return dict(kind.steering)
        if kind.model == BASE:
            return {}
        profile = dict(self._config["profiles"][kind.model])
        profile.pop("description", None)
        return profile

    def _streams(self, spec: Mapping[str, Any]) -> list[str]:
        """Language models that a spec names, the base left out."""
        heads = {name for name, one in self._config["streams"].items() if "head" in one}
        return [n for n in self._config["streams"] if f"'{n}'" in str(spec) and n not in heads]

    def _alone(self, _spec: Any, rows: Mapping[str, Float], *_: Any) -> Float:
        return _normal(rows[BASE])

    def _best_of_n(self, _spec: Any, rows: Mapping[str, Float], *_: Any) -> Float:
        return _normal(rows[BASE])

    def _linear(self, spec: Mapping[str, Any], rows: Mapping[str, Float], *_: Any) -> Float:
        method = METHODS[spec["method"]]
        config = method.config.model_validate(spec)
        return _normal(
            [
                method.reference(config, {stream: rows[stream][i] for stream in rows})
                for i in range(len(rows[BASE]))
            ]
        )

    def _critical_tokens(
        self, spec: Mapping[str, Any], rows: Mapping[str, Float],
        prompt: Sequence[int], reply: Sequence[int], first: int, who: tuple[Kind, str],
    ) -> Float:  # fmt: skip
        aligned, known = _normal(rows[BASE]), rows[spec["pretrained"]].copy()
        known[:, self._end] = -np.inf
        known = _normal(known)
        hidden = _hidden(self._model(BASE, *who), [[*prompt, *reply]])[0, len(prompt) - 1 + first :]
        q = 1 / (1 + np.exp(-self._head(spec["classifier"])(hidden).numpy()))
        with np.errstate(divide="ignore"):
            if spec.get("mode") == "soft":
                p = np.exp(aligned)
                rest = 1 - p[:, [self._end]]
                mixed = (1 - q)[:, None] * p + q[:, None] * rest * np.exp(known)
                mixed[:, self._end] = p[:, self._end]
                return np.asarray(np.log(mixed))
            certain = np.log(np.eye(known.shape[1])[known.argmax(1)])
        return np.where((q > spec.get("threshold", 0.5))[:, None], certain, aligned)

    def _value_augmented(
        self, spec: Mapping[str, Any], rows: Mapping[str, Float],
        prompt: Sequence[int], reply: Sequence[int], first: int, _who: Any,
    ) -> Float:  # fmt: skip
        found = rows[BASE].copy()
        rule = spec.get("eos_value", "prefix")
        for i, row in enumerate(found):
            ids = [*prompt, *reply[: first + i]]
            best = np.argsort(-row, kind="stable")[: spec.get("top_k", 20)]
            ending = best == self._end
            for term in spec["values"]:
                after = self._values(term["stream"], [[*ids, int(j)] for j in best])
                if rule == "prefix" and ending.any():
                    after[ending] = self.value(term["stream"], ids)
                counted = ~ending if rule == "zero" else np.ones_like(ending)
                delta = after[counted] - after[counted].mean()
                row[best[counted]] += term.get("strength", 1.0) * delta
        return _normal(found)

    # --- models -------------------------------------------------------------------------------

    def _model(self, stream: str, kind: Kind, content: str) -> Any:
        if stream != BASE:
            one = self._config["streams"][stream]
            return load(Path(one.get("model", self._config["model"])))
        if not kind.uses:
            return load(Path(self._config["model"]))
        applied = tuple(
            Applied(
                self._adapters / use.name.replace(CHANGING, content),
                use.weight,
                use.top_k,
                use.temperature,
            )
            for use in kind.uses
        )
        return adapted(Path(self._config["model"]), applied)

    def _values(self, stream: str, texts: Sequence[Sequence[int]]) -> Float:
        """[N] values after N texts of one length."""
        with one_thread(), torch.inference_mode():
            hidden = _hidden(self._valued(stream), texts)[:, -1]
            return np.asarray(self._head(stream)(hidden).numpy())

    @functools.cache  # noqa: B019 - one oracle lives as long as its process
    def _valued(self, stream: str) -> Any:
        one = self._config["streams"][stream]
        model = AutoModelForCausalLM.from_pretrained(one["model"], dtype=torch.float32)
        return PeftModel.from_pretrained(model, one["path"]).eval()

    @functools.cache  # noqa: B019
    def _head(self, stream: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """[…, H] float64 hidden states → […] what the head says."""
        folder = Path(self._config["streams"][stream]["path"])
        if (folder / "v_head.safetensors").is_file():
            head = load_file(folder / "v_head.safetensors")
            layers = [[head[f"v_head.summary.{part}"].double() for part in ("weight", "bias")]]
        else:
            head = load_file(folder / "model.safetensors")
            names = ("0.", "2.") if "0.weight" in head else ("",)
            layers = [[head[f"{n}{part}"].double() for part in ("weight", "bias")] for n in names]

        def says(x: torch.Tensor) -> torch.Tensor:
            for i, (weight, bias) in enumerate(layers):
                x = (x.tanh() if i else x) @ weight.T + bias
            return x[..., 0]

        return says


def references(oracle: Oracle, say: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
    """What the clients compare with: the prompts' ids, and the greedy reply of every kind.

    Args:
        oracle: knows it.
        say: called with the share that is done.
    """
    prompts = [oracle.prompt(messages) for messages in PROMPTS]
    jobs = [
        (kind, i, content)
        for kind in GREEDY
        for i in range(len(prompts))
        for content in (CONTENTS if kind.changing else ("",))
    ]
    expected = {}
    for number, (kind, i, content) in enumerate(jobs):
        found = oracle.greedy(kind, prompts[i], content)
        expected[key_of(kind.name, i, content)] = [
            found.ids, found.logprobs, found.second_ids, found.second
        ]  # fmt: skip
        say((number + 1) / len(jobs))
    return {"prompts": prompts, "expected": expected}


def _hidden(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[N, T, H] float64 last hidden states, behind the last norm."""
    ids = torch.tensor([list(text) for text in texts])
    out = model(ids, use_cache=False, output_hidden_states=True)
    hidden: torch.Tensor = out.hidden_states[-1].double()
    return hidden


def _normal(rows: Any) -> Float:
    """[N, V] log-probabilities; what is not finite is ruled out."""
    return np.stack([log_softmax(np.where(np.isfinite(row), row, -np.inf)) for row in rows])
