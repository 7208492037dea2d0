"""Chat templates of operators, checked before a request needs them."""

from __future__ import annotations

from steering.errors import BadValue
from steering.resolve import Resolved
from steering.spec import Profile


def check_template(text: str, field: str) -> None:
    """Compiles a chat template, as rendering would.

    Raises:
        BadValue: it is not a template.
    """
    # The one that vLLM and the tokenizers use: it knows the tags that models' templates have.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except Exception as error:  # Jinja's errors, and Python's for what it compiles to
        line = getattr(error, "lineno", None)
        at = f" (line {line})" if line is not None else ""
        detail = str(error).split("\n")[0]
        raise BadValue(f"not a chat template: {detail}{at}", field=field) from error


def check_profile_templates(name: str, profile: Profile, resolved: Resolved) -> None:
    """Compiles all templates of a profile: the base's and those of its streams.

    Raises:
        BadValue: with a field under `profiles.<name>`.
    """
    if profile.chat_template is not None:
        check_template(profile.chat_template, f"profiles.{name}.chat_template")
    for stream, prompt in resolved.prompts.items():
        if prompt.chat_template is not None:
            where = f"profiles.{name}.prompts.{stream}.chat_template"
            check_template(prompt.chat_template, where)
