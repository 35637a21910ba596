"""Several instances over one Redis: jobs, leases, limits and watchers, in one process and in several."""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
from raw_client import connect, get, post, request_bytes

import sseserve
from sseserve import Server
from sseserve.engines.redis import coordination
from sseserve.progress import queue

QUICK = {"HEARTBEAT": 0.1, "TTL": 1.0, "GRACE": 0.3, "WATCHERS_INTERVAL": 0.02}  # seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let instances hear of each other sooner; of jobs only by what they are told."""
    for name, seconds in QUICK.items():
        monkeypatch.setattr(coordination, name, seconds)
    monkeypatch.setattr(queue, "LOOK_INTERVAL", 1000.0)


@asynccontextmanager
async def serve_instances(redis, count: int = 2, **fields: Any):
    """That many servers in this process."""
    runners = fields.pop("runners", [None] * count)
    async with AsyncExitStack() as stack:
        servers: list[Server] = []
        for number in range(count):
            server = sseserve.serve(port=0, drain=0.2, engine=redis.url, runner=runners[number], **fields)
            servers.append(await stack.enter_async_context(server))
        with trio.fail_after(20):
            while any(len(server.app.coordination._alive) < count for server in servers):
                await trio.sleep(0.01)
        yield servers


async def until(condition) -> None:
    """Poll until an async condition holds."""
    with trio.fail_after(20):
        while not await condition():
            await trio.sleep(0.01)


async def state(server: Server, session_id: str) -> str:
    return (await server.tracker.get(session_id)).progress.state.value


async def test_instances_share_the_jobs(redis):
    """Each job runs once, whichever instance it was submitted to, and all instances run some."""
    ran: Counter[tuple[int, str]] = Counter()
    together = 0

    async def run(number, _tracker, session_id, _data):
        nonlocal together
        ran[number, session_id] += 1
        with trio.fail_after(20):
            while len({n for n, _ in ran}) < 2:  # the first job of each instance waits for the other
                await trio.sleep(0.01)

    runners = [functools.partial(run, number) for number in range(2)]
    async with serve_instances(redis, runners=runners, max_running_jobs=2) as servers:
        jobs = [(await post(servers[0].port, "/api/jobs", {})).json["jobId"] for _ in range(12)]

        async def all_have_ended() -> bool:
            return all([await state(servers[1], job) == "succeeded" for job in jobs])

        await until(all_have_ended)
        assert Counter(job for _, job in ran.elements()) == Counter(jobs)
        assert (await get(servers[1].port, "/api/jobs")).json["waiting"] == 0


async def test_a_claim_waits_for_a_job_of_another_instance(redis):
    """It gets the job as soon as there is one; each job is handed out once."""
    claimed: list[str] = []
    async with serve_instances(redis, job_workers="remote") as servers, trio.open_nursery() as nursery:

        async def work(server: Server) -> None:
            while len(claimed) < 20:
                response = await post(server.port, "/api/claims?wait=30", {})
                if response.status == 200:
                    claimed.append(response.json["jobId"])

        for number in range(4):
            nursery.start_soon(work, servers[number % 2])
        jobs = []
        for number in range(20):
            jobs.append((await post(servers[0].port, "/api/jobs", {})).json["jobId"])
            if number % 4 == 0:
                with trio.fail_after(20):
                    while len(claimed) < len(jobs):
                        await trio.sleep(0.005)
        with trio.fail_after(20):
            while len(claimed) < 20:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert sorted(claimed) == sorted(jobs)


async def test_watchers_of_all_instances(redis):
    """Whoever is asked counts them all; each instance's health counts its own."""
    async with serve_instances(redis) as servers:
        await servers[0].tracker.update("s", progress=1)
        streams = []
        for server, path in ((0, "status/stream"), (1, "status/stream"), (1, "control")):
            connection = await connect(servers[server].port)
            await connection.send(request_bytes("GET", f"/api/sessions/s/{path}"))
            assert (await connection.read_head()).status == 200
            streams.append(connection)
        expected = {
            "session_id": "s",
            "total": 3,
            "by_protocol": {"sse": 3},
            "by_dialect": {"sessions": 2, "control": 1},
            "by_instance": {servers[0].app.coordination.instance: 1, servers[1].app.coordination.instance: 2},
        }
        for server in servers:

            async def is_expected(server: Server = server) -> bool:
                return (await get(server.port, "/api/sessions/s/watchers")).json == expected

            await until(is_expected)
            assert (await get(server.port, "/api/v1/jobs/s")).json["connections"] == 3
        assert [(await get(s.port, "/health")).json["streams"] for s in servers] == [1, 2]
        for connection in streams:
            await connection.stream.aclose()


@pytest.mark.parametrize("setting", ["max_streams_per_user", "max_streams_per_session"])
async def test_streams_are_limited_on_all_instances(redis, setting):
    """One too many is refused, wherever the others are; one that ends makes room everywhere."""
    async with serve_instances(redis, **{setting: 2}) as servers:
        await servers[0].tracker.update("s", progress=1)
        streams = []
        for server in servers:
            connection = await connect(server.port)
            await connection.send(request_bytes("GET", "/api/sessions/s/status/stream"))
            assert (await connection.read_head()).status == 200
            streams.append(connection)
        for server in servers:
            response = await get(server.port, "/api/sessions/s/status/stream")
            assert (response.status, response.error["code"]) == (429, "too_many_streams")
        await streams[0].stream.aclose()

        async def is_free() -> bool:
            response = await connect(servers[1].port)
            async with response.stream:
                await response.send(request_bytes("HEAD", "/api/sessions/s/status/stream"))
                return (await response.read_head()).status == 200

        await until(is_free)
        await streams[1].stream.aclose()


async def test_one_instance_judges_leases(redis):
    """That of a producer who publishes to another instance is renewed; of a silent one it ends, once."""
    async with serve_instances(redis) as servers:
        (follower,) = [server for server in servers if not server.app.coordination.is_leader]
        await follower.tracker.create("busy", lease=2)
        await follower.tracker.create("silent", lease=1)
        async with trio.open_nursery() as nursery:

            async def publish() -> None:
                while True:
                    await follower.tracker.update("busy")
                    await trio.sleep(0.3)

            nursery.start_soon(publish)

            async def is_lost() -> bool:
                return await state(follower, "silent") == "lost"

            await until(is_lost)
            nursery.cancel_scope.cancel()
        events = (await get(follower.port, "/api/sessions/silent/events")).json["events"]
        assert [event["event"] for event in events] == ["progress", "stalled", "error"]
        events = (await get(follower.port, "/api/sessions/busy/events")).json["events"]
        assert {event["event"] for event in events} == {"progress"}
