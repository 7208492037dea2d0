"""The read-out on NVIDIA GPUs: where the worker chooses Triton, and what it hands to the kernels.

Checked through Triton's interpreter; has not been run on a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from vllm.platforms import current_platform

from steering.worker.layout import Control
from steering.worker.readout import Mixed, Readout

_LOG = logging.getLogger(__name__)


def readout_class() -> type[Readout]:
    """The Triton path, on platforms that have it; else the torch path."""
    if not current_platform.is_cuda():
        return Readout
    if importlib.util.find_spec("triton") is None:
        _LOG.warning("Triton is not installed: the read-out mixes in torch")
        return Readout
    return TritonReadout


@dataclass(frozen=True)
class TritonReadout(Readout):
    """As `Readout`, by the kernels of `steering.kernels.triton_mix`."""

    _marks: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict, init=False)

    def _mixed(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        control: Control,
        active: Sequence[bool],
        has_rules: bool,
        uniform_sum: bool,
    ) -> Mixed:
        from steering.kernels.triton_mix import Additions, Rule, read_out

        rows = torch.arange(len(base), dtype=torch.int32, device=base.device)
        places = rows[:, None].repeat(1, self.layout.streams)
        logits: list[torch.Tensor | None] = [base]
        whole = True
        for i in range(1, self.layout.streams):
            used, own = None, None
            if active[i]:
                used, own = self._own_logits(i, hidden, control.coef, uniform_sum)
            logits.append(own if own is not None and len(own) else None)
            if used is not None:
                whole = False
                places[used, i] = rows[: len(used)]
        if any(s is not None and s.dtype != base.dtype for s in logits):
            logits = [None if s is None else s.float() for s in logits]
        critical = self._log_odds(hidden, control) if has_rules and self.heads else None
        rule = None
        if has_rules:
            ends = self.ends.of(control.ends)
            rule = Rule(control.kind, control.stream, control.param, critical, ends=ends)
        more = (
            Additions(control.ids, control.added) if has_rules and self.layout.candidates else None
        )
        z, _ = read_out(
            logits,
            control.coef,
            rule,
            self._lacking(active),
            self._marked(base),
            None if whole else places,
            more,
        )
        return Mixed(z, base, control, critical)

    def _marked(self, base: torch.Tensor) -> torch.Tensor | None:
        """The table of `triton_mix.marks`; None if there is nothing to mark."""
        from steering.kernels.triton_mix import marks

        unshared = [self.padded, *(v.unshared for v in self.vocabularies[1:])]
        if all(ids is None for ids in unshared):
            return None
        key = base.shape[1], base.device
        if key not in self._marks:
            self._marks[key] = marks(base.shape[1], unshared, base.device)
        return self._marks[key]
