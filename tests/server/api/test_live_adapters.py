"""Adapters and vectors on a real server: loaded, mixed, routed, placed; exact against PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from steering.plugins import discover
from tests.adapters.make import make_lora, make_native
from tests.adapters.models import Applied, adapted
from tests.adapters.test_vector_files import write_gguf
from tests.adapters.vectors import make_vector, write
from tests.reference import Mix, TapModel, decode
from tests.reference import load as plain
from tests.server.live import Server, document
from tests.server.watch import until

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
"""Of log-probabilities, float32."""

METHODS = discover()

HIDDEN = 128
"""Of the base."""

PROFILES = {
    "bright": {"method": "mix", "weights": {"base": 1.0},
               "adapters": [{"name": "sunny", "weight": 0.7, "where": {"from": 1}}]},
    "bright-chat": {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain",
                    "adapters": [{"name": "sunny"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(models: Path) -> dict[str, Path]:
    """Adapters of the base, one of `chat`, and a pack."""
    root, base = models / "adapters", models / "base"
    found = {name: make_lora(root / name, base, seed=10 + i) for i, name in enumerate("abcde")}
    found["f"] = make_lora(root / "f", models / "chat", seed=30)
    for i, name in enumerate(("acme/first", "acme/pinned", "second")):
        found[name] = make_lora(root / "asked" / name, base, seed=20 + i)
    (root / "asked" / "broken").mkdir()
    (root / "asked" / "broken" / "adapter_config.json").write_text("{}")
    found["pack"] = make_native(root / "pack", base, tasks=3, seed=40)
    found["sunny"] = make_vector(root / "sunny", HIDDEN, range(2), seed=50, where="reply")
    constant = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(51))
    write_gguf(root / "formal.gguf", {"direction.1": 0.5 * constant.numpy()})
    found["formal"] = write(root / "expected" / "formal", {"1": 0.5 * constant})
    return found


@pytest.fixture(scope="module")
def server(models: Path, folders: dict[str, Path]) -> Iterator[Server]:
    """Three slots, one adapter from the configuration, a tap; no playground."""
    section = {
        "roots": ["./adapters"], "max_loaded": 3, "max_rank": 24, "vectors": True,
        "preload": [{"name": "a", "source": "./adapters/a"}],
        "load_on_request": True, "request_sources": ["./adapters/asked"],
    }  # fmt: skip
    config = document(adapters=section, registry={"directory": "./state"}, playground=False)
    config["streams"]["early"] = {"on": "base", "layer": 1, "norm": True}
    config["profiles"] |= PROFILES
    found = Server(models, config)
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()


def load(server: Server, name: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Loads an adapter and waits for its end: ready or failed."""
    body = {"name": name, "source": str(folder), **more}
    answer = httpx.post(f"{server.url}/admin/adapters", json=body)
    assert answer.status_code == 202, answer.text

    def settled() -> dict[str, Any] | None:
        record: dict[str, Any] = server.get(f"/admin/adapters/{name}").json()
        return record if record["state"] in ("ready", "failed") else None

    return until(settled)


def ask(server: Server, **body: Any) -> dict[str, Any]:
    """Eight greedy tokens with log-probabilities."""
    request = {"model": "big", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1,
               "ignore_eos": True, "return_token_ids": True, **body}  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


PROMPT = [11, 40, 7, 93, 5, 61, 22, 8, 15, 33]


def expect(answer: dict[str, Any], base: Path, *used: Applied) -> None:
    """The answer's log-probabilities are those of PEFT, or of a plain MeteoRA forward."""
    choice = answer["choices"][0]
    ids = choice["token_ids"]
    model = adapted(base, used)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    want = logits.log_softmax(-1)
    assert want.argmax(-1).tolist() == ids
    got = choice["logprobs"]["token_logprobs"]
    assert max(abs(g - float(w[i])) for g, w, i in zip(got, want, ids, strict=True)) < TOLERANCE


def test_single_weighted_mixed_and_routed(server: Server, folders: dict[str, Path]) -> None:
    base = folders["a"].parents[1] / "base"
    for name in ("b", "pack"):
        record = load(server, name, folders[name])
        assert record["state"] == "ready", record
    a, b, pack = folders["a"], folders["b"], folders["pack"]
    expect(ask(server), base)
    expect(ask(server, model="a"), base, Applied(a))
    expect(ask(server, adapters=[{"name": "b", "weight": -0.5}]), base, Applied(b, -0.5))
    mixed = ask(server, model="a", adapters=[{"name": "b", "weight": 0.5}])
    expect(mixed, base, Applied(a), Applied(b, 0.5))
    assert mixed["model"] == "a"
    routed = ask(server, steering={"report": True},
                 adapters=[{"name": "pack", "top_k": 2, "temperature": 15}])  # fmt: skip
    expect(routed, base, Applied(pack, top_k=2, temperature=15))
    report = routed["steering"]["adapters"][0]
    assert report["name"] == "pack" and len(report["digest"]) == 64
    assert report["routed"].keys() == {"task0", "task1", "task2"}
    assert math.isclose(sum(report["routed"].values()), 1)


def test_a_server_without_playground_has_neither_page_nor_offers(server: Server) -> None:
    for path in ("/playground", "/playground/main.js"):
        assert server.get(path).status_code == 404
    assert server.get("/v1/playground").status_code == 404


def refused(server: Server, **body: Any) -> tuple[int, dict[str, Any]]:
    request = {"model": "big", "prompt": PROMPT, "max_tokens": 1, **body}
    answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=60)
    return answer.status_code, answer.json()["error"]


def test_an_adapter_is_loaded_by_the_first_request_that_names_it(
    server: Server, folders: dict[str, Path]
) -> None:
    base, name = folders["a"].parents[1] / "base", "acme/first"
    assert server.get(f"/admin/adapters/{name}").status_code == 404
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(server, model=name), range(6)))
    for answer in answers:
        assert answer["model"] == name
        expect(answer, base, Applied(folders[name]))
    record = server.get(f"/admin/adapters/{name}").json()
    assert (record["state"], record["loaded_by"]) == ("ready", "a request")
    mixed = ask(server, model="a", adapters=[{"name": "second", "weight": 0.5}])
    expect(mixed, base, Applied(folders["a"]), Applied(folders["second"], 0.5))


def test_what_no_source_has_is_not_found_and_what_is_broken_is_told(server: Server) -> None:
    before = server.get("/admin/adapters").json()["adapters"]
    for name in ("nowhere", "acme/nowhere", "../b", "acme/../../b", "acme/first/x", "/etc", "b@1"):
        if name != "b@1":
            status, error = refused(server, model=name)
            assert (status, error["code"]) == (404, "model_not_found"), name
        status, error = refused(server, adapters=[{"name": f"x{name}"}])
        assert (status, error["param"]) == (404, "adapters.0.name"), name
    assert server.get("/admin/adapters").json()["adapters"] == before
    for _ in range(2):
        status, error = refused(server, model="broken")
        assert (status, error["param"]) == (422, "model")
        assert "adapter_model.safetensors: the file is missing" in error["message"]


def test_names_of_a_hub_can_be_administered(server: Server, folders: dict[str, Path]) -> None:
    name = "acme/pinned"
    record = load(server, name, folders[name], version="2")
    assert (record["name"], record["state"]) == (name, "ready"), record
    for spelled in (name, "acme%2Fpinned"):
        for verb, pinned in (("pin", True), ("unpin", False)):
            answer = server.post(f"/admin/adapters/{spelled}/{verb}", None)
            assert (answer.status_code, answer.json()["pinned"]) == (200, pinned)
    assert ask(server, model=f"{name}@2")["model"] == f"{name}@2"
    assert server.get(f"/v1/models/{name}").json()["id"] == name
    assert f'adapter_name="{name}"' in server.get("/metrics").text
    assert server.delete(f"/admin/adapters/{name}").status_code == 202
    for bad in ("a/b/c", "/a", "a/", "a//b", "../a", "a/..", ".a/b"):
        answer = server.post("/admin/adapters", {"name": bad, "source": str(folders["b"])})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name"), bad
    status, error = refused(server, model="acme/pinned@1/2")
    assert status == 404, error


def label(page: str, name: str) -> set[str]:
    """The names in the newest series of `vllm:lora_requests_info`."""
    lines = [one for one in page.splitlines() if one.startswith("vllm:lora_requests_info{")]
    newest = max(lines, key=lambda line: float(line.split()[-1]), default="")
    return {one for one in newest.partition(f'{name}="')[2].partition('"')[0].split(",") if one}


def test_routers_read_the_names_that_clients_send(server: Server, folders: dict[str, Path]) -> None:
    load(server, "b", folders["b"], replace=True)
    long = {"max_tokens": 200, "ignore_eos": True}
    bodies: list[dict[str, Any]] = [
        {"model": "a"}, {"model": "big", "adapters": [{"name": "a"}, {"name": "b"}]},
    ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, server, **body, **long) for body in bodies]

        def seen() -> str | None:
            page = server.get("/metrics").text
            return page if label(page, "running_lora_adapters") == {"a", "b"} else None

        page = until(seen)
        for one in running:
            one.result()
    assert 'max_lora="3"' in page
    (loaded,) = re.findall(r'vllm:lora_adapter_loaded\{(.*adapter_name="a".*)\} 1', page)
    assert 'level="gpu"' in loaded and 'pinned="false"' in loaded and 'model_name="big"' in loaded
    assert "vllm:max_gpu_lora_adapters" in page
    ask(server)  # without any

    def gone() -> bool:
        return not label(server.get("/metrics").text, "running_lora_adapters")

    assert until(gone)


# --- vectors and taps ---------------------------------------------------------------------------


def exact(answer: dict[str, Any], models: dict[str, Any], mix: Mix) -> None:
    """The answer's tokens and log-probabilities are those of models that read token by token."""
    want = decode(models, {"base": PROMPT}, mix, max_tokens=8)
    choice = answer["choices"][0]
    assert choice["token_ids"] == [step.token for step in want]
    found = choice["logprobs"]["token_logprobs"]
    assert found == pytest.approx([step.logprob for step in want], abs=TOLERANCE)


def placed(answer: dict[str, Any], base: Path, *used: Applied) -> None:
    """The same with adapters, each at its positions."""
    exact(answer, {"base": adapted(base, used)}, lambda scores: scores["base"])


def test_vectors_by_name_file_alias_and_profile(server: Server, folders: dict[str, Path]) -> None:
    base, sunny = folders["a"].parents[1] / "base", folders["sunny"]
    assert load(server, "sunny", sunny)["kind"] == "vector"
    assert load(server, "formal", folders["a"].parent / "formal.gguf")["state"] == "ready"
    placed(ask(server, model="sunny"), base, Applied(sunny))
    one = {"name": "sunny", "weight": 1.5, "where": {"prompt_last": 3, "first": 4}}
    there = '{"prompt_last": 3, "first": 4}'
    placed(ask(server, adapters=[one]), base, Applied(sunny, 1.5, where=there))
    easy = [{"name": "sunny", "scale": -0.5, "apply": {"prompt": "all"}},
            {"source": "formal", "scale": 2.0, "apply": {"generation": "all"}}]  # fmt: skip
    both = Applied(sunny, -0.5, where='"prompt"'), Applied(folders["formal"], 2.0, where='"reply"')
    placed(ask(server, vectors=easy), base, *both)
    brought = Applied(sunny, 0.7, where='{"from": 1}')
    placed(ask(server, model="bright"), base, brought)
    placed(ask(server, steering="bright"), base, brought)
    beside = ask(server, model="bright", adapters=[{"name": "a", "weight": 0.5}])
    placed(beside, base, brought, Applied(folders["a"], 0.5))
    own = ask(server, model="bright", adapters=[{"name": "sunny", "weight": -1.0}])
    placed(own, base, Applied(sunny, -1.0))


def test_a_profile_steers_and_brings_a_vector(server: Server, folders: dict[str, Path]) -> None:
    root, sunny = folders["a"].parents[1], folders["sunny"]
    load(server, "sunny", sunny, replace=True)
    answer = ask(server, model="bright-chat", steering={"strength": 0.8, "report": True})
    models = {"base": adapted(root / "base", (Applied(sunny),)),
              "chat": plain(root / "chat"), "plain": plain(root / "plain")}  # fmt: skip
    exact(answer, models, lambda s: s["base"] + 0.8 * (s["chat"] - s["plain"]))
    (told,) = answer["steering"]["adapters"]
    assert (told["name"], told["stream"]) == ("sunny", "base")


def test_a_profile_with_a_wrong_adapter_is_refused(server: Server) -> None:
    plan = {"method": "mix", "weights": {"base": 1.0}}
    wrong: dict[str, Any] = {
        "0.weight": [{"name": "x", "weight": 99.0}], "0.where": [{"name": "x", "where": "nowhere"}],
        "1.name": [{"name": "x"}, {"name": "x@2"}], "0.size": [{"name": "x", "size": 1}],
        "0.name": [{}],
    }  # fmt: skip
    for field, adapters in wrong.items():
        answer = httpx.put(f"{server.url}/admin/profiles/p", json={**plan, "adapters": adapters})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == f"profiles.p.adapters.{field}"
    profile = {**plan, "adapters": [{"name": "gone"}]}
    assert httpx.put(f"{server.url}/admin/profiles/p", json=profile).status_code == 201
    assert server.get("/admin/profiles/p").json()["adapters"] == [{"name": "gone"}]
    status, error = refused(server, model="p")
    assert (status, error["param"]) == (404, "profiles.p.adapters.0")
    assert "gone" not in error["message"]
    assert server.delete("/admin/profiles/p").status_code == 204


def test_taps_in_mix_and_contrastive(server: Server, folders: dict[str, Path]) -> None:
    base, sunny = folders["a"].parents[1] / "base", folders["sunny"]
    load(server, "sunny", sunny, replace=True)
    contrast: dict[str, Any] = {"method": "contrastive", "amateur": "early", "strength": 0.4}
    method = METHODS["contrastive"]
    config = method.config.model_validate(contrast)
    steered: list[tuple[dict[str, Any], Mix]] = [
        ({"method": "mix", "weights": {"base": 1.0, "early": -0.3}},
         lambda s: s["base"] - 0.3 * s["early"]),
        (contrast, lambda s: method.reference(config, s)),
    ]  # fmt: skip
    for used in ((), (Applied(sunny, 1.5, where='"all"'),)):
        model = adapted(base, used)
        models = {"base": model, "early": TapModel(model, 1, norm=True)}
        adapters = [{"name": "sunny", "weight": 1.5, "where": "all"}] if used else None
        for spec, mix in steered:
            exact(ask(server, steering=spec, adapters=adapters), models, mix)
