"""OpenTelemetry traces of requests, appends, deliveries, streams and jobs. The extra ``otel`` has the SDK.

The command exports spans over OTLP/HTTP when the standard variables ask for it (``OTEL_TRACES_EXPORTER``,
``OTEL_EXPORTER_OTLP_ENDPOINT``); a program that embeds the server sets a tracer provider of its own. Without
either nothing of OpenTelemetry is imported, and each place where a span would begin costs one comparison.

A stream may be open for days, and a job may run long after it was created, so neither is a child of the span
that it comes of: it has a link to it (OpenTelemetry specification, "Links between spans").
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .trace_context import TraceContext
from .version import package_version

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Span, Tracer

__all__ = ["Tracing", "export_traces", "find_tracing"]

log = logging.getLogger(__name__)

FLUSH = 2.0  # seconds that the end of the process waits for spans to be exported
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_EXPORTED_BY = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"})

# The texts of errors may have secrets of requests.
_NO_TEXTS: Any = {"record_exception": False, "set_status_on_exception": False}

Attributes = Mapping[str, str | int | float | bool]


class Tracing:
    """Makes spans.

    Args:
        tracer: of OpenTelemetry.
    """

    def __init__(self, tracer: Tracer) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._propagator = TraceContextTextMapPropagator()
        self._nothing = Context()
        self._tracer = tracer

    def current(self) -> TraceContext | None:
        """Return the trace context of the span that is current in this task."""
        context = self._api.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        return TraceContext(parent, context.trace_state.to_header())

    def _remote(self, parent: TraceContext | None) -> Any:
        """Return the OpenTelemetry context of a trace context."""
        carrier = {}
        if parent is not None:
            carrier = {"traceparent": parent.traceparent, "tracestate": parent.tracestate}
        return self._propagator.extract(carrier, self._nothing)

    def _links(self, traces: Iterable[TraceContext | None]) -> list[Link]:
        contexts = [self._api.get_current_span(self._remote(trace)).get_span_context() for trace in traces]
        return [self._api.Link(context) for context in contexts if context.is_valid]

    @contextmanager
    def request(
        self,
        method: str,
        route: str | None,
        path: str,
        version: str,
        address: str,
        parent: TraceContext | None,
    ) -> Iterator[Span]:
        """Make the span of a request, of the semantic conventions for HTTP servers."""
        name = method if method in _METHODS else "HTTP"
        attributes: dict[str, str] = {
            "http.request.method": name if name != "HTTP" else "_OTHER",
            "url.path": path,  # without the query, which may have a ticket
            "network.protocol.version": version,
        }
        if route is not None:
            attributes["http.route"] = route
        if address:
            attributes["client.address"] = address
        with self._tracer.start_as_current_span(
            name if route is None else f"{name} {route}",
            context=self._remote(parent),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
            **_NO_TEXTS,
        ) as span:
            yield span

    def note_status(self, span: Span, status: int) -> None:
        """Note the status of a request's response."""
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(self._api.StatusCode.ERROR)

    @contextmanager
    def append(self, session_id: str, event_type: str, seq: int) -> Iterator[None]:
        """Make the span of an append: a part of the one that is current."""
        with self._tracer.start_as_current_span(
            "append",
            attributes={
                "sseserve.session.id": session_id,
                "sseserve.event.type": event_type,
                "sseserve.event.seq": seq,
            },
            **_NO_TEXTS,
        ):
            yield

    @contextmanager
    def delivery(self, session_id: str, traces: Iterable[TraceContext | None]) -> Iterator[None]:
        """Make the span of a batch that is delivered: in its first event's trace, linked to the others."""
        known = list(dict.fromkeys(trace for trace in traces if trace is not None))
        with self._tracer.start_as_current_span(
            "deliver",
            context=self._remote(known[0] if known else None),
            attributes={"sseserve.session.id": session_id},
            links=self._links(known[1:]),
            **_NO_TEXTS,
        ):
            yield

    @contextmanager
    def job(self, session_id: str, created_by: TraceContext | None) -> Iterator[None]:
        """Make the span of a job that this server runs, with a link to the request that has created it."""
        with self._tracer.start_as_current_span(
            "run job",
            context=self._remote(None),
            kind=self._api.SpanKind.CONSUMER,
            attributes={"sseserve.session.id": session_id},
            links=self._links([created_by]),
            **_NO_TEXTS,
        ) as span:
            try:
                yield
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(self._api.StatusCode.ERROR)
                raise

    def stream(self, seconds: float, opened_by: TraceContext | None, attributes: Attributes) -> None:
        """Record the span of a stream that ends now, with a link to the trace of its request."""
        span = self._tracer.start_span(
            "stream",
            context=self._remote(None),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
            links=self._links([opened_by]),
            start_time=time.time_ns() - int(seconds * 1e9),
        )
        span.end()


def find_tracing() -> Tracing | None:
    """Return what makes spans for the tracer provider of this process; None: it has set none."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return Tracing(trace.get_tracer("sseserve", package_version()))


@contextmanager
def export_traces(environ: Mapping[str, str]) -> Iterator[None]:
    """Export the spans of this block, if the variables of the OpenTelemetry specification ask for it.

    The exporter has a thread of its own. The end of the block waits at most ``FLUSH`` for what is left.
    """
    # An empty value is none (OpenTelemetry specification, "Environment variable specification").
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    is_disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or exporter == "none" or not any(environ.get(name) for name in _EXPORTED_BY):
        yield
        return
    if exporter != "otlp":
        log.warning("OTEL_TRACES_EXPORTER=%s: only otlp and none are supported; no traces", exporter)
        yield
        return
    name = next((name for name in _PROTOCOLS if environ.get(name, "").strip()), None)
    if name is not None and (protocol := environ[name].strip().lower()) != _PROTOCOL:
        log.warning("%s=%s: only %s is supported; no traces", name, protocol, _PROTOCOL)
        yield
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        log.warning("no traces: %s is not installed: pip install 'sseserve[otel]'", error.name)
        yield
        return
    resource = Resource.create({} if environ.get("OTEL_SERVICE_NAME") else {"service.name": "sseserve"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        flusher = threading.Thread(target=provider.shutdown, daemon=True)
        flusher.start()
        flusher.join(FLUSH)
