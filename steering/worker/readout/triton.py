"""The read-out on NVIDIA GPUs: where the worker chooses Triton, and what it hands to the kernels.

Checked through Triton's interpreter; has not been run on a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, field, replace

import torch
from vllm.platforms import current_platform

from steering.kernels.layers import Contrast
from steering.kernels.mix import FEW_ROWS, Measures
from steering.worker.plan.layout import Control
from steering.worker.plan.step_plan import Classes
from steering.worker.readout.parts import Mixed
from steering.worker.readout.readout import Readout

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
        self, plain: Mixed, control: Control, classes: Classes, reported: torch.Tensor | None
    ) -> Mixed:
        from steering.kernels.triton_mix import Additions, read_out

        if classes.shared:  # the kernels have no ranks; such rows are few, at the start of replies
            return super()._mixed(plain, control, classes, reported)
        base = plain.base
        logits = [base, *(None if s is None else s.own for s in plain.streams[1:])]
        if any(s is not None and s.dtype != base.dtype for s in logits):
            logits = [None if s is None else s.float() for s in logits]
        rules = additions = asking = None
        if classes.has_rules:
            rules = self._rules(control, classes, self._odds(plain))
            additions = Additions(control.ids, control.added) if self.layout.candidates else None
        if reported is not None:
            asking = base.new_zeros(len(base), dtype=torch.float32).index_fill_(0, reported, 1.0)
        z, measures = read_out(
            logits,
            control.coef,
            rules,
            self._lacking(classes.active),
            self._marked(base),
            additions,
            asking,
        )
        if measures is not None and reported is not None:
            measures = Measures(*(numbers[reported] for numbers in measures))
        return plain._replace(z=z, measures=measures)

    def _contrasted(self, plain: Mixed, control: Control) -> Contrast:
        from steering.kernels.triton_layers import contrast

        logits = [plain.base, *(None if s is None else s.own for s in plain.streams[1:])]
        return contrast(logits, control.coef, control.layers, self._marked(plain.base))

    def rows_where(self, mask: torch.Tensor) -> None:
        """All rows: the kernels read the control."""

    def _odds(self, plain: Mixed) -> torch.Tensor:
        """The rows' log-odds; zeros where there are none to read: no variant more."""
        if plain.critical is None:
            return torch.zeros(len(plain.base), device=plain.base.device)
        return plain.critical

    def warm_up(self, device: torch.device) -> None:
        """Compiles every variant of the kernels that can occur, before anybody waits for one.

        A variant is what `triton_mix.VARIANTS` counts. All ranks call this together.
        """
        everything = Classes.all(self.layout.streams, len(self.heads), bool(self.taps))
        active = [
            tuple(i in (0, j) for i in range(self.layout.streams))
            for j, _ in enumerate(self.unembed)
        ]
        reported = torch.zeros(1, dtype=torch.int64, device=device)
        for rows in (1, 2, FEW_ROWS + 1):
            hidden = torch.zeros(rows, self.layout.width, dtype=self.layout.dtype, device=device)
            for ran in (everything.active, *active):
                for classes in (replace(everything, active=ran), Classes(ran)):
                    self(hidden, classes)
                    self(hidden, classes, reported)

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
