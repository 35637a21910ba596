"""Clients as the documents of the seed systems print them: their code, unchanged, against a server."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page
from processes import Chromium, run_server, wait_until
from programs import require_program

# Seed 002, "Creating a Job and Connecting to SSE"
PODCAST_CLIENT = """
// 1. Client creates job
const response = await fetch('/api/v1/jobs', {
  method: 'POST',
  headers: { 'Content-Type': 'application/json' },
  body: JSON.stringify({
    topics: ['technology'],
    sources: ['techcrunch', 'ars-technica']
  })
});

const { jobId, sseEndpoint } = await response.json();

// 2. Client connects to SSE endpoint
const eventSource = new EventSource(sseEndpoint);

eventSource.onmessage = (event) => {
  const statusUpdate = JSON.parse(event.data);
  console.log('Job update:', statusUpdate);

  // Update UI with progress
  updateProgressBar(statusUpdate.progress);
  updateStatusMessage(statusUpdate.message);
};

eventSource.onerror = (error) => {
  console.error('SSE connection error:', error);
  // Implement reconnection logic
};
"""
PODCAST_PAGE = f"""<!doctype html><link rel="icon" href="data:,">
<script>
  window.seen = [];
  const updateProgressBar = (progress) => seen.push(progress);
  const updateStatusMessage = (message) => seen.push(message);
</script>
<script type="module">{PODCAST_CLIENT}
window.jobId = jobId;
window.eventSource = eventSource;
</script>"""


@pytest.fixture
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture
def server() -> Iterator[str]:
    with run_server(retry_ms=50) as url:
        yield url


def push(server: str, update: dict[str, Any]) -> None:
    """Publish a status update, as a push subscription of Pub/Sub delivers it."""
    data = base64.b64encode(json.dumps(update).encode()).decode()
    message = {"data": data, "messageId": json.dumps(update), "publishTime": "2026-01-02T03:00:00Z"}
    body = {"message": message, "subscription": "projects/p/subscriptions/s"}
    httpx.post(f"{server}/api/v1/pubsub/push", json=body).raise_for_status()


def updates_of(job: str) -> list[dict[str, Any]]:
    """Return the updates of the services that work on a job."""
    steps = [(20, "retrieving-content"), (60, "processing-articles"), (90, "generating-summary")]
    updates = [
        {"jobId": job, "status": "processing", "progress": progress, "stage": stage, "message": f"At {stage}"}
        for progress, stage in steps
    ]
    updates.append(updates[-1] | {"status": "completed", "progress": 100, "message": "Ready"})
    return [update | {"timestamp": f"2026-01-02T03:00:0{n}Z"} for n, update in enumerate(updates)]


def test_podcast_client_in_a_browser(server, chromium):
    """It gets every update, and its EventSource stops when the job has ended."""

    def scenario(page: Page) -> tuple[list[Any], list[dict[str, Any]]]:
        logged: list[dict[str, Any]] = []
        page.on(
            "console",
            lambda m: logged.append(m.args[1].json_value()) if m.text.startswith("Job update") else None,
        )
        page.route(
            "**/page", lambda route: route.fulfill(body=PODCAST_PAGE, content_type="text/html; charset=utf-8")
        )
        page.goto(f"{server}/page")
        page.wait_for_function("window.seen.length === 2")
        updates = updates_of(page.evaluate("jobId"))
        for count, update in enumerate(updates, 2):
            push(server, update)
            page.wait_for_function(f"window.seen.length === {2 * count}")
        page.wait_for_function("eventSource.readyState === EventSource.CLOSED")
        assert logged[1:] == updates
        return page.evaluate("seen")

    seen, _ = chromium.visit(scenario)
    assert seen == [
        *(0, ""),
        *(20, "At retrieving-content"),
        *(60, "At processing-articles"),
        *(90, "At generating-summary"),
        *(100, "Ready"),
    ]


def test_podcast_client_with_curl(server):
    """The document's test: a stream of a job that is not known yet; it ends with the job."""
    curl = require_program("curl")
    url = f"{server}/api/v1/jobs/test-job-id/events"
    command = [curl, "-N", "-H", "Accept: text/event-stream", url]
    with ThreadPoolExecutor(1) as executor:
        done = executor.submit(
            subprocess.run, command, capture_output=True, text=True, timeout=20, check=True
        )
        wait_until(lambda: httpx.get(f"{server}/health").json()["streams"] == 1, "curl is connected")
        updates = updates_of("test-job-id")
        for update in updates:
            push(server, update)
        lines = done.result().stdout.splitlines()
    assert [json.loads(line[6:]) for line in lines if line.startswith("data: ")] == updates
