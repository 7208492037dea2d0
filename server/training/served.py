"""The flags of recipes that sample from a running server, as a server and how it is asked."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any


def served_by(given: argparse.Namespace) -> Any:
    """The `adapters.training.served.Served` that a command line names.

    Raises:
        BadRecipe: a flag cannot be used.
    """
    from adapters.training.errors import BadRecipe
    from adapters.training.served import Served

    try:
        fields = json.loads(given.request)
    except ValueError as error:
        raise BadRecipe(f"not JSON: {error}", field="--request", value=given.request) from error
    if not isinstance(fields, dict):
        raise BadRecipe(
            "not a JSON object", field="--request", value=given.request, allowed='{"steering": …}'
        )
    if given.concurrency < 1:
        raise BadRecipe(
            "cannot be used", field="--concurrency", value=given.concurrency, allowed="≥ 1"
        )
    key = given.key or os.environ.get("COXSWAIN_API_KEYS", "").partition(",")[0].strip() or None
    return Served(given.server, key, given.model, fields, given.concurrency)
