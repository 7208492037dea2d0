"""Guided search: blocks are drawn, scored and chosen, until the reply is complete.

Each block takes a round of engine requests, one per sample, whose prompts end with the reply so
far, and, where a head scores them, a round that reads them; the prefix cache has what they share.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, SamplingType

from server.requests.blocks import Growth, Reply, Writer
from server.requests.engine_request import EngineRequest, prepare, refuse_lag
from server.requests.rounds import last, measured, passes, read, together
from steering.errors import BadValue
from steering.plan import SteeringPlan
from steering.prompts import align
from steering.search import Proposal, Search, chosen

if TYPE_CHECKING:
    from server.requests.run import RequestEngine

_COUNTS_FROM_THE_BLOCK: Mapping[str, object] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "bad_words": None,
    "structured_outputs": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
}
"""Parameters that look at the whole reply, and what they are where they do nothing: the engine
would start them again with every block."""


def start(
    engine: RequestEngine, request: EngineRequest, index: int
) -> AsyncGenerator[RequestOutput, None]:
    """Runs one prompt under a plan with `search`.

    A plain function: what is wrong is raised here, before a response has begun.

    Args:
        engine: to run it; gets the report.
        request: as it came.
        index: which of the HTTP request's prompts.

    Raises:
        BadValue: a parameter that does not go with blocks; greedy decoding, which draws the same
            block every time; a prompt that leaves no room. Where a head reads, one token of the
            context is kept free: the engine reads a prompt only if it may draw a token behind it.
    """
    plan, params = engine.resolved.plan_of(index), request.params.clone()
    search = plan.search
    assert search is not None
    for name, idle in _COUNTS_FROM_THE_BLOCK.items():
        value = getattr(params, name)
        if value not in (idle, []):
            raise BadValue("guided_search draws replies in blocks, and the engine would start "
                           "this again with every block", field=name,
                           value=value if isinstance(value, float | int) else "…",
                           allowed="left out")  # fmt: skip
    if search.drawn > 1 and params.sampling_type == SamplingType.GREEDY:
        raise BadValue("greedy decoding draws the same block every time; guided_search needs "
                       "several, or k: 1", field="temperature", value=params.temperature,
                       allowed="> 0")  # fmt: skip
    padded, pad = align(request.prompt_ids, plan)
    refuse_lag(pad, engine.engine.model_config.is_hybrid)
    reads = any(p.score is not None and p.score.head for p in search.proposals)
    engine.fit(params, len(padded), pad, engine.engine.model_config.max_model_len - reads)
    growth = Growth(
        engine.engine.renderer.tokenizer, params, request.prompt_ids, search.tokens, search.until
    )
    searches = [_Run(engine, request, growth, plan, search, index, i) for i in range(params.n)]
    if params.n == 1:
        return searches[0].outputs()
    return _side_by_side([one.outputs() for one in searches], params)


@dataclass
class _Run:
    """One search.

    Args:
        engine: to run it; gets the report.
        request: as it came.
        growth: of its replies.
        plan: the request's.
        search: the plan's.
        index: which of the HTTP request's prompts.
        choice: which of the request's `n`.
    """

    engine: RequestEngine
    request: EngineRequest
    growth: Growth
    plan: SteeringPlan
    search: Search
    index: int
    choice: int
    _writer: Writer | None = None
    _block: int = 0
    _drawn: int = 0
    _rounds: list[dict[str, Any]] = field(default_factory=list)
    _passes: list[Mapping[str, Any]] = field(default_factory=list)

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        """What is settled, in a stream; then the whole reply."""
        beams, search = [Reply()], self.search
        while any(beam.finish is None for beam in beams):
            kept = await self._grow(beams, search.draw, "draw")
            if search.fallback is not None and search.accept is not None:
                accepted = kept[0].score >= search.accept
                if self._rounds:
                    self._rounds[-1]["accepted"] = accepted
                if not accepted:
                    kept = await self._grow(beams, search.fallback, "fallback")
            beams = kept
            self._block += 1
            if any(beam.finish is None for beam in beams):
                output = self._written.more(beams[0], _common(beams))
                if output is not None:
                    yield output
        reply = max(beams, key=lambda beam: beam.score)
        self._report(reply, beams.index(reply))
        yield self._written.end(reply)

    @property
    def _written(self) -> Writer:
        assert self._writer is not None, "nothing was drawn"
        return self._writer

    async def _grow(self, beams: Sequence[Reply], proposal: Proposal, by: str) -> list[Reply]:
        """One round: blocks are drawn and scored; those that are kept, first the one that leads.

        Args:
            beams: the replies before. Those that are complete compete as they are.
            proposal: how blocks are drawn.
            by: 'draw' or 'fallback'.
        """
        # The first block has no beams yet, but as many samples as there will be later.
        k = proposal.k * (self.search.beams if not self._block else 1)
        jobs = [(b, beam) for b, beam in enumerate(beams) if beam.finish is None for _ in range(k)]
        grown = await self._draw([beam for _, beam in jobs], proposal, by)
        if proposal.score is not None:
            grown = await self._scored(grown, proposal, by)
        ended = [(b, beam) for b, beam in enumerate(beams) if beam.finish is not None]
        pool = [*(beam for _, beam in ended), *grown]
        parents = [b for b, _ in (*ended, *jobs)]
        beta = self.search.beta if proposal.score is not None else None
        uniforms = [] if beta is None else self._uniforms(len(pool), by)
        kept = chosen([reply.score for reply in pool], self.search.beams, beta, uniforms)
        if self.plan.report != "off":
            draws = [
                self._told(reply, beams[b], b, proposal)
                for reply, b in zip(pool, parents, strict=True)
            ]
            entry = {"block": self._block, "by": by, "draws": draws, "kept": kept}
            self._rounds.append(entry | ({"uniforms": uniforms} if uniforms else {}))
        return [pool[i] for i in kept]

    # --- drawing and scoring --------------------------------------------------------------------

    async def _draw(self, beams: Sequence[Reply], proposal: Proposal, by: str) -> list[Reply]:
        """The replies with a block drawn behind each."""
        plan = self.plan.proposing(proposal)
        tag = self._name(by) if plan.report != "off" else ""
        grown: dict[int, Reply] = {}
        tokens: dict[str, int] = {}

        async def draw(number: int, beam: Reply) -> None:
            params = self.growth.block(beam, self._seed(by, number))
            own = replace(self.request, params=params, id=f"{number}_{self._name(by)}")
            prepared = prepare(own, plan, tag, beam.ids)
            again = bool(self._block or number or self.choice or by != "draw")
            output = await last(self.engine.counted(prepared, again=again))
            (block,) = output.outputs
            grown[number] = self.growth.grown(beam, block)
            tokens[str(number)] = len(grown[number].ids) - len(beam.ids)
            self._drawn += len(block.token_ids)
            if self._writer is None and not number:
                prepared.unpad(output)
                output.prompt_token_ids = list(self.growth.prompt)
                self._writer = Writer(self.growth, self.choice, output, self.request.id)

        running = together(draw(*pair) for pair in enumerate(beams))
        if not tag:
            await running
            return [grown[number] for number in range(len(beams))]
        records = await measured(self.engine, tag, running, tokens)
        self._passes += records.values()
        return [
            self._with_record(grown[number], records[str(number)], plan, proposal)
            for number in range(len(beams))
        ]

    def _with_record(
        self, reply: Reply, record: Mapping[str, Any], plan: SteeringPlan, proposal: Proposal
    ) -> Reply:
        """A grown reply with what the worker measured of its last block."""
        if not plan.runs_base:
            record = {**record, "kl_sum": float("nan"), "changed": float("nan")}
        ratio, score = 0.0, proposal.score
        if score is not None and score.of:
            # With one beam, what stands before the block is the same for all.
            before = reply.ratio if self.search.beams > 1 else 0.0
            own = record["likelihoods"]
            ratio = before + own[score.of] - own[score.to]
        return replace(reply, ratio=ratio, parts=(*reply.parts, record))

    async def _scored(self, grown: Sequence[Reply], proposal: Proposal, by: str) -> list[Reply]:
        """The replies with what the proposal's score says of each."""
        score = proposal.score
        assert score is not None
        numbers: list[float | None] = [None] * len(grown)
        if score.head:
            plan, ids = self.plan.reading(score.head, score.body), [reply.ids for reply in grown]
            heard = await read(self.engine, self.request, plan, f"{self._name(by)}-value", ids)
            self._passes += heard.values()
            numbers = [heard[str(i)]["heads"][score.head] for i in range(len(grown))]
        return [
            replace(reply, number=number, score=score.total(number, reply.ratio))
            for reply, number in zip(grown, numbers, strict=True)
        ]

    def _name(self, by: str) -> str:
        tag = self.engine.resolved.tag
        return f"{tag}-{self.index}-{self.choice}-{self._block}-{by}"

    # --- chance ---------------------------------------------------------------------------------

    def _seed(self, by: str, number: int) -> int | None:
        """The seed of a sample; in the first block, those of `n` samples of the request."""
        seed = self.growth.params.seed
        if seed is None:
            return None
        if not self._block and not self.choice and by == "draw":
            return seed + number
        return _mixed(seed, self.choice, self._block, by, number)

    def _uniforms(self, count: int, by: str) -> list[float]:
        """Numbers in (0, 1) for a choice."""
        seed = self.growth.params.seed
        where = None if seed is None else _mixed(seed, self.choice, self._block, by, "choose")
        rng = random.Random(where)
        return [(rng.getrandbits(52) + 0.5) / (1 << 52) for _ in range(count)]

    # --- the report -----------------------------------------------------------------------------

    def _told(self, reply: Reply, before: Reply, beam: int, proposal: Proposal) -> dict[str, Any]:
        """What the report says of one candidate."""
        own, score = reply.ids[len(before.ids) :], proposal.score
        entry: dict[str, Any] = {"beam": beam, "tokens": len(own)}
        if self.plan.report == "tokens":
            entry["token_ids"] = list(own)
        if score is not None:
            entry["score"] = reply.score
            entry |= {"value": reply.number} if score.head else {}
            entry |= {"log_ratio": reply.ratio} if score.of else {}
        return {**entry, "finished": reply.finish is not None}

    def _report(self, reply: Reply, place: int) -> None:
        if self.plan.report == "off":
            return
        record = {
            **_together(reply.parts),
            "passes": passes(self._passes),
            "generated_tokens": self._drawn,
            "rounds": self._rounds,
            "returned": place,
        }
        reports = self.engine.resolved.reports
        reports[self.index] = {**reports.get(self.index, {}), str(self.choice): record}
        self.engine.measured({str(self.choice): record})


def _common(beams: Sequence[Reply]) -> int:
    """How many tokens all beams begin with."""
    columns = zip(*(beam.ids for beam in beams), strict=False)
    return sum(1 for _ in takewhile(lambda ids: len({*ids}) == 1, columns))


def _together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the worker measured of a reply, from what it measured of its blocks."""
    routed: dict[str, dict[str, list[int]]] = {}
    for part in parts:
        for stream, packs in part["routed"].items():
            for digest, counts in packs.items():
                own = routed.setdefault(stream, {})
                own[digest] = [a + b for a, b in zip(own.get(digest, [0] * len(counts)), counts,
                                                     strict=True)]  # fmt: skip
    counted = ("tokens", "kl_sum", "changed", "critical", "drafted", "accepted")
    return {
        **{name: sum(part[name] for part in parts) for name in counted},
        "detail": [entry for part in parts for entry in part["detail"]],
        "heads": {},
        "routed": routed,
    }


def _mixed(seed: int, *where: object) -> int:
    """A seed for a place in a search, from the request's."""
    digest = hashlib.sha256(repr((seed, *where)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


async def _side_by_side(
    searches: Sequence[AsyncGenerator[RequestOutput, None]], params: SamplingParams
) -> AsyncGenerator[RequestOutput, None]:
    """The outputs of several searches as those of one request with `n` choices."""
    queue: asyncio.Queue[RequestOutput | None] = asyncio.Queue()

    async def run(search: AsyncGenerator[RequestOutput, None]) -> None:
        async with aclosing(search):
            async for output in search:
                queue.put_nowait(output)

    async def run_all() -> None:
        try:
            await together(run(search) for search in searches)
        finally:
            queue.put_nowait(None)

    running = asyncio.create_task(run_all())
    ended: list[RequestOutput] = []
    try:
        while (output := await queue.get()) is not None:
            ended += [output] if output.finished else []
            output.finished = len(ended) == len(searches)
            if params.output_kind == RequestOutputKind.DELTA:
                yield output
            elif output.finished:
                output.outputs = sorted((o.outputs[0] for o in ended), key=lambda c: c.index)
                yield output
        await running  # raises what ended it
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
