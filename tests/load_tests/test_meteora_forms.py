"""The authors' two forms compute what our kernel computes, called as the engine calls it."""

from __future__ import annotations

import inspect

import pytest
import torch

from adapters.kernels.gated import Group, Route, add_adapters
from load_tests.meteora_forms import FORMS, adding


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_the_kernel_in_another_order(form: str) -> None:
    members, rank, into, tokens, top_k, sizes = 5, 3, 16, 7, 2, (8, 6)
    random = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    columns = members * rank
    a, b = (
        [draw(2, 1, columns + members, into) for _ in sizes],
        [draw(2, 1, n, columns) for n in sizes],
    )
    x, y = draw(tokens, into), draw(tokens, sum(sizes))
    route = Route(
        slice(0, columns),
        slice(columns, columns + members),
        torch.arange(members).repeat_interleave(rank),
        torch.ones(tokens),
        torch.full((tokens,), top_k),
        top_k,
        torch.full((tokens,), 4.0),
    )
    group = Group(1, None, columns, columns + members, torch.ones(tokens, columns), (route,))
    ours, theirs = y.clone(), y.clone()
    add_adapters(ours, x, a, b, sizes, [group], None)
    adding(FORMS[form])(theirs, x, a, b, sizes, [group], None)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours, y)


def test_a_form_takes_what_the_kernel_takes() -> None:
    assert list(inspect.signature(adding(FORMS["loop"])).parameters) == list(
        inspect.signature(add_adapters).parameters
    )
