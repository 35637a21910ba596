"""SSE clients from PyPI and npm read one job in every dialect and lose none of its events."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import pytest
import requests
import sseclient
from processes import Proxy, install_node_packages, run_server, wait_until
from programs import require_program

PATHS = {
    "sessions": "/api/sessions/{}/status/stream",
    "interaction": "/api/interaction/events/{}",
    "jobs": "/api/jobs/{}/events",
    "jobs_v1": "/api/v1/jobs/{}/events",
    "transcription": "/api/v1/sessions/{}/status/stream",
}
Message = tuple[str, str, Any]  # event, id, data


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # No progress update is throttled, and clients reconnect soon.
    with run_server(throttle="0.000001", retry_ms=50) as url:
        yield url


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_node_packages(tmp_path_factory.mktemp("npm"))


# Clients: each reads a stream to its end, however often its connection breaks


def is_final(event: str, data: Any) -> bool:
    """Whether a message is the final one of its dialect."""
    return event in ("complete", "job-completed") or (event == "message" and data["status"] == "completed")


def read_to_final(connect: Callable[[str], Iterator[Message]]) -> list[Message]:
    """Reconnect with the last ID until the final message comes, which these clients leave to their users."""
    seen: list[Message] = []
    cursor = ""
    for _attempt in range(5):
        try:
            for event, id_, data in connect(cursor):
                cursor = id_ or cursor
                seen.append((event, id_, data))
                if is_final(event, data):
                    return seen
        except (httpx.TransportError, requests.RequestException):
            pass
    raise AssertionError(f"the stream has no end: {seen[-1:]}")


def with_httpx_sse(urls: list[str]) -> list[list[Message]]:
    def connect(url: str, cursor: str) -> Iterator[Message]:
        headers = {"Last-Event-ID": cursor} if cursor else {}
        with httpx.Client() as client, httpx_sse.connect_sse(client, "GET", url, headers=headers) as source:
            for sse in source.iter_sse():
                yield sse.event, sse.id, sse.json()

    with ThreadPoolExecutor(len(urls)) as threads:
        return list(threads.map(lambda url: read_to_final(lambda cursor: connect(url, cursor)), urls))


def with_sseclient_py(urls: list[str]) -> list[list[Message]]:
    def connect(url: str, cursor: str) -> Iterator[Message]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": cursor} if cursor else {})
        with requests.get(url, headers=headers, stream=True, timeout=20) as response:
            for event in sseclient.SSEClient(response).events():
                try:
                    yield event.event, event.id or "", json.loads(event.data)
                except json.JSONDecodeError:
                    # Where a stream breaks off it returns half an event, which the standard forbids.
                    return

    with ThreadPoolExecutor(len(urls)) as threads:
        return list(threads.map(lambda url: read_to_final(lambda cursor: connect(url, cursor)), urls))


def with_node(client: str, folder: Path, urls: list[str]) -> list[list[Message]]:
    terminal = (
        "['complete','job-completed'].includes(event) || (event === 'message' && data.status === 'completed')"
    )
    command = [require_program("node"), folder / "watch.mjs", client, terminal, *urls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, list[Message]] = {url: [] for url in urls}
    for line in done.stdout.removesuffix("\n").split("\n"):  # the text may contain U+2028
        message = json.loads(line)
        seen[message["url"]].append((message["event"], message["id"], message["data"]))
    return list(seen.values())


# Expected messages


def expected_message(dialect: str, session_id: str, event: str, data: Any) -> tuple[str, Any]:
    """Return the message that a dialect sends for an event, which is given in the form of ``sessions``."""
    if event == "note" or dialect == "sessions":
        return event, data
    percent, stage, message = data["progress"], data.get("stage"), data["message"]
    if dialect == "interaction":
        name = "complete" if event == "complete" else "processing"
        return name, {"stage": stage, "progress": percent / 100, "message": message}
    common = {"progress": percent, "message": message, "timestamp": data["updated_at"]}
    if dialect == "transcription":
        return "message", {"session_id": session_id, "status": data["status"], **common}
    status = {"queued": "pending", "working": "processing", "completed": "completed"}[data["status"]]
    return "message", {"jobId": session_id, "status": status, "stage": stage or data["state"], **common}


def check_jobs(seen: list[Message], log: list[Message]) -> None:
    """Check a job's messages: an event may have several, of which only the last has the event's own ID."""
    parts_by_event: dict[str, list[Message]] = {}
    for message in seen:
        parts_by_event.setdefault(message[1].partition(".")[0], []).append(message)
    assert list(parts_by_event) == [id_ for _, id_, _ in log]
    ends = {"progress": "step-progress", "complete": "job-completed", "note": "note"}
    for (event, id_, data), parts in zip(log, parts_by_event.values(), strict=True):
        assert [part[1] for part in parts] == [*(f"{id_}.{n}" for n in range(1, len(parts))), id_]
        assert parts[-1][0] == ends[event]
        for _, _, job in parts:
            if event == "note":
                assert job == data
            else:
                members = [job[name] for name in ("jobId", "percent", "message", "stage")]
                assert members == [data["session_id"], data["progress"], data["message"], data.get("stage")]


def publish(client: httpx.Client, session_id: str) -> None:
    """Publish a job of eighty steps, with text that an event stream must split or escape."""

    def post(what: str, body: dict[str, Any]) -> None:
        client.post(f"/api/sessions/{session_id}/{what}", json=body).raise_for_status()

    for step in range(1, 81):
        # A new stage each time, since a throttled dialect may skip updates that change only the percentage.
        update = {"status": "working", "progress": step, "message": f"№ {step}\nof 80"}
        post("progress", {**update, "stage": f"{('plan', 'tts', 'visuals', 'render')[step // 21]} {step}"})
        if step % 10 == 0:
            text = "data: no\n\nevent: no\r\n\u2028 ✓"
            post("events", {"type": "note", "data": {"step": step, "text": text}})
    post("progress", {"status": "completed", "progress": 100, "message": "all 80"})


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
@pytest.mark.parametrize("client", ["httpx-sse", "sseclient-py", "eventsource", "launchdarkly"])
def test_every_dialect_is_read_without_loss(url, client, broken, request):
    """A job's streams in the five dialects deliver its whole log; broken ones resume by Last-Event-ID."""
    if client in ("eventsource", "launchdarkly"):
        read = partial(with_node, client, request.getfixturevalue("node_modules").parent)
    else:
        read = {"httpx-sse": with_httpx_sse, "sseclient-py": with_sseclient_py}[client]
    session_id = f"{client}-{broken}"
    paths = [path.format(session_id) for path in PATHS.values()]
    limits = dict.fromkeys(paths, 7777) if broken else {}
    with httpx.Client(base_url=url) as http, Proxy(url, limits) as proxy, ThreadPoolExecutor(1) as reader:
        http.post("/api/sessions", json={"session_id": session_id}).raise_for_status()
        reading = reader.submit(read, [proxy.url + path for path in paths])
        job = f"/api/v1/jobs/{session_id}"
        wait_until(
            lambda: reading.done() or http.get(job).json()["connections"] == len(paths),
            "all streams",
        )
        publish(http, session_id)
        streams = dict(zip(PATHS, reading.result(timeout=30), strict=True))
        history = http.get(f"/api/sessions/{session_id}/events").json()["events"]
    log = [(entry["event"], entry["id"], entry["data"]) for entry in history]
    assert len(log) == 90
    assert sorted(proxy.cut_paths) == sorted(limits)
    for dialect, messages in streams.items():
        resumes = [data for event, _, data in messages if event == "resume"]
        assert resumes == [{"status": "ok", "missed": 0}] * broken, dialect
        seen = [message for message in messages if message[0] != "resume"]
        if dialect == "jobs":
            check_jobs(seen, log)
        else:
            assert [id_ for _, id_, _ in seen] == [id_ for _, id_, _ in log], dialect
            assert [(event, data) for event, _, data in seen] == [
                expected_message(dialect, session_id, event, data) for event, _, data in log
            ]
