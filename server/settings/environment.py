"""Settings from the environment, as `pydantic-settings` reads them: COXSWAIN_SECTION__KEY."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_settings import EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from server.settings.config import Config, ConfigInvalid

PREFIX = "COXSWAIN_"
API_KEYS = ("COXSWAIN_API_KEYS", "VLLM_API_KEY")
"""Keys with commas between them; the first variable that is set counts."""
ADMIN_KEY = "COXSWAIN_ADMIN_KEY"


class _Source(EnvSettingsSource):
    """As pydantic-settings has it, for an environment that is given."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {name.lower(): value for name, value in environ.items()}
        super().__init__(
            Config,  # type: ignore[arg-type]  # it is asked for its fields only
            case_sensitive=False,
            env_prefix=PREFIX,
            env_nested_delimiter="__",
        )

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._environ


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that the environment has, nested as in the file.

    Raises:
        ConfigInvalid: a variable names no section, or its value is not what JSON has there.
    """
    nested = [name for name in environ if name.startswith(PREFIX) and "__" in name]
    for name in nested:
        section = name.removeprefix(PREFIX).split("__")[0].lower()
        if section not in Config.model_fields:
            raise ConfigInvalid([f"environment: {name}: there is no section {section!r}"])
    try:
        # Settings of one word could be anybody's: Kubernetes sets COXSWAIN_PORT for a service.
        settings = _Source({name: environ[name] for name in nested})()
    except SettingsError as error:
        field = str(error).partition('field "')[2].partition('"')[0]
        message = f"{PREFIX}{field.upper()}__…: lists and objects are JSON ({error.__cause__})"
        raise ConfigInvalid([f"environment: {message}"]) from error
    if engine := settings.get("engine"):
        settings["engine"] = {name: _value(text) for name, text in engine.items()}
    auth = settings.setdefault("auth", {})
    for name in API_KEYS:
        if keys := [key.strip() for key in environ.get(name, "").split(",") if key.strip()]:
            auth["api_keys"] = keys
            break
    if admin := environ.get(ADMIN_KEY, "").strip():
        auth["admin_key"] = admin
    return settings if auth else {key: value for key, value in settings.items() if key != "auth"}


def _value(text: object) -> object:
    """An engine argument, whose type pydantic does not know: JSON, or the text as it is."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text
