"""``/asyncapi.json`` says what the streams send, ``/openapi.json`` is valid, and ``/docs`` shows both."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import httpx
import msgspec
import pytest
import trio
from harness import ServerHarness
from openapi_spec_validator import OpenAPIV31SpecValidator
from playwright.sync_api import expect
from processes import Chromium, install_node_packages, run_server
from programs import require_program

from sseserve.dialects.interaction import Failure, Processing
from sseserve.dialects.jobs_v1 import StatusUpdate
from sseserve.dialects.transcription import TranscriptionStatus
from sseserve.http.routes import ROUTES
from sseserve.http.routing import Kind

STREAMS = {
    route.name: route for route in ROUTES if route.documented and route.kind in (Kind.STREAM, Kind.SOCKET)
}
WATCHED = [n for n, route in STREAMS.items() if "{id}" in route.path and route.kind is Kind.STREAM]
# What publishers may add members to, which clients get as they are.
OPEN = (Failure, Processing, StatusUpdate, TranscriptionStatus)


@pytest.fixture(scope="module")
def documents() -> tuple[str, str]:
    """The OpenAPI document and the AsyncAPI document of a server."""
    with run_server() as url:
        return httpx.get(f"{url}/openapi.json").text, httpx.get(f"{url}/asyncapi.json").text


def test_openapi_document_is_valid(documents):
    OpenAPIV31SpecValidator(json.loads(documents[0])).validate()


def test_asyncapi_document_is_valid(documents, tmp_path):
    """To the parser of those who write the standard, which also follows the references."""
    node = require_program("node")
    install_node_packages(tmp_path, "asyncapi")
    command = [node, tmp_path / "check.mjs"]
    checked = subprocess.run(command, input=documents[1], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    result = json.loads(checked.stdout)
    assert sorted(result["channels"]) == sorted(STREAMS)
    # The server speaks 3.0, which more tools know than the latest version.
    assert [d["code"] for d in result["diagnostics"]] == ["asyncapi-latest-version"]


def test_each_stream_is_a_channel(documents):
    """With the messages of its row, over WebSocket in an envelope."""
    document = json.loads(documents[1])
    for name, route in STREAMS.items():
        channel = document["channels"][name]
        assert channel["address"] == route.path
        found = [
            document["components"]["messages"][m["$ref"].split("/")[-1]] for m in channel["messages"].values()
        ]
        assert [m["name"] for m in found] == [message.event or "message" for message in route.messages]
        is_socket = route.kind is Kind.SOCKET
        assert all(("id" in m["payload"].get("properties", {})) == is_socket or not is_socket for m in found)
        assert list(document["operations"][name]["bindings" if not is_socket else "channel"])


def check(name: str, event: str | None, data: Any) -> str:
    """Hold a message against the row of its stream; return which of the row's messages it is."""
    types = {message.event: message.data for message in STREAMS[name].messages}
    key = event if event in types else "*"
    assert key in types, f"{name} does not say that it sends {event}: {data}"
    kind = types[key]
    decoded = msgspec.json.decode(json.dumps(data), type=kind)
    if kind is not Any and kind not in OPEN:
        assert data.keys() <= {field.encode_name for field in msgspec.structs.fields(kind)}, (event, decoded)
    return key or "message"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "lost", "deleted"])
@pytest.mark.parametrize("name", WATCHED)
async def test_what_a_stream_sends_is_described(autojump_clock, nursery, name, end):
    """Every message of every stream is one that its row has, with data of that type and no other members."""
    harness = ServerHarness(nursery)
    path = STREAMS[name].path.replace("{id}", "s")
    await harness.post("/api/sessions/s/progress", {"progress": 5, "restart": True})
    await harness.request("DELETE", "/api/sessions/s")
    await harness.post("/api/sessions", {"session_id": "s", "lease": 10, "title": "t", "data": {"a": 1}})
    streams = [await harness.stream(path), await harness.stream(path, "other-1")]
    for percent, stage in ((10, "tts"), (20, "tts"), (60, "render")):
        await harness.post("/api/sessions/s/progress", {"progress": percent, "stage": stage, "message": "m"})
    await harness.post("/api/sessions/s/events", {"type": "warning", "data": {"row": 1}})
    await harness.post("/api/sessions/s/pause", {})
    await trio.sleep(12)
    if end == "deleted":
        await harness.request("DELETE", "/api/sessions/s")
    elif end == "lost":
        await trio.sleep(40)
    else:
        artifacts = [{"name": "film.mp4", "path": "/film.mp4"}]
        body = {"status": end, "artifacts": artifacts, "error": {"code": "E", "message": "m"}}
        await harness.post("/api/sessions/s/progress", body)
    seen = {check(name, m.event, m.data) for stream in streams for m in await stream.read_to_end()}
    assert "resume" in seen
    assert len(seen) >= 3


async def test_what_the_list_sends_is_described(autojump_clock, nursery):
    harness = ServerHarness(nursery)
    await harness.post("/api/sessions/s/progress", {"progress": 5, "stage": "tts"})
    stream = await harness.stream(STREAMS["list_stream"].path)
    messages = await stream.take(2)
    await harness.post("/api/sessions/s/progress", {"progress": 6})
    messages += await stream.take(1)
    await harness.request("DELETE", "/api/sessions/s")
    messages += await stream.take(1)
    assert {check("list_stream", m.event, m.data) for m in messages} >= {"snapshot", "changes", "server"}


async def test_what_a_diagnostic_stream_sends_is_described(autojump_clock, nursery):
    harness = ServerHarness(nursery)
    stream = await harness.stream("/api/diagnostics/stream?events=2&interval=1&size=10")
    seen = [check("diagnose_stream", m.event, m.data) for m in await stream.read_to_end()]
    assert seen == ["request", "probe", "probe", "end"]


def test_page_shows_requests_streams_and_messages():
    """Each operation is there, and says what it takes and sends; it can be searched and linked to.

    A document that cannot be read is an error on the page, not an empty page.
    """
    with run_server() as url, Chromium() as chromium:

        def scenario(page):
            page.goto(f"{url}/docs#job_events")
            details = page.locator("#job_events")
            expect(details).to_contain_text("job-completed")
            expect(details).to_contain_text("curl -N")
            page.get_by_role("link", name="StepProgress").first.click()
            expect(page.locator("#type-StepProgress")).to_be_in_viewport()
            count = page.locator(".operation").count()
            page.get_by_label("Search").fill("transcription stream")
            expect(page.locator(".operation:visible")).to_have_count(1)
            page.get_by_label("Search").fill("nothing like this")
            expect(page.get_by_text("Nothing was found.")).to_be_visible()
            return count

        def fail(page):
            page.route("**/asyncapi.json", lambda route: route.fulfill(status=503, body=""))
            page.goto(f"{url}/docs")
            expect(page.get_by_role("alert")).to_contain_text("/asyncapi.json with status 503")

        count, errors = chromium.visit(scenario)
        chromium.visit(fail)
    assert (count, errors) == (len([route for route in ROUTES if route.documented]), [])
