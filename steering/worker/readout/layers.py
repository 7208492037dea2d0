"""Rules over layers in the read-out: what happens to taps before the streams are summed.

Lives in the worker. Letters: R rows, S streams (base first), V the base's vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from steering.kernels.layers import Contrast, Tap, contrast, evolved
from steering.kernels.mix import NEVER, measure
from steering.kernels.reference import MOST_KEPT
from steering.plan import LayerKind
from steering.worker.plan.layout import Control
from steering.worker.readout.parts import Mixed

if TYPE_CHECKING:
    from steering.worker.readout.readout import Readout

CONTRASTS = (LayerKind.CONTRAST, LayerKind.CONTRAST_JSD)


def is_kind(control: Control, *kinds: LayerKind) -> torch.Tensor:
    """[R] bool: rows with one of these rules."""
    found = torch.zeros_like(control.layers, dtype=torch.bool)
    for kind in kinds:
        found |= control.layers == float(kind)
    return found


def contrasted(readout: Readout, plain: Mixed, control: Control) -> Contrast:
    """The coefficients of all rows, and the shifts of their scores, [R].

    Args:
        readout: of the steered model.
        plain: what the streams have of their own.
        control: of the R rows.
    """
    which = is_kind(control, *CONTRASTS)
    base, taps, some, rows = _rows(readout, plain, control, which)
    found = contrast(base, taps, some.coef, is_kind(some, LayerKind.CONTRAST_JSD))
    if rows is None:
        coef = torch.where(which[:, None], found.coef, control.coef)
        return Contrast(coef, torch.where(which, found.shift, 0.0))
    coef, shift = control.coef.clone(), torch.zeros_like(control.param)
    coef[rows], shift[rows] = found
    return Contrast(coef, shift)


def evolve(readout: Readout, plain: Mixed, control: Control, z: torch.Tensor) -> torch.Tensor:
    """[R, V] `z` with the rows that evolve, from what the streams have of their own."""
    which = is_kind(control, LayerKind.EVOLVE)
    base, taps, some, rows = _rows(readout, plain, control, which)
    found = evolved(base, taps, some.coef, some.rate, some.top_k, MOST_KEPT)
    if rows is None:
        return torch.where(which[:, None], found, z)
    return z.index_copy(0, rows, found)


def base_alone(control: Control) -> Control:
    """The same with the rows that evolve as rows of the base: they are not summed."""
    which = is_kind(control, LayerKind.EVOLVE)[:, None]
    base = torch.zeros_like(control.coef)
    base[:, 0] = 1
    return control._replace(coef=torch.where(which, base, control.coef))


def shifted(mixed: Mixed, shift: torch.Tensor, reported: torch.Tensor | None) -> Mixed:
    """The same with something added to the scores of each row, and to their mass."""
    mixed.z.add_(shift[:, None])
    if mixed.measures is None:
        return mixed
    assert reported is not None
    measures = mixed.measures._replace(mass=mixed.measures.mass + shift[reported])
    return mixed._replace(measures=measures)


def measured_again(mixed: Mixed, reported: torch.Tensor | None) -> Mixed:
    """The same with measures of its scores as they are."""
    if reported is None:
        return mixed
    return mixed._replace(measures=measure(mixed.z[reported], mixed.base[reported].float()))


def _rows(
    readout: Readout, plain: Mixed, control: Control, which: torch.Tensor
) -> tuple[torch.Tensor, list[Tap | None], Control, torch.Tensor | None]:
    """(the base's scores, the taps', control, which rows) of the rows where `which` holds; of all
    on a device that the host would have to wait for.
    """
    rows = readout.rows_where(which)
    base = (plain.base if rows is None else plain.base[rows]).float()
    if readout.padded is not None:
        base = base.index_fill(1, readout.padded, NEVER)
    some = control if rows is None else Control(*(part[rows] for part in control))
    taps: list[Tap | None] = [None]
    for i, scores in enumerate(plain.streams[1:], 1):
        tap = None if scores is None else partial(readout.on_rows, i, scores, base, rows)
        taps.append(tap)
    return base, taps, some, rows
