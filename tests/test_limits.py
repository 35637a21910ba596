"""How often clients may do what: token buckets, by address and by user."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from harness import HTTP2Client, ServerHarness
from hypothesis import given
from hypothesis import strategies as st
from raw_client import HANDSHAKE, connect, request_bytes

import sseserve
from sseserve.config import Settings
from sseserve.errors import Unauthorized
from sseserve.http.auth import Grant
from sseserve.http.limits import BURST, MAX_BUCKETS, TokenBuckets, limited_address
from sseserve.http.messages import Request
from sseserve.metrics import LIMITS

STREAM = "/api/sessions/s/status/stream"
NDJSON = "application/x-ndjson"


# Buckets


def test_a_bucket_is_full_at_first_and_refilled_at_its_rate():
    buckets = TokenBuckets(2.0)

    def take(now: float) -> float:
        if not (wait := buckets.wait("a", now)):
            buckets.take("a", now)
        return wait

    assert [take(100.0) for _ in range(20)] == [0] * 20  # ten seconds of its rate
    assert take(100.0) == pytest.approx(0.5)
    assert take(100.4) == pytest.approx(0.1)
    assert (take(100.5), take(100.5) > 0) == (0, True)
    assert [take(200.0) for _ in range(20)] == [0] * 20  # no more than full, however long it was
    assert take(200.0) > 0
    assert buckets.wait("b", 200.0) == 0


@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_a_slow_bucket_holds_a_token(rate):
    buckets = TokenBuckets(rate)
    assert buckets.wait("a", 0.0) == 0
    for _ in range(max(1, int(rate * BURST))):
        buckets.take("a", 0.0)
    assert buckets.wait("a", 0.0) == pytest.approx(1 / rate)
    assert buckets.wait("a", 1 / rate) == 0


@given(
    st.floats(0.1, 1000),
    st.lists(st.tuples(st.floats(0, 5), st.sampled_from("ab")), max_size=200),
)
def test_no_name_gets_more_than_its_rate(rate, requests):
    """In no time do more requests pass than a full bucket and the rate allow; a full one refuses none."""
    buckets, now = TokenBuckets(rate), 1e6
    passed: dict[str, list[float]] = {"a": [], "b": []}
    for seconds, name in requests:
        now += seconds
        if buckets.wait(name, now):
            assert passed[name]
        else:
            buckets.take(name, now)
            passed[name].append(now)
    capacity = max(1.0, rate * BURST)
    for times in passed.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                assert last - first + 1 <= capacity + rate * (times[last] - times[first]) + 1e-3


def test_a_flood_of_addresses_is_forgotten():
    """However many names there are, the buckets are bounded; those that are full again are not kept."""
    buckets = TokenBuckets(1000.0)
    for number in range(5 * MAX_BUCKETS):
        buckets.take(str(number), 0.0)
        assert number % 1000 or len(buckets) <= 2 * (MAX_BUCKETS + 1)
    for number in range(3):
        buckets.take("busy", 10.0 * number)
    assert len(buckets) == 1


def test_buckets_of_busy_clients_are_kept_in_a_flood():
    """The ones that are dropped are those that were used longest ago."""
    buckets = TokenBuckets(1.0)
    for number in range(5 * MAX_BUCKETS):
        buckets.take(str(number), 0.0)
        if number % 1000 == 0 and not buckets.wait("busy", 0.0):
            buckets.take("busy", 0.0)
    assert buckets.wait("busy", 0.0) > 0


@pytest.mark.parametrize("seconds", range(1, 10))
@pytest.mark.parametrize("began", range(0, 25, 3))
def test_an_empty_bucket_is_kept_until_it_is_full(began, seconds):
    """After so many seconds it has as many tokens, whenever others are dropped."""
    buckets = TokenBuckets(1.0)
    for second in range(began + seconds):
        buckets.take("other", second)
        if second == began:
            for _ in range(10):
                buckets.take("empty", second)
    now, tokens = began + seconds, 0
    while not buckets.wait("empty", now):
        buckets.take("empty", now)
        tokens += 1
    assert tokens == seconds


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
        ("127.0.0.1", None),
        ("127.9.9.9", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("", None),
    ],
)
def test_who_is_counted_together(address, name):
    assert limited_address(address) == name
    if name is None:
        assert limited_address(address, limit_loopback=True) is not None


# Requests


def lines(count: int) -> bytes:
    return b"".join(b'{"type": "x", "data": %d}\n' % number for number in range(count))


async def test_publishing_too_often_is_refused(autojump_clock, nursery):
    """A request above the rate is a 429 that says when to come again, and records nothing."""
    harness = ServerHarness(nursery, publish_rate=2, limit_loopback=True)
    for number in range(20):
        assert (await harness.post("/api/sessions/s/progress", {"progress": number})).status == 202
    refused = await harness.post("/api/sessions/s/progress", {"progress": 99})
    assert (refused.status, refused.error["code"]) == (429, "too_many_requests")
    assert "publish_rate = 2" in refused.error["message"]
    assert refused.headers["retry-after"] == "1"
    session = await harness.tracker.get("s")
    assert (session.seq, session.progress.percent) == (20, 19)
    # All that publishes has one rate.
    for path in ("/api/sessions/t/events", "/api/jobs/t/progress", "/api/v1/sessions/t/status"):
        assert (await harness.post(path, {})).status == 429
    await trio.sleep(1)
    statuses = [(await harness.post("/api/sessions/s/progress", {"progress": 50})).status for _ in range(3)]
    assert statuses == [202, 202, 429]
    metrics = (await harness.get("/metrics")).body.decode()
    assert 'sseserve_refused_total{limit="publish_rate"} 5.0' in metrics


async def test_lines_wait_instead(autojump_clock, nursery):
    """Lines above the rate are recorded later, in order; none is refused."""
    harness = ServerHarness(nursery, publish_rate=2, limit_loopback=True)
    connection = harness.connect()
    target, body = "/api/sessions/s/events", lines(40)
    began = trio.current_time()
    await connection.send(request_bytes("POST", target, body, content_type=NDJSON))
    for second in range(10):
        await trio.testing.wait_all_tasks_blocked()
        assert (await harness.tracker.get("s")).seq == 20 + 2 * second
        await trio.sleep_until(began + 1.01 + second)
    response = await connection.read_response()
    assert (response.status, response.json["applied"]) == (202, 40)
    events = (await harness.get("/api/sessions/s/events")).json["events"]
    assert [event["data"] for event in events] == list(range(40))


async def test_lines_that_wait_are_not_read(autojump_clock, nursery):
    """What is above the rate stays with its client: more of the body is read when there is a token."""
    harness = ServerHarness(nursery, publish_rate=2, limit_loopback=True)
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(30):
            await trio.lowlevel.checkpoint()
            read += 1
            yield lines(1)

    target = "/api/sessions/s/events"
    request = Request.create("POST", target, [(b"content-type", NDJSON.encode())], body=body())
    match = harness.app.routes.match("POST", target)
    nursery.start_soon(harness.app.web._dispatcher.respond, request, match)
    for second in range(5):
        await trio.testing.wait_all_tasks_blocked()
        assert read == 21 + 2 * second
        await trio.sleep(1.01)


async def test_addresses_have_rates_of_their_own(mock_clock):
    async with sseserve.serve(port=0, publish_rate=0.1, limit_loopback=True) as server:

        async def publish(address: str) -> int:
            connection = await connect(server.port, address=address)
            async with connection.stream:
                response = await connection.request("POST", "/api/sessions/s/events", b'{"type": "x"}')
            return response.status

        assert [await publish(f"127.0.0.{number}") for number in (1, 1, 2, 2, 1)] == [202, 429, 202, 429, 429]


async def test_loopback_has_no_rate():
    async with sseserve.serve(port=0, publish_rate=0.1, connect_rate=0.1) as server:
        connection = await connect(server.port)
        async with connection.stream:
            for _ in range(5):
                response = await connection.request("POST", "/api/sessions/s/events", b'{"type": "x"}')
                assert response.status == 202
                assert (await connection.request("HEAD", STREAM)).status == 200


async def by_name(request) -> Grant:
    if (name := request.headers.get("authorization")) is None:
        raise Unauthorized("who is it?")
    return Grant(name, "admin")


async def test_users_have_rates_of_their_own(mock_clock):
    """Users at one address share that of the address; a user at many addresses has but one."""
    limits = {"publish_rate": 0.2, "limit_loopback": True}
    async with sseserve.serve(port=0, authenticate=by_name, **limits) as server:

        async def publish(user: str, address: str) -> int:
            connection = await connect(server.port, address=f"127.0.0.{address}")
            headers = [("Authorization", user)] if user else []
            async with connection.stream:
                body = b'{"type": "x"}'
                return (await connection.request("POST", "/api/sessions/s/events", body, headers)).status

        assert [await publish("ann", "1"), await publish("ann", "2")] == [202, 202]
        assert await publish("ann", "3") == 429
        # What is refused counts for neither: it has not used up the address.
        assert [await publish("bob", "3"), await publish("cid", "3")] == [202, 202]
        assert await publish("dan", "3") == 429
        # Neither does what has no grant.
        assert [await publish("", "4") for _ in range(3)] == [401] * 3
        assert await publish("eve", "4") == 202


async def test_making_tickets_too_often_is_refused(autojump_clock, nursery):
    """And refreshing tokens, which all instances hear of; no other request of the user is."""
    harness = ServerHarness(nursery, authenticate=by_name, ticket_rate=0.2, limit_loopback=True)
    await harness.tracker.update("s", progress=1)
    headers = [("Authorization", "ann")]
    requests = [("/api/tickets", {"sessions": ["s"]}), ("/api/tokens/refresh", None), ("/api/tickets", {})]
    responses = [await harness.post(*request, headers) for request in requests]
    assert responses[0].status == 201
    assert responses[1].status != 429
    assert (responses[2].status, responses[2].error["code"]) == (429, "too_many_requests")
    assert "ticket_rate = 0.2" in responses[2].error["message"]
    assert responses[2].headers["retry-after"] == "5"
    assert (await harness.get("/api/sessions/s/status", headers)).status == 200
    await trio.sleep(5)
    assert (await harness.post(*requests[0], headers)).status == 201


@pytest.fixture
async def harness(nursery) -> ServerHarness:
    harness = ServerHarness(nursery, connect_rate=0.1, limit_loopback=True)
    for name in "su":
        await harness.tracker.update(name, progress=1)
    return harness


@pytest.mark.parametrize(
    "kind", ["stream", "bundle", "list", "head", "poll", "history", "socket", "h2", "missing"]
)
async def test_opening_streams_too_often_is_refused(autojump_clock, harness, kind):
    """Whatever is opened, over whatever, has the same rate; a request that does not wait has none."""
    targets = {
        "bundle": "/api/streams?session=s&session=u",
        "list": "/api/streams/sessions",
        "poll": "/api/sessions/s/status?wait=1",
        "history": "/api/sessions/s/events?wait=1",
        "socket": "/api/sessions/s/status/ws",
        "missing": "/api/sessions/nothing/status/stream",
    }
    target = targets.get(kind, STREAM)

    async def open_one() -> int:
        connection = harness.connect()
        if kind == "h2":
            client = HTTP2Client(connection)
            (number,) = await client.request(target)
            await client.read_until(lambda: number in client.statuses)
            return client.statuses[number]
        headers = HANDSHAKE if kind == "socket" else ()
        method = "HEAD" if kind == "head" else "GET"
        await connection.send(request_bytes(method, target, headers=headers))
        response = await connection.read_head()
        if response.status == 429:
            body = (
                await connection.read_to_end() if "close" in response.headers.get("connection", "") else b""
            )
            assert (
                kind in ("poll", "history", "head")
                or json.loads(body)["error"]["code"] == "too_many_requests"
            )
            assert 0 < int(response.headers["retry-after"]) <= 10
        return response.status

    first = {"socket": 101, "missing": 404}.get(kind, 200)
    assert [await open_one(), await open_one()] == [first, 429]
    assert (await harness.get("/api/sessions/s/status")).status == 200
    await trio.sleep(10)
    assert await open_one() == first


def test_all_limits_have_a_counter():
    """A refusal names a setting that there is, and that /metrics counts."""
    assert set(LIMITS) <= set(Settings.__struct_fields__)
    package = Path(sseserve.__file__).parent
    named = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r'(?:limit=|RateLimit\()"(\w+)"', path.read_text())
    }
    assert named
    assert named <= set(LIMITS)
