"""The searches of four papers, on tiny models in a real server, against plain loops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.recipes import table_search
from tests.recipes.searching import Ids, Loop, likelihood, sigmoid
from tests.server.heads.asking import PROMPT, ids_of
from tests.server.heads.headed import Slow, configuration, make_headed
from tests.server.live import Server, make_models

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

REQUEST: dict[str, Any] = {
    "model": "big", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.0, "seed": 11,
    "logprobs": 0, "return_token_ids": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Slow:
    root = tmp_path_factory.mktemp("search-models")
    make_models(root)
    return Slow(root, make_headed(root))


@pytest.fixture(scope="module")
def server(slow: Slow) -> Iterator[Server]:
    document = configuration()
    document["streams"]["chat"] = {"model": "./chat"}
    found = Server(slow.root, document)
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()


def search(server: Server, steering: dict[str, Any], **more: Any) -> tuple[list[int], Any]:
    """(the reply's ids, its choice in the report)."""
    body = {**REQUEST, **more, "steering": {**steering, "report": "tokens"}}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    (choice,) = found["steering"]["choices"]
    assert found["usage"]["completion_tokens"] == len(ids_of(found))
    assert choice["generated_tokens"] == sum(
        draw["tokens"] for one in choice["rounds"] for draw in one["draws"]
    )
    return ids_of(found), choice


def logprobs(choice: Any) -> list[float]:
    return [entry["steered_logprob"] for entry in choice["token_details"]]


def request_of(name: str) -> dict[str, Any]:
    """The `steering` object of a row of the table."""
    found: dict[str, Any] = json.loads(next(r for r in table_search.ROWS if r.name == name).request)
    return found


@pytest.mark.parametrize("head", ["value", "critic"])
def test_blockwise_best_of_k(server: Server, slow: Slow, head: str) -> None:
    """Controlled decoding, arXiv 2310.17022: argmax_k V(x ⊕ y ⊕ b_k), until the reply ends."""
    spec = request_of("Blockwise controlled decoding")
    spec |= {"score": {"value": head}, "block": {"tokens": 4}}
    ids, choice = search(server, spec)
    loop = Loop(PROMPT, lambda before, block: slow.head(head, [*before, *block]))
    assert loop.replay(choice) == ids
    assert len(choice["rounds"]) > 2


def test_chunk_level_beam_search(server: Server, slow: Slow) -> None:
    """Weak-to-strong search, arXiv 2405.19262: W beams × K successors by Σ log π* − log π_ref."""
    spec = request_of("Weak-to-strong search") | {"block": {"tokens": 4}}
    spec["score"] = {"log_ratio": {"of": "chat", "to": "plain"}}

    def score(before: Ids, reply: Ids) -> float:
        tuned, untuned = (likelihood(slow, name, before, reply) for name in ("chat", "plain"))
        return tuned - untuned

    ids, choice = search(server, spec, logit_bias={"2": 3.0})
    assert len(choice["rounds"][0]["draws"]) == spec["beams"] * spec["k"]
    assert {draw["beam"] for one in choice["rounds"][1:] for draw in one["draws"]} != {0}
    assert Loop(PROMPT, score, beams=spec["beams"]).replay(choice) == ids


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_reward_guided_speculation(server: Server, slow: Slow, temperature: float) -> None:
    """RSD, arXiv 2501.19324: the small model's step if r ≥ δ, else the base's, unscored."""
    spec = request_of("Reward-guided speculative decoding (RSD)")
    spec |= {"draw": "chat", "block": {"tokens": 3, "until": " the"},
             "accept": {"at_least": 0.0},
             "score": {"value": "critic", "scale": "probability"}}  # fmt: skip
    more = {"temperature": temperature, "max_tokens": 24}
    # Between the rewards of what the small model writes alone.
    rewards = sorted(
        {one["draws"][0]["score"] for one in search(server, spec, **more)[1]["rounds"]}
    )
    threshold = sum(rewards[len(rewards) // 2 - 1 :][:2]) / 2
    spec["accept"] = {"at_least": threshold}
    ids, choice = search(server, spec, **more)
    loop = Loop(PROMPT, lambda before, block: sigmoid(slow.head("critic", [*before, *block])),
                threshold=threshold)  # fmt: skip
    assert loop.replay(choice) == ids
    decided = [one["accepted"] for one in choice["rounds"] if one["by"] == "draw"]
    assert True in decided and False in decided, "take another seed"
    told, reply = logprobs(choice), list(PROMPT)
    for one in choice["rounds"]:
        if one.get("accepted", True):
            block = one["draws"][0]["token_ids"]
            stream = "chat" if one["by"] == "draw" else "base"
            own = [told.pop(0) for _ in block]
            assert sum(own) == pytest.approx(likelihood(slow, stream, reply, block), abs=1e-3)
            reply += block


def test_guided_speculative_inference(server: Server, slow: Slow) -> None:
    """GSI, arXiv 2506.04118: i ∝ exp(β r + log π_B − log π_S), accepted from u on; else ∝ exp(β r)
    among the base's.
    """
    beta, threshold = 4.0, 0.5
    spec = request_of("Guided speculative inference (GSI)")
    reward = {"value": "critic", "scale": "probability", "weight": beta}
    spec |= {"draw": "chat", "block": {"tokens": 3}, "accept": {"at_least": threshold},
             "score": {**reward, "log_ratio": {"of": "base", "to": "chat"}},
             "fallback": {"draw": "base", "k": 3, "score": reward}}  # fmt: skip

    def r(before: Ids, block: Ids) -> float:
        return beta * sigmoid(slow.head("critic", [*before, *block]))

    def tilted(before: Ids, block: Ids) -> float:
        base, small = (likelihood(slow, name, before, block) for name in ("base", "chat"))
        return r(before, block) + base - small

    ids, choice = search(server, spec)
    loop = Loop(PROMPT, tilted, r, beta=1.0, threshold=threshold, scale=beta)
    assert loop.replay(choice) == ids
    assert {one["by"] for one in choice["rounds"]} == {"draw", "fallback"}
    assert all(len(one["uniforms"]) == len(one["draws"]) for one in choice["rounds"])


def test_all_of_them_at_once_give_what_each_gives_alone(server: Server, slow: Slow) -> None:
    """In one batch, beside plain requests; a seed gives the same reply again."""
    from concurrent.futures import ThreadPoolExecutor

    bodies: list[dict[str, Any]] = [
        {**REQUEST, "steering": {"method": "guided_search", "k": 3, "block": {"tokens": 4},
                                 "score": {"value": "value"}}},
        {**REQUEST, "steering": {"method": "guided_search", "k": 2, "beams": 2,
                                 "block": {"tokens": 5},
                                 "score": {"log_ratio": {"of": "chat", "to": "plain"}}}},
        {**REQUEST, "steering": {"method": "guided_search", "draw": "chat", "k": 1,
                                 "block": {"tokens": 3}, "accept": {"at_least": 0.0},
                                 "score": {"value": "critic"}}},
        {**REQUEST, "steering": {"method": "proxy_tuning", "expert": "chat",
                                 "anti_expert": "plain"}},
        REQUEST,
    ]  # fmt: skip

    def ask(body: dict[str, Any]) -> list[int]:
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return ids_of(answer.json())

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(ask, bodies * 2)) == alone * 2


def test_the_table_names_tests_that_are_there() -> None:
    for row in table_search.ROWS:
        file, _, name = row.test.partition("::")
        assert file == "tests/recipes/test_search.py" and name in globals()
        assert row.licence and row.passes and row.artefacts and row.formula
