"""Tries vectors on the running server: hot-loads one, samples replies, asks for their rewards."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from adapters.formats.vectors import CONFIG, TENSORS
from adapters.training.errors import BadRecipe
from adapters.training.prompts import Prompt
from adapters.training.served import sample
from adapters.training.value.rewards import Reward, rewards
from adapters.training.vector.settings import VectorSettings

_POLL_S = 0.3
_NAME = "coxswain-train-vector"


@dataclass(frozen=True)
class Trial:
    """How a vector did.

    Args:
        layer: that it was added behind; None: no vector.
        weight: of it.
        reward: mean over the replies.
    """

    layer: int | None
    weight: float
    reward: float


def write_vector(folder: Path, layer: int, vector: torch.Tensor, scale: float) -> None:
    """An artefact of our format."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({str(layer): vector.contiguous()}, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps({"kind": "vector", "scale": scale}) + "\n")


def try_all(
    settings: VectorSettings,
    prompts: Sequence[Prompt],
    vectors: dict[int, torch.Tensor],
    reward: Reward,
    folder: Path,
) -> list[Trial]:
    """No vector, then each layer at each weight; what a killed run has finished is not asked again.

    Args:
        settings: the run.
        prompts: to reply to.
        vectors: by layer.
        reward: judges.
        folder: the work folder, which the server must be allowed to load adapters from.

    Raises:
        BadRecipe: the server refuses a vector or a prompt, or a reward cannot be given.
    """
    found = [Trial(None, 0.0, _mean(settings, prompts, None, 0.0, reward, folder))]
    for layer, vector in vectors.items():
        done = [_file(folder, layer, w).exists() for w in settings.multiples]
        own = folder / f"trial-{layer}"
        write_vector(own, layer, vector, 1.0)
        with contextlib.nullcontext() if all(done) else _loaded(settings, own):
            for weight in settings.multiples:
                mean = _mean(settings, prompts, layer, weight, reward, folder)
                found.append(Trial(layer, weight, mean))
    return found


def _file(folder: Path, layer: int | None, weight: float) -> Path:
    return folder / f"trial-{layer}-{weight:g}.json"


def _mean(
    settings: VectorSettings, prompts: Sequence[Prompt], layer: int | None, weight: float,
    reward: Reward, folder: Path,
) -> float:  # fmt: skip
    """Mean reward of the replies; kept in a file once it is known."""
    file = _file(folder, layer, weight)
    if file.exists():
        mean: float = json.loads(file.read_bytes())["reward"]
        return mean
    fields = dict(settings.served.fields)
    if layer is not None:
        fields["adapters"] = [*fields.get("adapters", ()), {"name": _NAME, "weight": weight}]
    label = f"layer {layer}, weight {weight:g}" if layer is not None else "no vector"
    samples = sample(
        replace(settings.served, fields=fields),
        prompts,
        per_prompt=settings.samples,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed + 1,
        file=file.with_suffix(".samples.jsonl"),
        progress=label,
    )
    assert settings.reward is not None
    given = rewards(reward, settings.reward, prompts, samples, file.with_suffix(".rewards.jsonl"))
    mean = sum(given) / len(given)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"reward": mean}))
    part.rename(file)
    return mean


@contextlib.contextmanager
def _loaded(settings: VectorSettings, folder: Path) -> Iterator[None]:
    """A vector in the server, for as long as it is tried."""
    served = settings.served
    headers = {"Authorization": f"Bearer {settings.admin_key}"} if settings.admin_key else {}
    with httpx.Client(base_url=served.url, headers=headers, timeout=served.timeout_s) as client:
        body = {"name": _NAME, "source": str(folder.resolve()), "replace": True}
        record = _asked(client, "POST", "/admin/adapters", body)
        until = time.monotonic() + served.patience_s
        while record["state"] not in ("ready", "failed"):
            if time.monotonic() > until:
                raise BadRecipe("the server does not load the vector in time", field="--server")
            time.sleep(_POLL_S)
            record = _asked(client, "GET", f"/admin/adapters/{_NAME}", None)
        if record["state"] == "failed":
            raise BadRecipe(f"the server refuses the vector: {record['reason']}", field="--server")
        try:
            yield
        finally:
            with contextlib.suppress(httpx.HTTPError):
                client.delete(f"/admin/adapters/{_NAME}")


def _asked(
    client: httpx.Client, verb: str, path: str, body: dict[str, object] | None
) -> dict[str, str]:
    try:
        answer = client.request(verb, path, json=body)
        found: dict[str, str] = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise BadRecipe(f"cannot load a vector to try: {error}", field="--server") from error
    if not answer.is_success:
        raise BadRecipe(f"cannot load a vector to try: {found}", field="--server",
                        allowed="--admin-key, and a server whose adapters.roots has the folder of "
                        "--out and whose adapters.vectors is true")  # fmt: skip
    return found
