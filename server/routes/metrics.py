"""GET /metrics: vLLM's series and ours, for Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response
from vllm.v1.metrics.prometheus import get_prometheus_registry

from server.routes.answers import text
from server.routes.collector import Present
from server.serving import Serving

router = APIRouter()


@router.get("/metrics", response_class=Response, responses=text())
async def metrics(raw_request: Request) -> Response:
    """All series in Prometheus's text format."""
    parts: Serving = raw_request.app.state.serving
    present: Present = raw_request.app.state.present
    present.look(parts)
    page = await asyncio.to_thread(generate_latest, get_prometheus_registry())
    return Response(page, media_type=CONTENT_TYPE_LATEST)
