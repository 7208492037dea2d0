"""Prompts of their own: what a stream reads instead of the request's prompt, as token ids.

Rendered and tokenised with the stream's own tokenizer, in a thread, because it can take long.
Templates that requests bring are rendered in a process of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.access import ANYONE
from server.requests.sandbox import RenderFailed, Sandbox
from server.requests.template_process import LONGEST_RENDERED
from steering.errors import BadValue
from steering.method import OwnPrompt
from steering.plan import BASE

LONGEST_TEMPLATE = 64 * 1024
"""Characters of a chat template in a request."""


class Tokenizer(Protocol):
    """The part of a `transformers` tokenizer that we use."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """What templates call `bos_token` and the like."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""
        ...

    def apply_chat_template(
        self, conversation: Any, *, chat_template: str | None = ..., **options: Any
    ) -> Any:
        """The text that messages are rendered to."""
        ...


@dataclass(frozen=True, slots=True)
class Reader:
    """What one stream can read.

    Args:
        tokenizer: the stream's own.
        table: rows of its embedding table; ids from here on cannot be read.
        chat_template: the tokenizer has one.
    """

    tokenizer: Tokenizer
    table: int
    chat_template: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """The request's own messages, for streams that render them with another template.

    Args:
        messages: role and content (text).
        options: what the request passes to its template (tools, add_generation_prompt, …).
    """

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=lambda: {"add_generation_prompt": True})


@dataclass(frozen=True)
class OwnPrompts:
    """Turns own prompts into token ids.

    Args:
        readers: stream name → what it can read.
        longest: tokens that a prompt may have (the context, less one token to generate).
        chat_templates: whether requests may bring templates.
        sandbox: renders those.
    """

    readers: Mapping[str, Reader]
    longest: int
    chat_templates: bool = True
    sandbox: Sandbox = field(default_factory=Sandbox)

    async def token_ids(
        self,
        prompts: Mapping[str, OwnPrompt],
        conversation: Conversation | None,
        *,
        field: str = "steering",
        default_template: str | None = None,
        trusted: bool = False,
        caller: str = ANYONE,
    ) -> dict[str, tuple[int, ...]]:
        """The ids of each stream's prompt.

        Args:
            prompts: stream → prompt, from `steering.resolve.Resolved`.
            conversation: the request's own messages; None where it has none.
            field: where the steering object stands, for errors.
            default_template: the profile's chat template.
            trusted: the prompts come from the operator's profile, not from the request.
            caller: whose request it is: its templates queue with its own.

        Raises:
            BadValue: a template that does not render, ids outside the stream's vocabulary, a
                prompt that is too long or empty.
            HttpError: 429, too many templates of this caller wait.
        """
        ids = {}
        for stream, prompt in prompts.items():
            where = f"{field}.prompts.{stream}"
            text = None
            if prompt.chat_template is not None and not trusted:
                text = await self._rendered(caller, stream, prompt, conversation, where)
            ids[stream] = await asyncio.to_thread(
                self._one, stream, prompt, conversation, where, default_template, text
            )
        return ids

    def text_ids(self, text: str) -> list[int]:
        """The base's tokens of a short text, without any that stand for its begin or end."""
        return _encode(self.readers[BASE], text, False, "steering.phases")

    async def _rendered(
        self,
        caller: str,
        stream: str,
        prompt: OwnPrompt,
        conversation: Conversation | None,
        where: str,
    ) -> str:
        """The text of a prompt whose template the request brings."""
        template, place = prompt.chat_template, f"{where}.chat_template"
        assert template is not None
        self._refuse_template(template, where)
        talk = _needed(conversation, place)
        variables = {**self.readers[stream].tokenizer.special_tokens_map, **talk.options}
        try:
            return await self.sandbox.render(caller, template, talk.messages, variables)
        except (RenderFailed, TypeError, ValueError) as error:
            raise BadValue(f"the template does not render: {error}", field=place) from error

    def _refuse_template(self, template: str, where: str) -> None:
        if not self.chat_templates:
            raise BadValue("this server takes chat templates from profiles only",
                           field=f"{where}.chat_template")  # fmt: skip
        if len(template) > LONGEST_TEMPLATE:
            raise BadValue("the template is too long", field=f"{where}.chat_template",
                           value=f"{len(template)} characters",
                           allowed=f"at most {LONGEST_TEMPLATE} characters")  # fmt: skip

    def _one(
        self,
        stream: str,
        prompt: OwnPrompt,
        conversation: Conversation | None,
        where: str,
        default_template: str | None,
        text: str | None,
    ) -> tuple[int, ...]:
        reader = self.readers[stream]
        if prompt.token_ids is not None:
            ids = list(prompt.token_ids)
            self._check_range(ids, reader, f"{where}.token_ids")
        elif prompt.prompt is not None:
            ids = _encode(reader, prompt.prompt, True, f"{where}.prompt")
        else:
            if text is None:
                text = _render(reader, prompt, conversation, where, default_template)
            ids = _encode(reader, text, False, where)
        if not ids:
            raise BadValue("the prompt has no tokens", field=where)
        if len(ids) > self.longest:
            raise BadValue(
                f"the prompt of stream {stream} has {len(ids)} tokens, more than it can hold",
                field=where,
                allowed=f"at most {self.longest} tokens",
            )
        return tuple(ids)

    @staticmethod
    def _check_range(ids: Sequence[int], reader: Reader, where: str) -> None:
        for place, token_id in enumerate(ids):
            if token_id >= reader.table:
                raise BadValue("not a token of this stream", field=f"{where}.{place}",
                               value=token_id, allowed=f"[0, {reader.table - 1}]")  # fmt: skip


def _encode(reader: Reader, text: str, special: bool, where: str) -> list[int]:
    """Token ids of a text.

    Raises:
        BadValue: text that is not Unicode (lone surrogates pass JSON), or far too long.
    """
    if len(text) > LONGEST_RENDERED:
        raise BadValue("the rendered prompt is too long", field=where,
                       value=f"{len(text)} characters",
                       allowed=f"at most {LONGEST_RENDERED} characters")  # fmt: skip
    try:
        text.encode()
        return list(reader.tokenizer.encode(text, add_special_tokens=special))
    except (UnicodeEncodeError, TypeError) as error:
        raise BadValue("the text is not valid Unicode", field=where) from error


def _needed(conversation: Conversation | None, place: str) -> Conversation:
    """Raises BadValue: there is none."""
    if conversation is None:
        raise BadValue("the request has no messages or text to render", field=place)
    return conversation


def _render(
    reader: Reader,
    prompt: OwnPrompt,
    conversation: Conversation | None,
    where: str,
    default_template: str | None,
) -> str:
    """The text of a prompt that the operator gives as a template, or anybody as messages."""
    if prompt.messages is not None:
        messages: Sequence[Mapping[str, Any]] = prompt.messages
        options: Mapping[str, Any] = {"add_generation_prompt": True}
        template = default_template
        place = f"{where}.messages"
        if template is None and not reader.chat_template:
            raise BadValue("the stream's tokenizer has no chat template: give `prompt` instead, "
                           "or use a profile with a chat_template", field=place)  # fmt: skip
    else:
        place = f"{where}.chat_template"
        talk = _needed(conversation, place)
        messages, options, template = talk.messages, talk.options, prompt.chat_template
    try:
        text = reader.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            tokenize=False,
            **options,
        )
    except Exception as error:
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise BadValue(f"the template does not render: {detail}", field=place) from error
    return str(text)
