"""The two forms in which MeteoRA's authors compute it, as baselines for `load_tests.adapter_bench`.

Written from the formulas (arXiv 2405.13053), in the place of `adapters.kernels.gated.add_adapters`
and over the same slots, so that a whole engine can be timed with each.

Letters: T tokens, M members of rank r, k members per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from adapters.kernels.gated import Group, Route

Form = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None
]
"""(y [T, out] changed in place, x [T, in], a [M, r, in], b [M, out, r], chosen [T, k], weights
[T, k])."""


def loop(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Member by member, over the tokens routed to it."""
    for member in range(a.shape[0]):
        tokens, place = torch.where(chosen == member)
        added = x[tokens] @ a[member].T @ b[member].T
        y.index_add_(0, tokens, weights[tokens, place, None] * added)


def gathered(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """One copy of A and B per token and member, and two batched products."""
    tokens, k = chosen.shape
    rows = x[:, None].expand(tokens, k, -1).reshape(tokens * k, 1, -1)
    flat = chosen.flatten()
    shrunk = torch.bmm(rows, a[flat].transpose(1, 2))
    added = torch.bmm(shrunk, b[flat].transpose(1, 2)).squeeze(1) * weights.view(-1, 1)
    y += added.view(tokens, k, -1).sum(1)


FORMS: dict[str, Form] = {"loop": loop, "gathered": gathered}


def adding(form: Form) -> Callable[..., None]:
    """A form as `add_adapters`, for a batch in which every token uses one and the same pack."""

    def add(
        y: torch.Tensor,
        x: torch.Tensor,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        sizes: Sequence[int],
        groups: Sequence[Group],
        over_ranks: object = None,
    ) -> None:
        assert over_ranks is None, "the authors' forms know one rank only"
        (group,) = groups
        (route,) = group.routes
        assert group.tokens is None
        for part, a_all, b_all in _parts(y, a, b, sizes):
            weights = a_all[group.slot, 0], b_all[group.slot, 0, : part.shape[1]]
            form(part, x, *_members(route, *weights), *_chosen(route, x, weights[0]))

    return add


def _parts(
    y: torch.Tensor, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], sizes: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per packed layer (q, k, v): its columns of y, its A and its B, of all slots."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for start, size, a_all, b_all in zip(starts, sizes, a, b, strict=True):
        yield y[:, start : start + size], a_all, b_all


def _members(route: Route, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([M, r, in], [M, out, r]) views of a slot's A and B."""
    members = route.rows.stop - route.rows.start
    by_member = a[route.columns].view(members, -1, a.shape[-1])
    return by_member, torch.stack(b[:, route.columns].chunk(members, 1))


def _chosen(route: Route, x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([T, k] members, [T, k] their weights)."""
    scores = x @ a[route.rows].T
    values, chosen = scores.topk(route.widest, dim=-1)
    return chosen, (values.float() / route.temperature[:, None]).softmax(-1).to(x.dtype)
