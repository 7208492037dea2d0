"""Where texts end in the replies of a step's requests, for adapters that act behind them.

The host has to know, since it says which tokens an adapter changes: where the newest tokens are on
the device only (Model Runner V2), a step that has such requests waits for them. Looked at anew in
each step, so nothing is kept that a rejected draft or a preemption could make wrong.

Letters: Q requests of this step, T tokens, m requests with texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Self

import numpy as np
import torch

from adapters.where import MANY
from steering.plan import AdapterUse
from steering.worker.plan.batches import Int32, Int64, Schedule
from steering.worker.plan.phases import FAR, Ids, Replies, behind


class Told(NamedTuple):
    """What the host knows of a step's tokens, where it says which of them adapters change.

    Args:
        seen: ids of a text → [Q] how many tokens of the reply it ends behind.
        positions: [T] of the tokens in their requests, where the schedule's are bounds; None: they
            are not, or nothing depends on them.
    """

    seen: Mapping[tuple[int, ...], Int64] = MappingProxyType({})
    positions: Int64 | None = None


NOTHING = Told()


def counts_reply(adapters: Sequence[tuple[AdapterUse, ...]]) -> bool:
    """Whether any adapter of [Q] requests acts on some of a reply's tokens and not on others."""
    places = {where for uses in adapters for use in uses for where in use.where}
    return any(w.texts or w.start or 0 < w.stop < MANY for w in places)


@dataclass(frozen=True, slots=True)
class AdapterTexts:
    """The texts that bound where the adapters of a step's requests act.

    Args:
        texts: each once.
        rows: [m] requests that have any.
    """

    texts: tuple[Ids, ...]
    rows: Int64

    @classmethod
    def of(cls, adapters: Sequence[tuple[AdapterUse, ...]]) -> Self | None:
        """Those of [Q] requests; None if there are none.

        Raises:
            ValueError: the tokens of one are missing.
        """
        own = [{t for use in uses for where in use.where for t in where.texts} for uses in adapters]
        if not any(own):
            return None
        if any(not text.ids for texts in own for text in texts):
            raise ValueError("the tokens of a text are missing that bounds where an adapter acts")
        texts = dict.fromkeys(text.ids for one in own for text in sorted(one))
        return cls(tuple(texts), np.flatnonzero([bool(one) for one in own]))

    def seen(
        self,
        replies: Sequence[Int32] | Replies,
        schedule: Schedule,
        prompts: Int64,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
    ) -> dict[Ids, Int64]:
        """Ids of a text → [Q] how many tokens of the reply it first ends behind, else `MANY`.

        Args:
            replies: of `rows`; see `RunnerView.replies`.
            schedule: of the step.
            prompts: [Q] tokens in front of each reply.
            input_ids: [≥ T] of the step.
            positions: [≥ T] of its tokens in their requests.
        """
        if isinstance(replies, Replies):
            replies = self._read(replies, schedule, input_ids, positions)
        found = {text: np.full(len(prompts), MANY, np.int64) for text in self.texts}
        for row, ids in zip(self.rows, replies, strict=True):
            tokens, prompt = torch.from_numpy(ids)[None], torch.tensor([int(prompts[row])])
            for text, at in found.items():
                first = int(behind(tokens, prompt, text))
                at[row] = MANY if first >= FAR else first
        return found

    def _read(
        self,
        replies: Replies,
        schedule: Schedule,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
    ) -> list[Int32]:
        """[m] the requests' tokens, this step's included."""
        total = schedule.tokens
        places, ids = positions[:total].cpu().numpy(), input_ids[:total].cpu().numpy()
        found = []
        for row, slot in zip(self.rows, replies.slots, strict=True):
            own = slice(schedule.starts[row], schedule.starts[row + 1])
            table = replies.table[int(slot), : int(places[own][-1]) + 1].cpu().numpy()
            table = table.astype(np.int32)
            # Drafts are nowhere but in the step.
            table[places[own]] = ids[own]
            found.append(table)
        return found
