"""OpenTelemetry traces: one span per inference request, above the span that vLLM makes of it.

The packages are optional; they are imported only where the configuration asks for traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from server import errors
from server.context import NONE, RequestContext
from server.settings.config import ConfigInvalid
from server.settings.operating import TracingConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

TRACEPARENT = "traceparent"
_SERVER_FAULT = 500


class Tracing:
    """One per process; `start` makes it.

    Args:
        provider: gives spans, and sends them in the background.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("coxswain")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, headers: Mapping[str, str]) -> tuple[Span, dict[str, str]]:
        """A span that has begun, below the caller's if it names one.

        Returns:
            The span, and the headers by which others put theirs below it.
        """
        from opentelemetry.trace import SpanKind, set_span_in_context

        above = self._propagator.extract(dict(headers))
        span = self._tracer.start_span(name, context=above, kind=SpanKind.SERVER)
        below: dict[str, str] = {}
        self._propagator.inject(below, context=set_span_in_context(span))
        return span, below

    def end(self, span: Span, context: RequestContext) -> None:
        """Puts what is known of a request into its span, and ends it."""
        from opentelemetry.trace import Status, StatusCode

        attributes: dict[str, Any] = {
            "http.response.status_code": context.sent_status,
            "coxswain.request_id": context.id,
            "coxswain.caller": context.access.caller,
            "coxswain.method": context.method,
            "coxswain.profile": context.profile,
            "coxswain.adapter": context.adapter,
            "coxswain.adapter_digests": list(context.digests),
            "gen_ai.request.model": context.model or "",
            "gen_ai.usage.input_tokens": context.prompt_tokens,
            "gen_ai.usage.output_tokens": context.output_tokens,
        }
        if context.first_token_s is not None:
            attributes["coxswain.first_token_s"] = context.first_token_s
        if context.refusal is not None:
            attributes["coxswain.refusal"] = context.refusal
        if context.failure is not None:
            attributes["error.type"] = errors.code_of(context.failure)
        span.set_attributes({k: v for k, v in attributes.items() if v not in ("", NONE)})
        if context.status >= _SERVER_FAULT:
            why = context.failure.message if context.failure is not None else None
            span.set_status(Status(StatusCode.ERROR, why))
        span.end()

    def close(self) -> None:
        """Sends what is left. Blocks: run in a thread."""
        self._provider.shutdown()


def start(config: TracingConfig | None) -> Tracing | None:
    """Traces as the configuration says; None: it wants none.

    Raises:
        ConfigInvalid: OpenTelemetry is not installed.
    """
    if config is None:
        return None
    try:
        return Tracing(_provider(config))
    except ImportError as error:
        why = f"tracing: needs {error.name}: pip install 'coxswain[otel]'"
        raise ConfigInvalid([why]) from error


def _provider(config: TracingConfig) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(
        resource=Resource.create({"service.name": config.service_name}),
        sampler=ParentBased(TraceIdRatioBased(config.sample)),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(_exporter(config)))
    return provider


def _exporter(config: TracingConfig) -> Any:
    if config.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        insecure = config.endpoint.startswith("http://")
        return OTLPSpanExporter(endpoint=config.endpoint, insecure=insecure)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter as OverHttp,
    )

    return OverHttp(endpoint=config.endpoint)
