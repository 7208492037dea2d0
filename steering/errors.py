"""Errors of the steering layer.

    SteeringError
    ├── BadValue    the caller asked for something outside the allowed values   → 400
    ├── NotFound    the caller named a stream, profile or method we do not have → 404
    └── DoesNotFit  an artefact does not fit the base                           → 422

The class decides the HTTP status; `server.errors` holds the one table.
"""

from __future__ import annotations

from adapters.errors import Fault


class SteeringError(Fault):
    """A fault of the caller: the field, e.g. `steering.strength`, the value, what is allowed."""


class BadValue(SteeringError):
    """A value outside its range, an unknown field, or fields that contradict each other."""


class NotFound(SteeringError):
    """A stream, profile or method that this server does not have."""


class DoesNotFit(SteeringError):
    """An artefact (checkpoint, tokenizer, adapter) that does not fit the base."""
