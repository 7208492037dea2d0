"""vLLM's error texts in our words. They name vLLM's command line and environment, which people who
run this server do not use, and fields of vLLM's own types, which no request has.

`tests/server/test_vllm_words.py` holds the tables against vLLM's source.
"""

from __future__ import annotations

import re

_SETTINGS = {
    "--enable-auto-tool-choice and --tool-call-parser to be set": (
        "`chat.tool_call_parser` in the server's configuration"
    ),
    "--tool-call-parser to be set": "`chat.tool_call_parser` in the server's configuration",
    "--trust-request-chat-template is not set. Refused request with untrusted chat template.": (
        "this server takes templates from its configuration only: `chat.template`, or a profile's "
        "`chat_template`."
    ),
    "Please set --reasoning-parser and/or --reasoning-config": "It needs `chat.reasoning_parser`",
    " (VLLM_USE_V2_MODEL_RUNNER=1)": "",
    " (VLLM_ENFORCE_STRICT_TOOL_CALLING)": "",
    "are disabled by default": "are refused",
    " Start the server with --trust-request-mm-kwargs only when clients are trusted.": "",
}
"""Parts of messages, and what stands in their place. The longest that fits wins."""

_ENVIRONMENT = re.compile(
    r" To increase this limit, set the VLLM_[A-Z_]+ environment variable\."
    r"| Adjust VLLM_[A-Z_]+ to override\."
)
"""Sentences about limits that we set by `limits.max_replies`, or not at all."""

_FLAG = re.compile(r"`?--([a-z]+(?:-[a-z]+)+)`?(?=[\s.,;)]|$)")
"""Any other flag is the engine's, and so a setting of the section `engine`."""

_CONTEXT = re.compile(
    r"maximum context length|exceeds the max_model_len|maximum model length"
    r"|=\d+ cannot be greater than max_model_len="
)
"""How vLLM says that prompt and reply are longer than the context."""

PROMPT = "input_tokens"
"""What vLLM calls a request's prompt in errors about its length; see `own_names`."""


def own_names(prompt: str, max_tokens: str, logprobs: str) -> dict[str, str]:
    """VLLM's names of fields → the names that a request has for them.

    Args:
        prompt: e.g. `messages`.
        max_tokens: e.g. `max_completion_tokens`.
        logprobs: e.g. `top_logprobs`.
    """
    names = {"input_text": prompt, PROMPT: prompt, "max_tokens": max_tokens, "logprobs": logprobs}
    return {theirs: ours for theirs, ours in names.items() if theirs != ours}


def in_our_words(message: str) -> str:
    """An error's text with our settings in the place of vLLM's flags."""
    for theirs in sorted(_SETTINGS, key=len, reverse=True):
        message = message.replace(theirs, _SETTINGS[theirs])
    message = _ENVIRONMENT.sub("", message)
    return _FLAG.sub(lambda match: f"`engine.{match[1].replace('-', '_')}`", message)


def is_too_long(message: str) -> bool:
    """Whether an error means that prompt and reply do not fit into the context."""
    return bool(_CONTEXT.search(message))
