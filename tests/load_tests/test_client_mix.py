"""How the client mixes what several servers tell."""

from __future__ import annotations

from load_tests.client_mix import best


def test_the_best_is_of_the_weighted_sum() -> None:
    told = [{1: -0.5, 2: -1.0}, {1: -3.0, 2: -0.1}, {1: -0.2, 2: -2.0}]
    assert best(told, [1.0, 0.0, 0.0]) == 1
    assert best(told, [1.0, 1.0, -1.0]) == 2  # −0.5 − 3.0 + 0.2 < −1.0 − 0.1 + 2.0


def test_an_id_that_a_server_did_not_tell_has_its_least_likely_score() -> None:
    told = [{1: -1.0, 2: -1.5}, {2: -0.5, 3: -4.0}]
    # 1: −1 − 4, 2: −1.5 − 0.5, 3: −1.5 − 4
    assert best(told, [1.0, 1.0]) == 2
    # 1: −1 + 4, 2: −1.5 + 0.5, 3: −1.5 + 4
    assert best(told, [1.0, -1.0]) == 1


def test_of_equal_ids_the_smallest_is_taken() -> None:
    assert best([{9: -1.0, 4: -1.0}], [1.0]) == 4
