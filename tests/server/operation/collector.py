"""A collector of OpenTelemetry traces: takes OTLP over HTTP, as a real one does."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


class Collector:
    """Keeps the spans that it was sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def endpoint(self) -> str:
        """For the configuration."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"

    @contextmanager
    def running(self) -> Iterator[Collector]:
        """Serves."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()

    def find(self, request_id: str) -> list[Any]:
        """The spans of a request: ours first, then those below it."""
        own = [s for s in self.spans if attributes(s).get("coxswain.request_id") == request_id]
        below = [s for s in self.spans if own and s.parent_span_id == own[0].span_id]
        return [*own, *below]


@contextmanager
def grpc_collector() -> Iterator[tuple[str, list[Any]]]:
    """A collector that takes OTLP over gRPC: its endpoint, and the spans that it was sent."""
    spans: list[Any] = []

    class Service(TraceServiceServicer):
        def Export(self, request: Any, _: Any) -> ExportTraceServiceResponse:  # noqa: N802
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", spans
    finally:
        server.stop(None)


def attributes(span: Any) -> dict[str, Any]:
    """Of a span, as plain values."""
    return {one.key: _plain(one.value) for one in span.attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(one) for one in value.array_value.values]
    return getattr(value, kind)
