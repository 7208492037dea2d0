"""The recipes that read inner layers."""

from __future__ import annotations

from tests.recipes.row import Recipe

ROWS = (
    Recipe(
        name="DoLa, static",
        source="2309.03883",
        formula="log p − log p_j where p ≥ α max p",
        request='{"method": "dola", "layers": ["l1"], "relative_top": 0.1}',
        artefacts="none: streams: {l1: {on: base, layer: 1, norm: false}}",
        passes="1 of the base; a read-out for the layer",
        licence="none",
        test="tests/recipes/test_taps.py::test_dola",
    ),
    Recipe(
        name="DoLa, dynamic",
        source="2309.03883",
        formula="the same, at each token j = argmax ½ (KL(M ‖ p) + KL(M ‖ p_j)), M = ½ (p + p_j)",
        request='{"method": "dola", "layers": ["l0", "l1", "l2"]}',
        artefacts="none: a tap for each layer of the bucket",
        passes="1 of the base; a read-out for each layer",
        licence="none",
        test="tests/recipes/test_taps.py::test_dola",
    ),
    Recipe(
        name="SLED",
        source="2411.02433",
        formula="z ← z − r (1 − t/10) (softmax(z) − P) for t = 0 … 9, P from the layers' cosines",
        request='{"method": "sled", "layers": ["l0", "l1", "l2"], "rate": 2.0, "top_k": 10}',
        artefacts="none: a tap for each layer",
        passes="1 of the base; a read-out for each layer",
        licence="none",
        test="tests/recipes/test_taps.py::test_sled",
    ),
)
