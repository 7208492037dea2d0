"""A training run that was asked for wrongly."""

from __future__ import annotations

from adapters.errors import AdapterError


class BadRecipe(AdapterError):
    """A setting or a line of training data that cannot be used; nothing has been trained."""
