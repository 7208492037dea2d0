"""Where the time of one decode step goes, steered and not.

    python -m load_tests.step_profile                    # the tables, about two minutes on 2 cores
    python -m load_tests.step_profile --rows 1 16 64 --companions 3

The models are those of `load_tests.step_bench`. Functions of vLLM and of the worker are wrapped
by a clock; a line is the time inside that function but outside the others, the median over the
steps. The clocks themselves cost about a microsecond per call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load_tests import shapes, step_bench


class Clock:
    """Adds up, per step, the time inside each labelled function and outside the others."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open: list[str] = ["rest"]
        self._since = time.perf_counter()
        self._now: dict[str, float] = defaultdict(float)

    def _switch(self) -> None:
        now = time.perf_counter()
        self._now[self._open[-1]] += now - self._since
        self._since = now

    def wrap(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(label)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return timed

    def patch(self, owner: Any, name: str, label: str) -> None:
        """Times a method of a class, or an attribute of an object."""
        setattr(owner, name, self.wrap(label, getattr(owner, name)))

    def end_step(self) -> None:
        """Closes a step."""
        self._switch()
        self.steps.append(dict(self._now))
        self._now = defaultdict(float)

    def medians(self, skip: int) -> dict[str, float]:
        """Label → milliseconds per step, largest first; the first steps and the last left out."""
        steps = self.steps[skip:-1]
        labels = {label for step in steps for label in step}
        found = {n: 1e3 * statistics.median(s.get(n, 0.0) for s in steps) for n in labels}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def watch_vllm(clock: Clock) -> None:
    """Times vLLM's own parts of a step."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    clock.patch(Scheduler, "schedule", "vLLM: schedule")
    clock.patch(Scheduler, "update_from_output", "vLLM: outputs")
    clock.patch(OutputProcessor, "process_outputs", "vLLM: outputs")
    clock.patch(GPUModelRunner, "_update_states", "vLLM: inputs")
    clock.patch(GPUModelRunner, "_prepare_inputs", "vLLM: inputs")
    clock.patch(GPUModelRunner, "_build_attention_metadata", "vLLM: inputs")
    clock.patch(GPUModelRunner, "_bookkeeping_sync", "vLLM: outputs")
    clock.patch(Sampler, "forward", "vLLM: sampler")


def watch_model(clock: Clock, model: Any) -> None:
    """Times the parts of a steered model, or the two of a plain one."""
    if not hasattr(model, "_forwards"):
        clock.patch(model, "forward", "forward: base")
        clock.patch(model, "compute_logits", "unembed: base")
        return
    from steering.worker import model as steered
    from steering.worker.plan import layout, request_state
    from steering.worker.readout import one_product, readout
    from steering.worker.runners import v1
    from steering.worker.step import contexts
    from steering.worker.step import run as step

    for i, name in enumerate(model.names):
        label = name if name == "base" else "companions"
        model._forwards[i] = _Timed(clock, model._forwards[i], label)
        model._readout.unembed[i] = clock.wrap(f"unembed: {label}", model._readout.unembed[i])
    clock.patch(v1.V1View, "schedule", "ours: request states")
    clock.patch(request_state.RequestStates, "apply", "ours: request states")
    clock.patch(steered, "plan_step", "ours: stream batches")
    clock.patch(step, "stage", "ours: stream batches")
    clock.patch(contexts.StreamContexts, "_build", "ours: stream batches")
    clock.patch(layout.Layout, "write_control", "ours: control")
    clock.patch(readout.Readout, "__call__", "ours: mixing")
    clock.patch(readout.Readout, "in_one", "ours: mixing")
    clock.patch(step.Step, "steered", "ours: rest of forward")
    one: Any = model._readout.one_product
    if one is not None:
        base = clock.wrap("unembed: base", one.base)
        joined = {s: clock.wrap("unembed: all in one", f) for s, f in one.joined.items()}
        timed = one_product.OneProduct(one.layout, one.owner, base, joined)
        model._readout = dataclasses.replace(model._readout, one_product=timed)


class _Timed:
    """A stream's model whose forward pass is timed."""

    def __init__(self, clock: Clock, model: Any, label: str) -> None:
        self._call = clock.wrap(f"forward: {label}", model)
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def profile(job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Rows → label → milliseconds, of one engine in this process.

    Args:
        job: {"model", "streams": {name: model}, "rows": [...], "partly", "one_product"};
            with `partly` every other row is steered, so that streams run batches of their own.
    """
    engine = step_bench.engine_args()
    from steering.plan import SteeringPlan
    from steering.wire import SteeringPayload, pack

    llm = step_bench.start(job["model"], job["streams"], engine, job["one_product"])
    weights = {"base": 1.0} | {name: 1.0 - 2 * (i % 2) for i, name in enumerate(job["streams"])}
    payload = pack(SteeringPayload(SteeringPlan("mix", tuple(weights.items()))))
    clock = Clock()
    watch_vllm(clock)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    watch_model(clock, runner.model)
    llm.llm_engine.step = _stepping(clock, llm.llm_engine.step)
    found = {}
    for rows in job["rows"]:
        clock.steps = []
        steered = (rows + 1) // 2 if job["partly"] else rows
        total = step_bench.step_ms(llm, rows, steered if job["streams"] else 0, payload)
        found[str(rows)] = {"whole step": total} | clock.medians(step_bench.WARM_STEPS)
    return found


def run(job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """`profile` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "load_tests.step_profile", "--job", json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"an engine failed:\n{done.stderr[-3000:]}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _stepping(clock: Clock, step: Callable[[], Any]) -> Callable[[], Any]:
    def timed() -> Any:
        out = step()
        clock.end_step()
        return out

    return timed


def table(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table: a line per part, a column per engine."""
    labels = list(dict.fromkeys(label for found in columns.values() for label in found))
    labels.sort(key=lambda label: (label != "whole step", label))
    lines = ["| ms per step | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for label in labels:
        cells = [f"{found[label]:.2f}" if label in found else "" for found in columns.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="batch sizes")
    parser.add_argument("--companions", type=int, default=2, help="small streams (default 2)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(profile(json.loads(args.job))))
        return
    with tempfile.TemporaryDirectory() as tmp:
        shapes.write_model(Path(tmp) / "base", shapes.BASE)
        shapes.write_model(Path(tmp) / "companion", shapes.COMPANION)
        base, small = str(Path(tmp) / "base"), str(Path(tmp) / "companion")
        streams = {f"stream{i}": small for i in range(1, args.companions + 1)}
        jobs: dict[str, dict[str, Any]] = {
            "base alone": {"model": base, "streams": {}},
            "companion alone": {"model": small, "streams": {}},
            "steered": {"model": base, "streams": streams},
            "steered, one product": {
                "model": base,
                "streams": streams,
                "one_product": [list(streams)],
            },
            "half of the rows steered": {"model": base, "streams": streams, "partly": True},
        }
        found = {}
        for name, job in jobs.items():
            print(f"  {name} …", file=sys.stderr)
            whole = {"rows": args.rows, "partly": False, "one_product": []} | job
            found[name] = run(whole)
    for rows in map(str, args.rows):
        print(
            f"\n{rows} rows\n\n" + table({name: figures[rows] for name, figures in found.items()})
        )


if __name__ == "__main__":
    main()
