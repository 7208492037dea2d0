"""The soak itself, for ten minutes, and what it must not overlook.

`COXSWAIN_SOAK_MINUTES=1 pytest tests/load_tests/test_soak.py` is shorter.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from load_tests.soak.client import Answer, Book, Client
from load_tests.soak.kinds import BY_NAME, FIXED, PROMPTS, TOLERANCE, key_of
from load_tests.soak.oracle import Oracle
from load_tests.soak.report import latencies, page, plot
from load_tests.soak.samples import Reservoir, check
from load_tests.soak.stage import ZOO, configuration
from load_tests.soak.tally import Tally
from load_tests.soak.verdict import MIB, judged, line
from tests.server.adapting.answers import Expected

ROOT = Path(__file__).resolve().parents[2]
MINUTES = float(os.environ.get("COXSWAIN_SOAK_MINUTES", "10"))


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.timeout(MINUTES * 60 + 1500)
def test_the_soak_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.md"
    command = [sys.executable, "-m", "load_tests.soak"]
    command += ["--minutes", str(MINUTES), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.exists(), done.stderr[-6000:]
    shown = out.read_text()
    with capsys.disabled():
        print("\n" + shown[: shown.index("## Requests by kind")])
    found = json.loads((out.with_suffix("") / "figures.json").read_text())
    assert done.returncode == 0, done.stdout + json.dumps(found["failures"])[:6000]
    total = sum(one.get("right", 0) for one in found["counts"].values())
    assert total > 20 * MINUTES and not found["interrupted"]


def test_the_scenario_says_who_starts_it() -> None:
    command = [sys.executable, "-m", "locust", "-f", "load_tests/locustfile.py", "--headless"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("COXSWAIN_SOAK")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.returncode != 0
    assert "make soak" in done.stdout + done.stderr


# --- what would be found ------------------------------------------------------------------------


def sample(at_s: float, mib: float, **more: float) -> dict[str, float]:
    """One look at an idle server."""
    figures = {f"{figure}.{role}": 20.0 for figure in ("fds", "threads") for role in ("all", "api")}
    counted = ("running", "waiting", "in_flight", "kv_used", "staging", "preemptions", "steps",
               "set_loads", "set_evictions", "store", "records", "registry_bytes",
               "log_bytes")  # fmt: skip
    memory = {"own.all": mib * MIB, "own.engine": mib * MIB / 2, "rss.all": 2 * mib * MIB}
    return {"at": at_s, **memory, **figures, **dict.fromkeys(counted, 0.0), **more}


def soaked(**changes: Any) -> dict[str, Any]:
    """The figures of a soak of an hour in which all was well."""
    dice = random.Random(1)
    # It grows by 300 MiB while it warms up, and then stays, give or take.
    levels = [1000 + min(i, 100) * 3 + dice.uniform(-4, 4) for i in range(361)]
    end = {
        "idle": sample(3600, 1300), "engine": {"taken": 0, "bytes": 0}, "recorded": [],
        "digests": ["d"], "strange": [], "staging": 0, "status": 0,
        "last_line": "coxswain: ended in order", "left": [], "tracebacks": 0,
    }  # fmt: skip
    return {
        "samples": [sample(10.0 * i, level) for i, level in enumerate(levels)],
        "counts": {"base": {"right": 10, "sampled": 4}, "adapters: load": {"done": 2}},
        "rechecked": {"answers": 4, "tokens": 40, "worst": 1e-6, "wrong": []},
        "failures": [], "expected_kinds": ["base"], "problems": [], "end": end,
        "seconds": 3600.0, "tokens": 100, "worst": 2e-6, "interrupted": False,
        "asked_minutes": 60, "users": 8, "slots": 5, "engine": {"dtype": "float32"},
        "references": 10, "latencies": {},
        "machine": {"processor": "a", "cores": 2, "memory_bytes": 1 << 34, "system": "Linux",
                    "versions": {"python": "3.11"}},
        **changes,
    }  # fmt: skip


def broken(found: Mapping[str, Any]) -> list[str]:
    """The promises that were not kept."""
    return [one.says for one in judged(found) if not one.met]


def test_a_good_soak_is_told_as_one() -> None:
    assert broken(soaked()) == []


def changed_end(**changes: Any) -> dict[str, Any]:
    """A soak that ended otherwise."""
    return soaked(end={**soaked()["end"], **changes})


def leaking(figure: str, per_sample: float) -> dict[str, Any]:
    """A soak in which a figure grows from sample to sample."""
    found = soaked()
    for i, one in enumerate(found["samples"]):
        one[figure] += per_sample * i
    return found


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (leaking("own.all", 0.2 * MIB), "memory is flat"),  # 72 MiB an hour
        (leaking("fds.all", 0.1), "file descriptors"),
        (leaking("threads.all", 0.05), "threads"),
        (soaked(samples=[]), "memory is flat"),
        (soaked(counts={"base": {"right": 10, "wrong": 1}}), "no answer is wrong"),
        (soaked(counts={"base": {"sampled": 10}}), "no answer is wrong"),
        (soaked(rechecked={"answers": 1, "tokens": 2, "wrong": [{}]}), "computed again"),
        (soaked(rechecked={"answers": 0, "tokens": 0, "wrong": []}), "computed again"),
        (soaked(failures=[{"kind": "base", "why": "500"}]), "no request fails"),
        (soaked(expected_kinds=["base", "mix"]), "never made"),
        (soaked(problems=["no answer"]), "looks at the server"),
        (soaked(end={}), "the server ends in order"),
        (changed_end(idle=sample(0, 1, running=1)), "nothing runs"),
        (changed_end(idle=sample(0, 1, kv_used=0.01)), "nothing runs"),
        (changed_end(engine={"taken": 1, "bytes": 9}), "engine holds none"),
        (changed_end(recorded=["a"]), "registry records none"),
        (changed_end(strange=["x"]), "store"),
        (changed_end(staging=1), "store"),
        (changed_end(status=1), "status 0"),
        (changed_end(left=["7 python"]), "no process"),
        (changed_end(tracebacks=1), "traceback"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_wrong_is_found(found: dict[str, Any], says: str) -> None:
    (one,) = broken(found)
    assert says in one


def test_a_short_soak_promises_less() -> None:
    found = leaking("own.all", MIB / 8)  # 30 MiB after the first third
    assert broken(found)
    for i, one in enumerate(found["samples"]):
        one["at"] = 2.0 * i  # 12 minutes
    assert not broken(found)
    for i, one in enumerate(found["samples"]):
        one["own.all"] += i * MIB
    (says,) = broken(found)
    assert "too short" in says


def test_a_spike_does_not_bend_the_line_and_a_leak_does() -> None:
    found = soaked()
    found["samples"][-3]["own.all"] += 500 * MIB
    flat = line(found["samples"], "own.all")
    assert flat is not None and abs(flat.per_hour) < 5 * MIB
    leak = line(leaking("own.all", MIB / 10)["samples"], "own.all")
    assert leak is not None and leak.per_hour == pytest.approx(36 * MIB, abs=5 * MIB)
    assert leak.hours == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize(
    "found", [soaked(), soaked(interrupted=True, seconds=60.0), soaked(samples=[], end={})]
)
def test_every_soak_has_a_page(found: dict[str, Any], tmp_path: Path) -> None:
    shown = page(found, "soak")
    assert "**no**" in shown if broken(found) else "**no**" not in shown
    assert ("interrupted" in shown) == found["interrupted"]
    if found["samples"]:
        plot(found["samples"], tmp_path / "memory.svg")
        assert "fitted line" in (tmp_path / "memory.svg").read_text()


def test_latencies_are_those_of_the_quarters() -> None:
    records = [{"at": float(i), "first": i / 1000, "gaps": [0.01, 0.03]} for i in range(100)]
    found = latencies(records, 0.0, 100.0)
    assert found["first quarter"] == {
        "p50_ttft_ms": 12.0, "p99_ttft_ms": 23.8, "p50_itl_ms": 20.0, "p99_itl_ms": 30.0
    }  # fmt: skip
    assert found["last quarter"]["p50_ttft_ms"] == 87.0


def test_the_tally_reads_what_is_appended_and_waits_for_whole_lines(tmp_path: Path) -> None:
    tally = Tally(tmp_path / "requests.jsonl")
    tally.update()
    right = json.dumps({"kind": "base", "outcome": "right", "error": 1e-6, "tokens": 3})
    wrong = json.dumps({"kind": "base", "outcome": "wrong", "error": 1.0, "tokens": 4})
    with (tmp_path / "requests.jsonl").open("w", buffering=1) as file:
        file.write(right + "\n" + wrong[:9])
        tally.update()
        assert tally.total() == 1 and not tally.failures
        file.write(wrong[9:] + "\n")
        file.flush()
        tally.update()
    assert (tally.total(), tally.total("wrong"), tally.tokens, tally.worst) == (2, 1, 7, 1e-6)
    assert [one["outcome"] for one in tally.failures] == ["wrong"]


def test_every_sample_has_the_same_chance() -> None:
    kept = [0] * 20
    for seed in range(2000):
        reservoir = Reservoir(5, random.Random(seed))
        for i in range(20):
            reservoir.offer("base", i)
        for i in reservoir.kept["base"]:
            kept[i] += 1
    # 500 each; the chance that one of 20 is further off than 5 standard deviations is 1e-5.
    assert all(abs(n - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for n in kept)


RIGHT = Expected((5, 6, 2), (-0.1, -0.5, -0.2), (7, 8, 9), (-3.0, -0.50004, -4.0))


@pytest.mark.parametrize(
    ("ids", "logprobs", "error"),
    [
        ((5, 6, 2), (-0.1, -0.5, -0.2), 0.0),
        ((5, 6, 2), (-0.1, -0.5, -0.3), pytest.approx(0.1)),
        ((5, 8), (-0.1, -0.5), 0.0),  # as good as equal: either may be chosen
        ((7, 6, 2), (-0.1, -0.5, -0.2), float("inf")),
        ((5, 6), (-0.1, -0.5), float("inf")),
        ((5, 6, 2, 3), (-0.1, -0.5, -0.2, -0.1), float("inf")),
    ],
)
def test_an_answer_that_differs_is_seen(
    ids: tuple[int, ...], logprobs: tuple[float, ...], error: float
) -> None:
    assert RIGHT.error(ids, logprobs) == error


def answer(ids: list[int], logprobs: list[float], **more: Any) -> Answer:
    """One reply."""
    return Answer(**{"status": 200, "choices": {0: (ids, logprobs)}, **more})


@pytest.mark.parametrize(
    ("found", "contents", "outcome"),
    [
        (answer([5, 6, 2], [-0.1, -0.5, -0.2]), ["formal"], "right"),
        (answer([5, 6, 2], [-0.1, -0.5, -0.2]), ["ask", "formal"], "right"),
        (answer([5, 6, 2], [-0.1, -0.5, -0.2]), ["ask"], "wrong"),
        (answer([5, 6, 2], [-0.1, -0.5, -0.2]), [], "failed"),  # it was not there, and answered
        (answer([5, 6, 3], [-0.1, -0.5, -0.2]), ["formal"], "wrong"),
        (answer([5, 6], [-0.1, -0.5, -0.2]), ["formal"], "wrong"),
        (answer([], []), ["formal"], "wrong"),
        (answer([5, 6, 2], [-0.1, -0.5, -0.2], broken="no end"), ["formal"], "failed"),
        (Answer(404), ["formal"], "failed"),
        (Answer(0), ["formal"], "failed"),
    ],
)
def test_clients_judge(found: Answer, contents: list[str], outcome: str, tmp_path: Path) -> None:
    kind = BY_NAME["changing adapter"]
    expected = {
        key_of(kind.name, 1, content): [RIGHT.ids, logprobs, RIGHT.second_ids, RIGHT.second]
        for content, logprobs in (("formal", RIGHT.logprobs), ("ask", (-1.0, -1.0, -1.0)))
    }
    known = {"prompts": [], "sources": {}, "expected": expected}
    (tmp_path / "references.json").write_text(json.dumps(known))
    client = Client(Book(tmp_path, 1), None, random.Random(1))
    assert client.judge(kind, 1, contents, found)[0] == outcome


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Of the zoo."""
    return Oracle(configuration(tmp_path_factory.mktemp("soak")), ZOO / "adapters")


@pytest.mark.parametrize("name", ["base", "value_augmented", "critical_tokens", "pack"])
def test_a_sample_that_was_tampered_with_is_found(oracle: Oracle, name: str) -> None:
    """And the greedy reply, made step by step, has the log-probabilities of the whole."""
    right = oracle.greedy(BY_NAME[name], oracle.prompt(PROMPTS[0]))
    asked = {"kind": name, "messages": PROMPTS[0], "contents": [""]}
    found = check(oracle, [{**asked, "choices": [[right.ids, right.logprobs]]}], lambda _: None)
    assert not found.wrong and found.worst < TOLERANCE / 10
    off = [right.logprobs[0] - 2 * TOLERANCE, *right.logprobs[1:]]
    for choice in ([right.ids, off], [right.ids[:-1], right.logprobs]):
        assert check(oracle, [{**asked, "choices": [choice]}], lambda _: None).wrong


def test_one_of_the_contents_must_fit(oracle: Oracle) -> None:
    right = oracle.greedy(BY_NAME["changing adapter"], oracle.prompt(PROMPTS[0]), "formal")
    for contents, wrong in ((["ask", "formal"], 0), (["ask", "topic"], 1)):
        asked = {"kind": "changing adapter", "messages": PROMPTS[0], "contents": contents}
        sample = {**asked, "choices": [[right.ids, right.logprobs]]}
        assert len(check(oracle, [sample], lambda _: None).wrong) == wrong


def test_adapters_change_the_references(oracle: Oracle) -> None:
    """Else a server that ignores them would pass."""
    prompt = oracle.prompt(PROMPTS[0])
    base = oracle.greedy(BY_NAME["base"], prompt)
    for name in ("adapter", "two adapters", "pack", "proxy_tuning", "value_augmented", "mix"):
        found = oracle.greedy(BY_NAME[name], prompt)
        assert base.error(found.ids, found.logprobs) > 100 * TOLERANCE, name
    assert set(FIXED) <= {path.name for path in (ZOO / "adapters").iterdir()}
