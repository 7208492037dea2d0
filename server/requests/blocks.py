"""Replies that grow block by block: their tokens, and the text that one engine request would give.

A block is an engine request of its own, whose prompt ends with the reply so far. Ids are kept as
they were drawn. Text is not: a character, or a stop string, may lie across the border of two
blocks, so it is made here from the ids, by vLLM's own detokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor

BYTES = 4
"""Tokens that one character may be spread over."""


@dataclass(frozen=True, slots=True)
class Text:
    """The text of a reply, as far as its characters are complete.

    Args:
        text: of the first `whole` ids.
        whole: how many.
    """

    text: str = ""
    whole: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as far as it has grown.

    Args:
        ids: its tokens.
        logprobs: of each token, if they are asked for.
        cumulative: the sum of the tokens' own, if they are asked for.
        finish: why it ended, as vLLM says it; None: it goes on.
        stop: the string or id that ended it, as vLLM says it.
        text: kept where there are stop strings.
        ratio: Σ log p_of − log p_to of its tokens.
        number: the head's after it; None without one.
        score: its own; −∞ before it has one.
        parts: what the worker measured of each of its blocks.
    """

    ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    cumulative: float = 0.0
    finish: str | None = None
    stop: int | str | None = None
    text: Text = Text()
    ratio: float = 0.0
    number: float | None = None
    score: float = float("-inf")
    parts: tuple[Mapping[str, Any], ...] = ()

    @property
    def by_token(self) -> bool:
        """Whether its last token ended it, which its text then lacks."""
        return self.finish == "stop" and not isinstance(self.stop, str)


@dataclass(frozen=True)
class Growth:
    """How the replies to one prompt grow.

    Args:
        tokenizer: the base's.
        params: of the request; `max_tokens` fits the context.
        prompt: the base's prompt.
        tokens: longest block; 0: what is left.
        until: text that ends a block; '' for none.
    """

    tokenizer: Any
    params: SamplingParams
    prompt: Sequence[int]
    tokens: int
    until: str

    def block(self, reply: Reply, seed: int | None) -> SamplingParams:
        """The parameters of the engine request of the next block."""
        params, length = copy.copy(self.params), len(reply.ids)
        assert params.max_tokens is not None
        left = params.max_tokens - length
        params.n, params.output_kind = 1, RequestOutputKind.FINAL_ONLY
        params.max_tokens = min(left, self.tokens or left)
        params.min_tokens = min(max(params.min_tokens - length, 0), params.max_tokens)
        params.stop = [*self.stops, *([self.until] if self.until else [])]
        params.detokenize = bool(params.stop) or params.logprobs is not None
        params.seed = seed
        return params

    @property
    def stops(self) -> list[str]:
        """The request's stop strings."""
        stop = self.params.stop
        return [stop] if isinstance(stop, str) else list(stop or ())

    def grown(self, reply: Reply, block: CompletionOutput) -> Reply:
        """The reply with a block that was drawn behind it.

        Args:
            reply: before.
            block: from a request with `self.block(reply, …)`.
        """
        own = tuple(block.token_ids)
        finish, stop = block.finish_reason, block.stop_reason
        full = len(reply.ids) + len(own) >= (self.params.max_tokens or 0)
        if isinstance(stop, str) or finish == "length":
            # The block ended there; the reply only at its length, or a stop string, seen below.
            finish, stop = "length" if full else None, None
        text = reply.text
        if self.stops:
            ends = finish == "stop" and not self.params.include_stop_str_in_output
            text, kept, found = self._read_on(reply, own[: len(own) - ends])
            if found is not None:
                own, finish, stop = own[:kept], "stop", found
        drawn = block.logprobs
        logprobs = tuple(dict(one) for one in drawn[: len(own)]) if drawn is not None else ()
        self._complete(reply.ids, own, logprobs)
        return replace(
            reply,
            ids=reply.ids + own,
            logprobs=reply.logprobs + logprobs,
            cumulative=reply.cumulative
            + sum(one[i].logprob for one, i in zip(logprobs, own, strict=False)),
            finish=finish,
            stop=stop,
            text=text,
        )

    def _read_on(self, reply: Reply, own: Sequence[int]) -> tuple[Text, int, str | None]:
        """Reads more ids behind a reply.

        Args:
            reply: before.
            own: the new ids.

        Returns:
            The text, how many of the ids count, and the stop string that ends it there, if any.
        """
        text, whole = reply.text.text, reply.text.whole
        reader = self.reader([*self.prompt, *reply.ids[:whole]])
        reader.output_text = text
        reader.min_tokens = max(self.params.min_tokens - whole, 0)
        for at, token in enumerate([*reply.ids[whole:], *own], whole + 1):
            if (found := reader.update([token], False)) is not None:
                return reply.text, at - len(reply.ids), found
            if len(reader.output_text) > len(text):
                text, whole = reader.output_text, at
        return Text(text, whole), len(own), None

    def reader(self, before: Sequence[int]) -> Any:
        """VLLM's detokenizer of what follows some ids."""
        request: Any = SimpleNamespace(
            request_id="block", prompt_token_ids=list(before), prompt_embeds=None,
            sampling_params=self.params,
        )  # fmt: skip
        return IncrementalDetokenizer.from_new_request(self.tokenizer, request)

    def _complete(
        self, before: Sequence[int], own: Sequence[int], logprobs: Sequence[dict[int, Logprob]]
    ) -> None:
        """Gives tokens their text that complete a character which began in an earlier block."""
        reader = LogprobsProcessor(self.tokenizer, None, None, None, None, None)
        for at, row in enumerate(logprobs[:BYTES] if before else ()):
            context, ids = [*before[-BYTES:], *own[:at]][-BYTES:], list(row)
            texts = convert_ids_list_to_tokens(self.tokenizer, ids)
            texts = reader._verify_tokens(texts, ids, list(context))
            for token, text in zip(ids, texts, strict=True):
                row[token] = replace(row[token], decoded_token=text)


class Writer:
    """Writes what is settled of a reply into outputs.

    Args:
        growth: of the reply.
        index: of the choice.
        first: an output of the prompt's first block, unpadded.
        request_id: of the request.
    """

    def __init__(self, growth: Growth, index: int, first: RequestOutput, request_id: str) -> None:
        self._growth, self._index, self._first = growth, index, first
        self._request_id, self._sent = request_id, 0
        self._reader = growth.reader(growth.prompt)

    @property
    def _delta(self) -> bool:
        return self._growth.params.output_kind == RequestOutputKind.DELTA

    def more(self, reply: Reply, settled: int) -> RequestOutput | None:
        """An output with what is new, in a stream; None if there is nothing.

        Args:
            reply: its first `settled` tokens can no longer change.
            settled: not the last token of a finished reply.
        """
        if not self._delta or settled <= self._sent:
            return None
        return self._output(reply, settled, ended=False)

    def end(self, reply: Reply) -> RequestOutput:
        """The last output: with what is new in a stream, else with all."""
        return self._output(reply, len(reply.ids), ended=True)

    def _output(self, reply: Reply, settled: int, *, ended: bool) -> RequestOutput:
        start, self._sent = self._sent, settled
        self._reader.update(list(reply.ids[start:settled]), ended and reply.by_token)
        start, params = start if self._delta else 0, self._growth.params
        choice = CompletionOutput(
            index=self._index,
            text=self._reader.get_next_output_text(ended, self._delta),
            token_ids=list(reply.ids[start:settled]),
            cumulative_logprob=None if params.logprobs is None else reply.cumulative,
            logprobs=None if params.logprobs is None else list(reply.logprobs[start:settled]),
            finish_reason=reply.finish if ended else None,
            stop_reason=reply.stop if ended else None,
            lora_request=self._first.lora_request,
        )
        first = self._first
        return RequestOutput(
            self._request_id, first.prompt, first.prompt_token_ids, None, [choice], ended,
            metrics=first.metrics, lora_request=first.lora_request,
            num_cached_tokens=first.num_cached_tokens,
        )  # fmt: skip
