"""Other people's SSE clients read a job in every dialect, are cut off again and again, and lose nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import trio
from cutting_proxy import CuttingProxy
from processes import run_server
from sse_clients import CLIENTS, Message, Toolbox

PATHS = {
    "sessions": "/api/sessions/{}/status/stream",
    "interaction": "/api/interaction/events/{}",
    "jobs": "/api/jobs/{}/events",
    "jobs_v1": "/api/v1/jobs/{}/events",
    "transcription": "/api/v1/sessions/{}/status/stream",
}
STEPS = (1, 2, 4, 8, 16, 58)  # events that are published one after another; then each client must have them
LEAST_CUTS = 4  # of each stream


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # No progress update is throttled, clients reconnect soon, and heartbeats come between messages.
    with run_server(throttle=0.000001, retry_ms=10, heartbeat=0.1) as url:
        yield url


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toolbox]:
    with ExitStack() as stack:
        yield Toolbox(tmp_path_factory.mktemp("clients"), stack)


@pytest.fixture(params=CLIENTS)
def name(request: Any, tools: Toolbox) -> str:
    """The name of a client that can run here."""
    CLIENTS[request.param].needs(tools)
    return request.param


class Reading:
    """What has been read of each URL."""

    def __init__(self, urls: list[str]) -> None:
        self.messages: dict[str, list[Message]] = {url: [] for url in urls}
        self._changed = trio.Event()

    def receive(self, url: str, message: Message) -> None:
        self.messages[url].append(message)
        self._changed.set()
        self._changed = trio.Event()

    async def wait_for(self, id_: str) -> None:
        """Wait until every URL's message with this ID has been read."""
        with trio.move_on_after(30):
            while any(all(message.id != id_ for message in read) for read in self.messages.values()):
                await self._changed.wait()
            return
        raise AssertionError(f"{id_} has not come: { ({url: m[-3:] for url, m in self.messages.items()}) }")


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


def check_jobs(seen: list[tuple[str, str, Any]], log: list[tuple[str, str, Any]]) -> None:
    """Check a job's messages: an event may have several, of which only the last has the event's own ID."""
    parts_by_event: dict[str, list[tuple[str, str, Any]]] = {}
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


def job_events() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a job of eighty steps as its worker publishes it, with text that a stream must escape."""
    for step in range(1, 81):
        # A new stage each time, since a throttled dialect may skip updates that change only the percentage.
        update = {"status": "working", "progress": step, "message": f"№ {step}\nof 80"}
        yield "progress", {**update, "stage": f"{('plan', 'tts', 'visuals', 'render')[step // 21]} {step}"}
        if step % 10 == 0:
            text = "data: no\n\nevent: no\r\n\u2028 ✓"
            yield "events", {"type": "note", "data": {"step": step, "text": text}}
    yield "progress", {"status": "completed", "progress": 100, "message": "all 80"}


@pytest.mark.timeout(120)  # the first one to use a toolchain waits for its downloads
async def test_cut_streams_are_resumed_without_loss(url, tools, name):
    """A job's streams in the five dialects, cut at random bytes, deliver exactly its log, and end."""
    client = CLIENTS[name]
    paths = {dialect: path.format(name) for dialect, path in PATHS.items()}
    proxy = CuttingProxy(url, paths.values(), seed=name, avoid=client.avoid)
    async with httpx.AsyncClient(base_url=url) as http, trio.open_nursery() as nursery:
        proxy_url = await nursery.start(proxy.run)
        created = await http.post("/api/sessions", json={"session_id": name})
        assert created.status_code == 201
        reading = Reading([proxy_url + path for path in paths.values()])
        ended = trio.Event()

        async def read() -> None:
            await client.read(tools, list(reading.messages), reading.receive)
            ended.set()

        nursery.start_soon(read)
        (first,) = (await http.get(f"/api/sessions/{name}/events")).json()["events"]
        await reading.wait_for(first["id"])
        events = job_events()
        for count in STEPS:
            for _, (kind, body) in zip(range(count), events, strict=False):
                published = await http.post(f"/api/sessions/{name}/{kind}", json=body)
                assert published.status_code == 202, published.text
            await reading.wait_for(published.json()["id"])
        assert next(events, None) is None
        with trio.fail_after(30):
            await ended.wait()
        history = (await http.get(f"/api/sessions/{name}/events")).json()["events"]
        nursery.cancel_scope.cancel()

    log = [(entry["event"], entry["id"], entry["data"]) for entry in history]
    assert len(log) == 90
    for (dialect, path), messages in zip(paths.items(), reading.messages.values(), strict=True):
        assert proxy.cuts[path] >= LEAST_CUTS, dialect
        assert proxy.statuses[path][-1] == 204 or not client.ends_with_204, dialect
        decoded = [(event, id_, json.loads(data)) for event, id_, data in messages]
        resumes = [data for event, _, data in decoded if event == "resume"]
        assert all(resume == {"status": "ok", "missed": 0} for resume in resumes), dialect
        seen = [message for message in decoded if message[0] != "resume"]
        if dialect == "jobs":
            check_jobs(seen, log)
        else:
            assert [id_ for _, id_, _ in seen] == [id_ for _, id_, _ in log], dialect
            assert [(event, data) for event, _, data in seen] == [
                expected_message(dialect, name, event, data) for event, _, data in log
            ], dialect
