"""The `steering` object of a response: what was done, and what the worker measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.requests.resolved import ResolvedRequest
from steering.plan import AdapterUse, Phase, SteeringPlan


def summary(resolved: ResolvedRequest, decode: Callable[[int], str]) -> dict[str, Any]:
    """The `steering` object of a response.

    Args:
        resolved: finished; `reports` holds every prompt's report.
        decode: token id → text, by the base's tokenizer.
    """
    plan = resolved.plan
    choices = {
        prompt * resolved.n + int(choice): record
        for prompt, report in sorted(resolved.reports.items())
        for choice, record in sorted(report.items(), key=lambda item: int(item[0]))
    }
    record: dict[str, Any] = {"method": plan.method}
    if resolved.profile is not None:
        record["profile"] = resolved.profile
    record |= _strengths(plan)
    if plan.phases:
        record["phases"] = [_strengths(phase) for phase in plan.phases]
    record["streams"] = list(plan.streams)
    reports = list(choices.values())
    if plan.adapters:
        record["adapters"] = [_adapter(resolved, use, reports) for use in plan.adapters]
    record |= _totals(reports)
    if plan.rule.reads_head and plan.rule.hard and not plan.phases:
        record["share_critical"] = _share(reports, "critical")
    if plan.best is not None:
        record["best_of_n"] = {
            "value": plan.best.head,
            "n": plan.best.n,
            "generated_tokens": sum(report["generated_tokens"] for report in reports),
        }
    if plan.search is not None:
        rounds = [one for report in reports for one in report["rounds"]]
        decided = [one["accepted"] for one in rounds if "accepted" in one]
        record["guided_search"] = {
            "k": plan.search.draw.k,
            "beams": plan.search.beams,
            "generated_tokens": sum(report["generated_tokens"] for report in reports),
            **({"accepted": sum(decided), "rejected": decided.count(False)} if decided else {}),
        }
    one_of_several = plan.best is not None or plan.search is not None
    if plan.report == "tokens" or len(choices) > 1 or one_of_several:
        record["choices"] = [
            {
                "index": index,
                **_totals([report]),
                **_chosen(report),
                **_searched(report, decode),
                **_detail(report, plan, decode),
            }
            for index, report in choices.items()
        ]
    return record


def _strengths(part: SteeringPlan | Phase) -> dict[str, Any]:
    """What is added to what."""
    found: dict[str, Any] = {"strengths": dict(part.weights)}
    if part.values is not None:
        found["values"] = {"strengths": dict(part.values.strengths), "top_k": part.values.top_k}
    return found


def _adapter(
    resolved: ResolvedRequest, use: AdapterUse, reports: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One adapter of the request; for a pack, how often tokens were routed to which member."""
    key = (use.stream, use.digest)
    adapter = next(p for p in resolved.adapters if (p.stream, p.digest) == key)
    entry: dict[str, Any] = {
        "name": adapter.name, "version": adapter.version, "digest": adapter.digest,
        "stream": adapter.stream, "weight": use.weight,
    }  # fmt: skip
    if use.invocation:
        entry["invoked"] = resolved.invoked[key]
    if adapter.artefact.gates:
        entry |= {"top_k": use.top_k, "temperature": use.temperature}
        counts = [0] * len(adapter.artefact.members)
        for report in reports:
            routed = report["routed"].get(use.stream, {}).get(use.digest)
            if routed is None:
                continue
            counts = [a + b for a, b in zip(counts, routed, strict=True)]
        total = sum(counts)
        entry["routed"] = {
            member: count / total if total else None
            for member, count in zip(adapter.artefact.members, counts, strict=True)
        }
    return entry


def _totals(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the tokens of some choices; null where there was no token."""
    tokens = sum(report["tokens"] for report in reports)
    passes: dict[str, int] = {}
    for report in reports:
        for stream, count in report["passes"].items():
            passes[stream] = passes.get(stream, 0) + count

    def share(total: float) -> float | None:
        return _finite(total / tokens) if tokens else None

    drafted, accepted = (sum(r[key] for r in reports) for key in ("drafted", "accepted"))
    speculation = {"speculation": {"drafted": drafted, "accepted": accepted}} if drafted else {}
    return {
        "tokens": tokens,
        "forward_passes_per_token": {stream: share(count) for stream, count in passes.items()},
        "mean_kl": share(sum(report["kl_sum"] for report in reports)),
        "share_changed": share(sum(report["changed"] for report in reports)),
        **speculation,
    }


def _share(reports: Sequence[Mapping[str, Any]], what: str) -> float | None:
    """A count over the tokens of some choices; None where there was no token."""
    tokens = sum(report["tokens"] for report in reports)
    return sum(report[what] for report in reports) / tokens if tokens else None


def _critical(entry: Mapping[str, Any], plan: SteeringPlan) -> dict[str, Any]:
    """What is known of a token of `critical_tokens`; nothing for other methods."""
    details = {k: entry[k] for k in ("critical_probability", "critical") if k in entry}
    if "critical" in entry:
        k = plan.rule.stream
        aligned = next(name for name, c in plan.weights if c and name != k)
        details["chosen_by"] = k if entry["critical"] else aligned
    return details


def _values(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the text in front of a token; nothing for other methods."""
    heads: Mapping[str, float] = entry.get("heads", {})
    return {"values": {name: _finite(value) for name, value in heads.items()}} if heads else {}


def _chosen(report: Mapping[str, Any]) -> dict[str, Any]:
    """Among which values one reply was chosen; nothing for other methods."""
    if "chosen" not in report:
        return {}
    fields = {key: report[key] for key in ("generated_tokens", "chosen")}
    return {**fields, "values": [_finite(value) for value in report["values"]]}


def _searched(report: Mapping[str, Any], decode: Callable[[int], str]) -> dict[str, Any]:
    """The rounds of a guided search; nothing for other methods."""
    if "rounds" not in report:
        return {}

    def shown(draw: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {k: draw[k] for k in ("score", "value", "log_ratio") if k in draw}
        found = {**draw, **{k: _finite(number) for k, number in numbers.items()}}
        if "token_ids" in draw:
            found["text_tokens"] = [decode(token) for token in draw["token_ids"]]
        return found

    rounds = [{**one, "draws": [shown(draw) for draw in one["draws"]]} for one in report["rounds"]]
    fields = {key: report[key] for key in ("generated_tokens", "returned")}
    return {**fields, "rounds": rounds}


def _detail(
    report: Mapping[str, Any], plan: SteeringPlan, decode: Callable[[int], str]
) -> dict[str, Any]:
    if plan.report != "tokens":
        return {}
    return {
        "token_details": [
            {
                "token": decode(entry["token_id"]),
                "token_id": entry["token_id"],
                "base_logprob": _finite(entry["base_logprob"]),
                "steered_logprob": _finite(entry["steered_logprob"]),
                "kl": _finite(entry["kl"]),
                "base_choice": decode(entry["base_choice"]),
                "base_choice_id": entry["base_choice"],
                "changed": entry["changed"],
                **_choices(entry, decode),
                **_critical(entry, plan),
                **_values(entry),
            }
            for entry in report.get("detail", ())
        ]
    }


def _choices(entry: Mapping[str, Any], decode: Callable[[int], str]) -> dict[str, Any]:
    """What the base and each stream by itself found most likely in a token's place."""
    choices: Mapping[str, tuple[int, float]] = entry.get("choices", {})
    by_stream = {
        stream: {"token": decode(token), "token_id": token, "logprob": _finite(logprob)}
        for stream, (token, logprob) in choices.items()
    }
    return {"stream_choices": by_stream} if by_stream else {}


def _finite(value: float) -> float | None:
    """JSON has no infinities: an impossible token's log-probability becomes null."""
    return value if math.isfinite(value) else None
