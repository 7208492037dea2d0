"""Where in a text something acts: the words that adapters and phases share."""

from __future__ import annotations

from adapters.where import ALLOWED, EVERYWHERE, MANY, Where, read_where

__all__ = ["ALLOWED", "EVERYWHERE", "MANY", "Where", "read_where"]
