"""Several instances over one Redis, in one process and in several; and restarts over SQLite."""

from __future__ import annotations

import functools
import signal
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from processes import Program, wait_until
from raw_client import connect, get, post, request_bytes

import sseserve
from sseserve import Grant, Server, Unauthorized
from sseserve.engines.redis import coordination
from sseserve.progress import queue
from sseserve.server import application

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

    async def run(number, _tracker, session_id, _data):
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
        for server in servers:
            health = (await get(server.port, "/health")).json
            assert health["streams"] == expected["by_instance"][health["instance"]]
        for connection in streams:
            await connection.stream.aclose()


async def test_each_event_and_each_end_is_counted_once(redis):
    """By the instance that has recorded it, also while watchers of the session are coming."""
    async with serve_instances(redis) as servers, trio.open_nursery() as nursery:
        for number in range(50):
            for server in servers:
                nursery.start_soon(get, server.port, f"/api/interaction/events/{number}")
        for number in range(50):
            await servers[number % 2].tracker.update(f"{number}")
            nursery.start_soon(functools.partial(servers[0].tracker.update, f"{number}", status="done"))
    assert [server.app.counters.events for server in servers] == [75, 25]
    assert [server.app.counters.finished for server in servers] == [{"succeeded": 50}, {}]


@pytest.mark.parametrize("setting", ["max_streams_per_user", "max_streams_per_session"])
async def test_streams_are_limited_on_all_instances(redis, setting):
    """One too many is refused, wherever the others are; one that ends makes room everywhere."""
    async with serve_instances(redis, limit_loopback=True, **{setting: 2}) as servers:
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


async def test_an_instance_that_stops_says_so(redis, monkeypatch):
    """Its jobs are lost, and its slots free, long before it would be missed."""
    monkeypatch.setattr(coordination, "TTL", 600.0)
    settings = {"engine": redis.url, "port": 0, "drain": 0.1, "max_streams_per_session": 1}
    async with sseserve.serve(**settings) as server:
        async with sseserve.serve(**settings, demo_seconds=1000) as other:
            job = (await post(other.port, "/api/quick/demo", {})).json["jobId"]

            async def is_running() -> bool:
                return await state(server, job) == "running"

            await until(is_running)
            connection = await connect(other.port)
            await connection.send(request_bytes("GET", f"/api/jobs/{job}/events"))
            assert (await connection.read_head()).status == 200
            assert (await get(server.port, f"/api/jobs/{job}/events")).status == 429

        async def is_lost() -> bool:
            return await state(server, job) == "lost"

        await until(is_lost)
        assert (await get(server.port, f"/api/jobs/{job}/events")).status == 200
        await connection.stream.aclose()


async def test_one_instance_judges_leases(redis, monkeypatch):
    """That of a producer who publishes to another instance is renewed; of a silent one it ends, once."""
    monkeypatch.setattr(application, "SWEEP", 0.2)
    async with serve_instances(redis) as servers:
        (follower,) = [server for server in servers if not server.app.coordination.is_leader]
        await follower.tracker.create("busy", lease=2)
        await follower.tracker.create("silent", lease=0.5)
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


# Processes that are killed

PROGRAM = f"""
import sys
import time
from sseserve.cli import main
from sseserve.engines.redis import coordination
vars(coordination).update({QUICK})
sys.exit(main(sys.argv[1:]))
"""


class Process:
    """A server process, which makes demonstrations that take ``demo_seconds``."""

    def __init__(self, engine: str, **settings: Any) -> None:
        environ = {f"SSESERVE_{name}".upper(): str(value) for name, value in settings.items()}
        command = [sys.executable, "-c", PROGRAM, "serve", "--port", "0", "--engine", engine]
        self.program = Program(*command, **environ)
        url = self.program.wait_for_output(r"serving at (http://\S+)")[1]
        self.client = httpx.Client(base_url=url, trust_env=False, timeout=30)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_error: object) -> None:
        self.client.close()
        self.program.__exit__()

    def get(self, path: str) -> Any:
        return self.client.get(path).raise_for_status().json()

    def post(self, path: str, body: Any = None) -> Any:
        return self.client.post(path, json={} if body is None else body).raise_for_status().json()

    def submit(self) -> str:
        """Submit a demonstration; return its id."""
        job: str = self.post("/api/quick/demo")["jobId"]
        return job

    def status(self, job: str) -> str:
        status: str = self.get(f"/api/jobs/{job}")["status"]
        return status

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.program.signal(signal.SIGKILL)
        wait_until(lambda: self.program.has_exited, "the end of the process")


def test_an_instance_is_killed(redis):
    """Its jobs are lost, its slots free and its watchers gone; the other one leads and judges leases."""
    settings = {"demo_seconds": 60, "max_running_jobs": 1, "max_streams_per_user": 2, "limit_loopback": True}
    stream, watchers = "/api/sessions/s/status/stream", "/api/sessions/s/watchers"
    with Process(redis.url, **settings) as one, Process(redis.url, **settings) as other:
        one.post("/api/sessions/s/progress", {"progress": 1})
        with one.client.stream("GET", stream), other.client.stream("GET", stream):
            instances = wait_until(
                lambda: len(found := one.get(watchers)["by_instance"]) == 2 and found, "both watchers"
            )
            assert wait_until(lambda: other.get(watchers)["total"] == 2, "both watchers elsewhere")
            assert other.client.get(stream).status_code == 429
            running, elsewhere, queued = one.submit(), other.submit(), one.submit()
            for job, expected in ((running, "Running"), (elsewhere, "Running"), (queued, "Queued")):
                wait_until(lambda: other.status(job) == expected, expected)  # noqa: B023 - waits at once
            leader = redis.command("GET", "sseserve:{/instances}:leader")
            assert sum(instance.encode() in leader for instance in instances) == 1
            one.kill()
            wait_until(lambda: other.get(watchers)["total"] == 1, "the watcher to be gone")
            (survivor,) = other.get(watchers)["by_instance"]
            wait_until(lambda: other.status(running) == "Failed", "the job to be lost")
            assert other.get(f"/api/jobs/{running}")["errorCode"] == "worker_lost"
            assert [other.status(job) for job in (elsewhere, queued)] == ["Running", "Queued"]
            with other.client.stream("GET", stream) as response:
                assert response.status_code == 200
            leader = redis.command("GET", "sseserve:{/instances}:leader")
            assert survivor.encode() in leader
            other.post("/api/sessions", {"session_id": "silent", "lease": 1})
            other.post(f"/api/jobs/{elsewhere}/cancel")
            wait_until(lambda: other.status(queued) == "Running", "the queued job to run")
            events = "/api/sessions/silent/events"
            wait_until(lambda: "stalled" in other.client.get(events).text, "the lease to be judged")


def test_a_server_over_sqlite_is_killed(tmp_path):
    """The job that ran is lost, the queued one runs, and that of a worker elsewhere goes on."""
    engine = f"sqlite:{tmp_path / 'logs.db'}"
    with Process(engine, demo_seconds=0.1) as server:
        done = server.submit()
        wait_until(lambda: server.status(done) == "Done", "the demonstration")
        path = server.get(f"/api/jobs/{done}")["artifacts"][0]["path"]
        film = server.client.get(path).content
        server.kill()
    with Process(engine, demo_seconds=1000, max_running_jobs=1) as server:
        assert server.client.get(path).content == film
        running, queued, cancelled = [server.submit() for _ in range(3)]
        wait_until(lambda: server.status(running) == "Running", "the demonstration")
        server.post(f"/api/jobs/{cancelled}/cancel")
        claimed = server.post("/api/jobs")["jobId"]
        assert server.post("/api/claims?lease=60")["jobId"] == claimed
        server.kill()
    with Process(engine, demo_seconds=0.1) as server:
        wait_until(lambda: server.status(running) == "Failed", "the job to be lost")
        assert server.get(f"/api/jobs/{running}")["errorCode"] == "worker_lost"
        wait_until(lambda: server.status(queued) == "Done", "the queued job to run")
        assert [server.status(job) for job in (claimed, cancelled)] == ["Running", "Canceled"]
        assert server.get("/api/jobs")["waiting"] == 0


async def test_instances_share_tickets_refreshes_and_revocations(redis):
    """A ticket that one has made is good once on another, and streams are extended and ended everywhere."""
    now = time.time()
    tokens = {
        "first": Grant("ann", "patient", token_id="a", issued_at=now - 10, expires_at=now + 600),
        "second": Grant("ann", "patient", token_id="b", issued_at=now - 5, expires_at=now + 6000),
        "root": Grant("root", "admin"),
    }

    async def authenticate(request):
        if (grant := tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))) is None:
            raise Unauthorized("no token")
        return grant

    def bearer(token):
        return [("Authorization", f"Bearer {token}")]

    async with serve_instances(redis, authenticate=authenticate) as servers:
        one, other = servers
        await one.tracker.create("s", owner="ann")
        path = "/api/sessions/s/status/stream"
        response = await post(one.port, "/api/tickets", {"sessions": ["s"]}, bearer("first"))
        ticket = response.json["ticket"]
        by_ticket, by_token = [await connect(server.port) for server in (other, one)]
        await by_ticket.send(request_bytes("GET", f"{path}?ticket={ticket}"))
        await by_token.send(request_bytes("GET", path, headers=bearer("first")))
        assert (await by_ticket.read_head()).status == (await by_token.read_head()).status == 200
        for server in servers:
            assert (await get(server.port, f"{path}?ticket={ticket}")).status == 401

        def has_extended(server):
            credentials = server.app.open_streams._credentials.get((None, "ann"), ())
            return [credential.grant.token_id for credential in credentials] == ["b"]

        assert (await post(one.port, "/api/tokens/refresh", {}, bearer("second"))).status == 200
        with trio.fail_after(20):
            while not all(map(has_extended, servers)):
                await trio.sleep(0.01)
        response = await post(one.port, "/api/revocations", {"subject": "ann"}, bearer("root"))
        assert response.status == 204
        with trio.fail_after(20):
            for connection in (by_ticket, by_token):
                async with connection.stream:
                    await connection.read_to_end()
        for server in servers:
            assert (await get(server.port, path, bearer("second"))).status == 401
