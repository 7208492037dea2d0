"""GET /metrics: vLLM's series and ours, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response
from vllm.v1.metrics.prometheus import get_prometheus_registry

router = APIRouter()


@router.get("/metrics")
def metrics() -> Response:
    """All series in Prometheus's text format."""
    return Response(generate_latest(get_prometheus_registry()), media_type=CONTENT_TYPE_LATEST)
