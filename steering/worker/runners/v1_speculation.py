"""The seam to vLLM's speculation: how drafts are drawn, and what the rejection sampler is given.

Checked on vLLM 0.32.0, Model Runner V1 (CPU build). Letters: n requests draft, K drafts each,
V the base's vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.bad_words import apply_bad_words
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample

from steering.worker.plan.batches import Int64


def expand(
    values: torch.Tensor,
    ends: torch.Tensor,
    total: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """[total] each request's value once for each of its drafts, in place of vLLM's function.

    That of the CPU build leaves its result uninitialised, so that drafts were verified at any
    temperature, top-k and top-p.

    Args:
        values: [Q] of any dtype.
        ends: [Q] where each request's drafts end.
        total: drafts of all requests.
        replace_from: a value that stands for another,
        replace_to: which is this one.
    """
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    values = torch.where(values == replace_from, values.new_tensor(replace_to), values)
    return values.repeat_interleave(counts, output_size=total)


class Draws:
    """Draws drafts the way the target will draw: same penalties, temperature, top-k and top-p.

    A grammar is the exception. vLLM cuts drafts off where the grammar forbids one, which keeps the
    distribution only if the draft was certain; requests with a grammar draft their most likely id.

    Args:
        runner: after its bookkeeping of the step.
        rows: [n] the requests that draft.
    """

    def __init__(self, runner: Any, rows: Int64) -> None:
        self._metadata = metadata = runner.input_batch.sampling_metadata
        self._rows = rows.tolist()
        self._index = index = torch.from_numpy(rows).to(runner.device)
        self.certain = torch.ones(len(rows), dtype=torch.bool, device=runner.device)
        if metadata.all_greedy:
            return
        ids = runner.input_batch.req_ids
        asked = [runner.requests[ids[row]].sampling_params for row in self._rows]
        ruled = [params.structured_outputs is not None for params in asked]
        temperature = metadata.temperature[index]
        self.certain = (temperature == 0) | torch.tensor(ruled, device=runner.device)
        self._temperature = torch.where(temperature == 0, 1.0, temperature)[:, None]
        self._top_k = None if metadata.top_k is None else metadata.top_k[index]
        self._top_p = None if metadata.top_p is None else metadata.top_p[index]
        generators = metadata.generators
        self._generators = {
            i: generators[row] for i, row in enumerate(self._rows) if row in generators
        }

    def __call__(
        self, scores: torch.Tensor, before: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([n] int64 ids, [n, V] the probabilities they were drawn with; None: all were certain).

        Args:
            scores: [n, V] float32, changed in place.
            before: the drafts of the request so far, [n] each.
        """
        scores = self._restrict(scores, before)
        best = scores.argmax(-1)
        # Where the stream lacks all that is allowed, or gives no numbers, its draft is any id, for
        # certain: the target rejects it, and draws as if nothing had been drafted.
        certain = self.certain | ~scores.amax(-1).isfinite()
        if self.certain.all():
            return best, None
        scores = apply_top_k_top_p(scores.div_(self._temperature), self._top_k, self._top_p)
        chances = scores.softmax(-1)
        chances[certain] = 0
        chances[certain, best[certain]] = 1
        return random_sample(chances.clone(), self._generators), chances

    def _restrict(self, scores: torch.Tensor, before: Sequence[torch.Tensor]) -> torch.Tensor:
        metadata, index = self._metadata, self._index
        words = metadata.bad_words_token_ids
        if not metadata.no_penalties or words:
            drafts = torch.stack(tuple(before), 1).tolist() if before else [[]] * len(self._rows)
            past = [
                [*metadata.output_token_ids[row], *ids]
                for row, ids in zip(self._rows, drafts, strict=True)
            ]
        if not metadata.no_penalties:
            scores = apply_all_penalties(
                scores,
                metadata.prompt_token_ids[index],
                metadata.presence_penalties[index],
                metadata.frequency_penalties[index],
                metadata.repetition_penalties[index],
                past,
            )
        if metadata.allowed_token_ids_mask is not None:
            scores.masked_fill_(metadata.allowed_token_ids_mask[index], float("-inf"))
        if words:
            own = {i: words[row] for i, row in enumerate(self._rows) if row in words}
            apply_bad_words(scores, own, past)
        return scores


class _Offer(NamedTuple):
    """Drafts that were not verified yet: K ids, and [K, V] what they were drawn with."""

    ids: list[int]
    chances: torch.Tensor | None


class SpeculationSeam:
    """Draws drafts for a V1 model runner and tells it what they were drawn with.

    Args:
        runner: the worker's model runner, with speculation.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._offers: dict[str, _Offer] = {}
        # vLLM drafts for nobody while one request is near the end of the context. Here that
        # request goes without drafts by itself.
        runner.effective_drafter_max_model_len = sys.maxsize
        sample = runner._sample

        def without_drafts_as_ever(logits: torch.Tensor, metadata: Any) -> Any:
            """On CPUs vLLM's rejection sampler ends the engine in a step without any draft if a
            request there has a top-k. Such a step is a plain one.
            """
            drafted = metadata is not None and any(metadata.num_draft_tokens)
            return sample(logits, metadata if drafted else None)

        runner._sample = without_drafts_as_ever
        if runner.device.type == "cpu":
            rejection_sampler.expand_batch_to_tokens = expand

    def draws(self, rows: Int64) -> Draws:
        """How these requests of the step draw."""
        return Draws(self._runner, rows)

    def offer(self, rows: Int64, drafts: list[list[int]], chances: torch.Tensor | None) -> None:
        """Tells the rejection sampler what this step's drafts were drawn with.

        vLLM forgets what it is given after one step, but a request that waits for room in the
        batch is verified later, and then as if its drafts had been certain: its replies would
        have another distribution. So all that is open is given again.

        Args:
            rows: [n] of the step.
            drafts: [n][K] their drafts.
            chances: [n, K, V]; None if all were certain.
        """
        ids, known = self._runner.input_batch.req_ids, self._runner.requests
        done = set(ids)
        self._offers = {i: o for i, o in self._offers.items() if i not in done and i in known}
        for i, (row, own) in enumerate(zip(rows.tolist(), drafts, strict=True)):
            self._offers[ids[row]] = _Offer(own, None if chances is None else chances[i])
        sizes = [o.chances.shape for o in self._offers.values() if o.chances is not None]
        if not sizes:
            return
        given = [
            self._certain(o.ids, sizes[0]) if o.chances is None else o.chances
            for o in self._offers.values()
        ]
        self._runner._draft_probs = torch.stack(given)
        self._runner._draft_prob_req_ids = list(self._offers)

    def _certain(self, ids: list[int], size: torch.Size) -> torch.Tensor:
        """[K, V] with all weight on the drafts."""
        found = torch.zeros(size, device=self._runner.device)
        found[torch.arange(len(ids)), ids] = 1
        return found

    def to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """A host array on the model's device."""
        return torch.from_numpy(array).to(self._runner.device, non_blocking=True)
