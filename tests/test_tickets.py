"""Tickets: what they are good for, for how long, and what is kept of them."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
import trio
from harness import ServerHarness
from trio.testing import wait_all_tasks_blocked
from watch_clients import SOCKETS, STREAMED, Authority, WatchClient, bearer

from sseserve import Action, Grant, Unauthorized
from sseserve.engines.coordination import LocalCoordination
from sseserve.errors import TooManyRequests
from sseserve.http import tickets as module
from sseserve.http.auth import Ticket
from sseserve.http.tickets import Tickets


@pytest.fixture
def authority():
    return Authority(
        ann=Grant("ann", "patient"),
        bob=Grant("bob", "patient"),
        root=Grant("root", "admin"),
        worker=Grant("w", capabilities={Action.WATCH: ("job-*",)}),
    )


@pytest.fixture
async def harness(nursery, authority):
    harness = ServerHarness(nursery, authenticate=authority.authenticate)
    await harness.tracker.create("s", owner="ann")
    return harness


async def make(harness, token="ann", status=201, **body):
    response = await harness.post("/api/tickets", body or {"sessions": ["s"], "list": True}, bearer(token))
    assert response.status == status, response
    return response.json["ticket"] if status == 201 else response.error


async def watch(nursery, harness, transport, **options):
    """Watch until all tasks are blocked."""
    client = WatchClient(harness, transport, **options)
    nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    return client


@pytest.mark.parametrize("transport", [*STREAMED, *SOCKETS])
async def test_a_ticket_opens_one_stream(autojump_clock, nursery, harness, transport):
    """Whatever the transport: once, and no second time."""
    ticket = await make(harness)
    client = await watch(nursery, harness, transport, ticket=ticket)
    assert client.status in (101, 200)
    assert client.received
    again = await watch(nursery, harness, transport, ticket=ticket)
    assert again.status == 401
    assert not client.ended


async def test_a_head_request_uses_a_ticket(autojump_clock, harness):
    """It is answered as the stream would be, so it needs what the stream needs."""
    path = f"/api/sessions/s/status/stream?ticket={await make(harness)}"
    assert (await harness.request("HEAD", path)).status == 200
    assert (await harness.get(path)).status == 401
    assert (await harness.request("HEAD", f"{path}x")).status == 401


async def test_of_many_that_use_a_ticket_at_once_one_may_watch(autojump_clock, nursery, harness):
    """It is taken and forgotten in one step."""
    ticket = await make(harness)
    clients = [WatchClient(harness, "sse", ticket=ticket) for _ in range(20)]
    for client in clients:
        nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    assert sorted(client.status for client in clients) == [200] + 19 * [401]


@pytest.mark.parametrize("token", ["ann", "root"])
async def test_a_ticket_is_for_its_sessions(autojump_clock, nursery, harness, token):
    """403 for others, also to a maker who may see all, and whether they exist or not; and it is used then."""
    await harness.tracker.create("t", owner="ann")
    for transport, session_id in (("sse", "t"), ("sse", "none"), ("list", ""), ("websocket", "t")):
        ticket = await make(harness, token, sessions=["s"])
        assert (await watch(nursery, harness, transport, session_id=session_id, ticket=ticket)).status == 403
        assert (await watch(nursery, harness, "sse", ticket=ticket)).status == 401
    ticket = await make(harness, token, list=True)
    assert (await watch(nursery, harness, "sse", ticket=ticket)).status == 403
    ticket = await make(harness, token, sessions=["s"])
    assert (
        await watch(nursery, harness, "bundle", path="/api/streams?session=s&session=t", ticket=ticket)
    ).status == 403


@pytest.mark.parametrize(
    "target", ["GET /api/sessions/s/status", "GET /api/sessions/s/events", "GET /api/sessions",
               "POST /api/sessions/s/progress", "POST /api/tickets", "POST /api/tokens/refresh",
               "POST /api/revocations", "DELETE /api/sessions/s"],
)  # fmt: skip
async def test_a_ticket_is_for_streams(autojump_clock, harness, target):
    """Elsewhere it is as if there were none."""
    method, path = target.split()
    ticket = await make(harness, "root")
    body = None if method == "GET" else {}
    assert (await harness.request(method, f"{path}?ticket={ticket}", body)).status == 401
    await harness.stream(f"/api/sessions/s/status/stream?ticket={ticket}")


async def test_the_right_of_the_maker_counts_when_it_is_used(autojump_clock, nursery, harness):
    """A session of the same id that is another owner's by then is not shown."""
    ticket = await make(harness)
    await harness.tracker.delete("s")
    gone = await watch(nursery, harness, "sse", ticket=ticket)
    assert gone.status == 403
    ticket = await make(harness, "root")
    await harness.tracker.create("s", owner="bob")
    assert (await watch(nursery, harness, "sse", ticket=ticket)).status == 200
    assert (await make(harness, "ann", 403, sessions=["s"]))["code"] == "forbidden"


async def test_unknown_and_forbidden_sessions_are_refused_alike(autojump_clock, harness):
    """The same response, after the same calls of the engine."""
    bodies, calls = [], []
    load = harness.tracker.engine.load

    async def count(session_id):
        calls[-1] += 1
        return await load(session_id)

    harness.tracker.engine.load = count
    for session_id in ("s", "none"):
        calls.append(0)
        error = await make(harness, "bob", 403, sessions=["mine", session_id])
        bodies.append({name: value for name, value in error.items() if name != "request_id"})
    assert bodies[0] == bodies[1]
    assert calls == [2, 2]


async def test_sessions_that_do_not_exist_yet(autojump_clock, nursery, harness):
    """Who may watch them by their id gets a ticket; a stream may wait for one, where the dialect waits."""
    ticket = await make(harness, "worker", sessions=["job-1"])
    client = await watch(
        nursery, harness, "sse", session_id="job-1", path="/api/interaction/events/{}", ticket=ticket
    )
    await harness.tracker.create("job-1", owner="bob")
    await harness.tracker.emit("job-1", "note", 1)
    await wait_all_tasks_blocked()
    assert (client.status, client.names) == (200, ["processing", "note"])
    ticket = await make(harness, "root", sessions=["none"])
    assert (await watch(nursery, harness, "sse", session_id="none", ticket=ticket)).status == 404
    await make(harness, "worker", 403, sessions=["job-1", "s"])


async def test_a_ticket_that_is_not_valid_any_more_is_as_one_that_never_was(
    autojump_clock, nursery, harness, authority
):
    """Used, too old, or of a token that has expired or was revoked: the same response."""
    now = harness.app.tracker.clock
    for name in ("late", "revoked"):
        authority.tokens[name] = Grant(
            "ann",
            "patient",
            token_id=name,
            issued_at=now(),
            expires_at=now() + (5 if name == "late" else 500),
        )
    used, old, late, revoked = [await make(harness, token) for token in ("ann", "ann", "late", "revoked")]
    await harness.stream(f"/api/sessions/s/status/stream?ticket={used}")
    response = await harness.post("/api/revocations", {"token_id": "revoked"}, bearer("root"))
    assert response.status == 204
    await trio.sleep(36)
    bodies = set()
    for ticket in (used, late, revoked, "unknown", ""):
        for token in (None, "ann"):
            client = await watch(nursery, harness, "sse", ticket=ticket or "%20", token=token)
            assert client.status == 401
            error = msgspec.json.decode(client.raw)["error"]
            bodies.add((error["code"], error["message"]))
    assert (await harness.get("/api/sessions/s/status/stream?ticket=", bearer("ann"))).status == 401
    await trio.sleep(24.1)
    client = await watch(nursery, harness, "sse", ticket=old)
    error = msgspec.json.decode(client.raw)["error"]
    assert (client.status, {(error["code"], error["message"])}) == (401, bodies)


async def test_a_ticket_is_good_for_a_minute(autojump_clock, nursery, harness, authority):
    """At most, and not for longer than the token of its maker."""
    authority.tokens["short"] = Grant("ann", "patient", expires_at=harness.app.tracker.clock() + 10)
    for token, seconds in (("ann", 60), ("short", 40)):  # clocks may differ by half a minute
        response = await harness.post("/api/tickets", {"sessions": ["s"]}, bearer(token))
        assert response.json["expires_in"] == seconds
        assert len(response.json["ticket"]) >= 256 / 6
    ticket = await make(harness)
    await trio.sleep(59.9)
    assert (await watch(nursery, harness, "sse", ticket=ticket)).status == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"sessions": []}, 422),
        ({}, 422),
        ({"list": False}, 422),
        ({"sessions": ["s"] * 51}, 422),
        ({"sessions": [""]}, 422),
        ({"sessions": "s"}, 422),
        (b"{", 400),
        ({"sessions": ["s"] * 50}, 201),
    ],
)
async def test_bodies(autojump_clock, harness, body, status):
    """1 to 50 sessions, or the list."""
    assert (await harness.post("/api/tickets", body, bearer("ann"))).status == status


@pytest.mark.parametrize("path", ["/api/tickets", "/api/tokens/refresh", "/api/revocations"])
async def test_without_authentication_there_are_no_tokens(autojump_clock, nursery, path):
    """The message says so; a ticket in an address does no harm."""
    harness = ServerHarness(nursery)
    await harness.tracker.create("s")
    response = await harness.post(path, {})
    assert (response.status, response.error["code"]) == (409, "conflict")
    assert "jwt_key" in response.error["message"]
    await harness.stream("/api/sessions/s/status/stream?ticket=none")


async def test_what_is_kept_of_a_ticket_is_not_the_ticket(autojump_clock):
    """Its SHA-256, and the grant."""
    stored = {}

    class Coordination(LocalCoordination):
        async def store_ticket(self, key, value, seconds):
            stored[key] = value, seconds

    grant = Grant("ann", "patient", frozenset({"x"}), {Action.WATCH: ("job-*",)}, "iss", "id", 1.0, 1000.0)
    made = Tickets(Coordination(), lambda _: None, clock=lambda: 900.0)
    text, _ = await made.make(grant, Ticket(frozenset({"s"}), lists=True))
    ((key, (value, seconds)),) = stored.items()
    assert (key, seconds) == (hashlib.sha256(text.encode()).hexdigest(), 60)
    assert text.encode() not in value
    expected = msgspec.structs.replace(grant, ticket=Ticket(frozenset({"s"}), lists=True))
    assert msgspec.msgpack.decode(value, type=Grant) == expected


async def test_the_memory_of_tickets_is_bounded(autojump_clock, monkeypatch):
    """For each user, and altogether; after a minute there is room again, and nothing is left of them."""
    monkeypatch.setattr(module, "MAX_USER_BYTES", 3000)
    monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    made = Tickets(LocalCoordination(), lambda _: None, clock=trio.current_time)
    retries = set()

    async def make_many(user):
        for number in range(1000):
            try:
                await made.make(Grant(user), Ticket(frozenset({"s"})))
            except TooManyRequests as error:
                retries.add(error.retry_after)
                return number
        raise AssertionError("there is no limit")

    counts = [await make_many(f"user {number}") for number in range(6)]
    assert counts[0] == counts[1] == counts[2] > 5
    assert counts[3] < counts[0]
    assert counts[4:] == [0, 0]
    assert retries == {60}
    await trio.sleep(61)
    assert await make_many("another") == counts[0]
    assert len(made._made) == counts[0]
    assert list(made._sizes) == [(None, "another")]


async def test_a_ticket_that_is_not_text(autojump_clock, harness):
    """Whatever bytes the address has."""
    for text in ("%ff%fe", "%00", "%ed%a0%80", "x" * 4000):
        assert (await harness.get(f"/api/sessions/s/status/stream?ticket={text}")).status == 401


async def test_the_maker_of_a_ticket_is_checked(autojump_clock, harness, authority):
    """401 without a token, or with one that has expired."""
    await make(harness, None, 401)
    authority.tokens["old"] = Grant("ann", "patient", expires_at=harness.app.tracker.clock() - 31)
    await make(harness, "old", 401)


def test_take_raises_unauthorized():
    """Also to programs that use the class."""
    made = Tickets(LocalCoordination(), lambda _: None, clock=lambda: 0.0)
    with pytest.raises(Unauthorized):
        trio.run(made.take, "none")
