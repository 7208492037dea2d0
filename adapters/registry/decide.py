"""Decides a replica's next step for one adapter. Pure, so every interleaving can be tested."""

from __future__ import annotations

from typing import Literal

from adapters.registry.record import WORKING, Content, Record

Step = Literal["nothing", "take", "work", "follow", "drop", "forget"]
"""
take     the owner of the work is gone: become the owner
work     our own work: fetch, load, say ready
follow   another's result: fetch and load what the record says is serving
drop     unload what is loaded here
forget   our own unloading is done here: delete the record
"""


def decide(
    record: Record | None,
    *,
    here: Content | None,
    replica: str,
    alive: frozenset[str] | None,
    can_follow: bool = True,
) -> Step:
    """The next step.

    Args:
        record: the registry's; None: there is none.
        here: what is loaded here under this name.
        replica: our own name.
        alive: replicas with a lease; None: the leases say nothing at present.
        can_follow: false after loading what is serving has failed here.
    """
    if record is None:
        return "drop" if here else "nothing"
    mine = record.owner == replica
    orphan = alive is not None and not mine and record.owner not in alive
    if record.state == "unloading":
        if here:
            return "drop"
        return "forget" if mine else "take" if orphan else "nothing"
    if record.serving is None and here is not None:
        return "drop"
    # What serves comes before what shall serve: a replica that starts owes its answers first.
    behind = record.serving is not None and (here is None or here.key != record.serving.key)
    if behind and can_follow:
        return "follow"
    if record.state in WORKING:
        return "work" if mine else "take" if orphan else "nothing"
    return "nothing"
