"""Traces are exported over OTLP/HTTP to a collector, as the standard variables say."""

from __future__ import annotations

import gzip
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from processes import Program, wait_until

from sseserve.tracing import export_traces

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SERVE = (sys.executable, "-m", "sseserve", "serve", "--port", "0")


class Collector:
    """An OTLP/HTTP receiver; ``spans`` are what it has got, ``services`` the names of their services."""

    def __init__(self, *, stalls: bool = False) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.requests = 0
        self.released = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.requests += 1
                if stalls:
                    collector.released.wait(30)
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.services |= {
                        item.value.string_value
                        for item in resource.resource.attributes
                        if item.key == "service.name"
                    }
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def run(self) -> Iterator[Collector]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def attributes_of(span: Span) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_the_spans_of_a_publish_request_a_stream_and_a_job():
    """One trace from the publisher to the watchers; a stream and a job are linked to what they come of."""
    collector = Collector()
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_TRACES_EXPORTER": "",  # is as if it were not there
        "SSESERVE_DEMO_SECONDS": "0.2",
    }
    headers = {"traceparent": TRACEPARENT, "tracestate": "a=1"}
    with collector.run(), Program(*SERVE, **environ) as server:
        url = server.wait_for_output(r"serving at (\S+)")[1]
        with httpx.Client(base_url=url, headers=headers) as client:
            client.post("/api/sessions", json={"session_id": "s"})
            with client.stream("GET", "/api/sessions/s/status/stream?ticket=secret-ticket") as response:
                lines = response.iter_lines()
                client.post("/api/sessions/s/progress", json={"progress": 5})
                client.post("/api/sessions/s/progress", json={"status": "done"})
                data = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
            job = client.post("/api/quick/demo", json={"seed": 1}).json()["jobId"]
            with client.stream("GET", f"/api/jobs/{job}/events") as response:
                response.read()
            client.get("/none")
            with pytest.raises(httpx.ReadTimeout):
                client.get("/api/diagnostics?wait=10", timeout=0.2)
        assert server.wait(signal.SIGTERM) == 0, server.output
    spans = collector.spans
    assert collector.services == {"sseserve"}
    assert b"secret" not in b"".join(span.SerializeToString() for span in spans)

    (publish, _) = collector.named("POST /api/sessions/{id}/progress")
    assert (publish.trace_id.hex(), publish.parent_span_id.hex()) == (TRACE, PARENT)
    assert publish.kind == Span.SPAN_KIND_SERVER
    values = attributes_of(publish)
    assert values["http.request.method"] == "POST"
    assert values["http.route"] == "/api/sessions/{id}/progress"
    assert values["url.path"] == "/api/sessions/s/progress"
    assert values["http.response.status_code"] == 202
    append = next(span for span in collector.named("append") if span.parent_span_id == publish.span_id)
    assert append.trace_id.hex() == TRACE
    assert attributes_of(append)["sseserve.session.id"] == "s"
    assert any(span.parent_span_id == append.span_id for span in collector.named("deliver"))
    # A watcher goes on from there.
    carried = f"00-{TRACE}-{append.span_id.hex()}-01"
    assert carried in [message.get("traceparent") for message in data]

    streams = collector.named("stream")
    assert {attributes_of(span)["sseserve.stream.reason"] for span in streams} == {"ended"}
    for stream in streams:
        assert stream.trace_id.hex() != TRACE
        assert [(link.trace_id.hex(), link.span_id.hex()) for link in stream.links] == [(TRACE, PARENT)]
        assert stream.end_time_unix_nano > stream.start_time_unix_nano
    (run,) = collector.named("run job")
    (creation,) = collector.named("POST /api/quick/demo")
    first = next(span for span in collector.named("append") if span.parent_span_id == creation.span_id)
    assert [link.span_id for link in run.links] == [first.span_id]
    assert any(span.parent_span_id == run.span_id for span in collector.named("append"))
    (unknown,) = [span for span in spans if attributes_of(span).get("http.response.status_code") == 404]
    assert unknown.name == "GET"
    (left,) = collector.named("GET /api/diagnostics")  # its client, which is no error of the server
    assert left.status.code == Status.STATUS_CODE_UNSET
    assert "http.response.status_code" not in attributes_of(left)


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_no_traces(environ):
    """Nothing is exported that is not asked for, and nothing of OpenTelemetry imported."""
    collector = Collector()
    with collector.run():
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "PYTHONVERBOSE": "1", **environ}
        with Program(*SERVE, **environ) as server:
            url = server.wait_for_output(r"serving at (\S+)")[1]
            httpx.get(f"{url}/health")
            assert server.wait(signal.SIGTERM) == 0
    assert not collector.requests
    assert "import 'opentelemetry" not in server.output


def test_a_collector_that_stalls():
    """It delays neither a request nor, but for a moment, the end."""
    collector = Collector(stalls=True)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "10"}
    with collector.run(), Program(*SERVE, **environ) as server:
        url = server.wait_for_output(r"serving at (\S+)")[1]
        with httpx.Client(base_url=url, timeout=5) as client:
            client.get("/health")
            wait_until(lambda: collector.requests, "the collector has a request")
            assert client.get("/health").status_code == 200
        began = time.monotonic()
        assert server.wait(signal.SIGTERM) == 0
        assert time.monotonic() - began < 10  # the collector answers after 30 s
        collector.released.set()


def test_a_protocol_that_is_not_supported(caplog):
    """As many clusters set it for all containers; one for traces alone has precedence."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with export_traces(environ):
        assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: only http/protobuf is supported; no traces" in caplog.text
    caplog.clear()
    with export_traces({**environ, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}):
        assert "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=grpc: only" in caplog.text


def test_an_exporter_that_is_not_supported():
    with Program(*SERVE, OTEL_TRACES_EXPORTER="zipkin") as server:
        server.wait_for_output(r"OTEL_TRACES_EXPORTER=zipkin: only otlp and none are supported")
        server.wait_for_output(r"serving at (\S+)")
