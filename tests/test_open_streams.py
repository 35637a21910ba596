"""Open streams end with their tokens, over every transport; and nothing is left of those that were closed."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
import trio
from harness import FaultyHarness, ServerHarness
from hypothesis import given, settings
from hypothesis import strategies as st
from live_harness import LiveHarness, encoding, run
from trio.testing import memory_stream_pair, wait_all_tasks_blocked
from watch_clients import POLLS, SOCKETS, STREAMED, TRANSPORTS, Authority, WatchClient, bearer

from sseserve import Action, Grant, Session, Unauthorized
from sseserve.engines.coordination import LocalCoordination
from sseserve.errors import EngineUnavailable, TooManyStreams
from sseserve.http import open_streams as module
from sseserve.http.auth import Policy
from sseserve.http.open_streams import OpenStreams, user_name
from sseserve.http.revocations import Revocation, Revocations
from sseserve.live.push_subscriber import PushSubscriber
from sseserve.live.transport import Transport
from sseserve.model import EndReason

LIFETIME = 1000.0  # seconds: the longest of a token
ANN = Grant("ann", "patient", token_id="first", issued_at=0.0)
CLAIMANT = Grant("ann", "service", token_id="first", issued_at=0.0)


class Server(ServerHarness):
    """One that knows ``tokens``; ``ann`` owns the session ``s``."""

    def __init__(self, nursery, **options):
        self.authority = Authority(root=Grant("root", "admin"))
        super().__init__(nursery, authenticate=self.authority.authenticate, **options)

    @property
    def open_streams(self):
        return self.app.open_streams

    def issue(self, token, seconds=None, grant=ANN, **changes):
        """Issue a token that expires in so many seconds."""
        now = self.tracker.clock()
        expires_at = None if seconds is None else now + seconds
        self.authority.tokens[token] = msgspec.structs.replace(
            grant, **{"token_id": token, "issued_at": now, "expires_at": expires_at, **changes}
        )

    async def watch(self, transport, token="first", **options):
        client = WatchClient(self, transport, token=token, **options)
        self.app.nursery.start_soon(client.run)
        await wait_all_tasks_blocked()
        return client

    async def refresh(self, token, status=200):
        response = await self.post("/api/tokens/refresh", headers=bearer(token))
        assert response.status == status, response
        return response

    async def revoke(self, **body):
        response = await self.post("/api/revocations", body, bearer("root"))
        assert response.status == 204, response
        await wait_all_tasks_blocked()

    def counts(self):
        """Everything that is counted of open streams, and is empty when there are none."""
        streams = self.open_streams
        return (
            streams.total,
            streams._addresses,
            streams._credentials,
            streams._by_grant,
            self.app.coordination.slots.taken,
            streams._waiting,
        )


NOTHING = (0, {}, {}, {}, {}, 0)


@pytest.fixture
async def server(nursery, autojump_clock):
    server = Server(nursery, limit_loopback=True, max_token_lifetime=LIFETIME)
    await server.tracker.create("s", owner="ann")
    return server


def grant_for(transport):
    return CLAIMANT if transport == "claim" else ANN


def has_ended(client):
    """Whether a client was told the end in the way of its transport."""
    if client.transport in POLLS:
        return client.ended and client.status == 401
    return client.ended and (client.transport not in SOCKETS or client.code == 3000)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stream_ends_with_its_token(autojump_clock, server, transport):
    """Its client is told 30 s before; then it ends, at that moment. A long-poll is then 401."""
    server.issue("first", 100, grant_for(transport))
    client = await server.watch(transport)
    await trio.sleep(69.9)
    assert "expiring" not in client.names
    await trio.sleep(0.2)
    if transport not in POLLS:
        notices = [message.data for message in client.received if message.event == "expiring"]
        assert notices == [{"expires_in": 30}]
    await trio.sleep(29.8)
    assert not client.ended
    await trio.sleep(0.2)
    if transport in ("status", "history"):
        # The token is accepted for half a minute more, in which such a request ends at its end.
        await trio.sleep(30)
    assert has_ended(client)
    assert client.names.count("expiring") == (transport not in POLLS)
    await wait_all_tasks_blocked()
    assert server.counts() == NOTHING


@pytest.mark.parametrize("transport", [*STREAMED, *SOCKETS])
@pytest.mark.parametrize("seconds", [12, -10])
async def test_a_stream_whose_token_is_about_to_expire_is_told_at_once(
    autojump_clock, server, transport, seconds
):
    """Also one that is accepted after its end, because clocks differ; the second one, too."""
    server.issue("first", seconds)
    left = seconds if seconds > 0 else seconds + 30
    for _ in range(2):
        client = await server.watch(transport)
        notices = [message.data for message in client.received if message.event == "expiring"]
        assert notices == [{"expires_in": left}]
    await trio.sleep(left - 0.1)
    assert not client.ended
    await trio.sleep(0.2)
    assert has_ended(client)
    assert client.names.count("expiring") == 1


@pytest.mark.parametrize("transport", [*STREAMED, *SOCKETS])
async def test_a_fresh_token_extends_a_stream(autojump_clock, server, transport):
    """Without closing it; its client is told again before that one's end."""
    server.issue("first", 100)
    client = await server.watch(transport)
    await trio.sleep(90)
    server.issue("second", 200)
    assert (await server.refresh("second")).json == {"expires_in": 200}
    await trio.sleep(169)
    assert client.names.count("expiring") == 1
    await trio.sleep(1.1)
    assert client.names.count("expiring") == 2
    await server.tracker.update("s", message="later")
    await trio.sleep(6)
    assert b"later" in client.raw
    assert not client.ended
    await trio.sleep(24)
    assert has_ended(client)


@pytest.mark.parametrize("transport", ["status", "history", "claim"])
async def test_a_fresh_token_extends_a_long_poll(autojump_clock, server, transport):
    """It gets its response, though its own token has expired."""
    server.issue("first", 10, grant_for(transport))
    client = await server.watch(transport)
    server.issue("second", 100, grant_for(transport))
    await server.refresh("second")
    await trio.sleep(20)
    before = len(client.raw)
    await server.tracker.update("s", progress=50)
    await server.post("/api/jobs", {}, bearer("root"))
    await wait_all_tasks_blocked()
    assert len(client.raw) > before or transport == "claim"
    assert client.status in (200, None)


async def test_a_narrower_token_extends_what_it_may_watch(autojump_clock, server):
    """The others end at their time; one that may watch more does not give more."""
    await server.tracker.create("t", owner="bob")
    both = Grant("ann", capabilities={Action.WATCH: ("s", "t")})
    server.issue("first", 100, both)
    of_s, of_t = [await server.watch("sse", session_id=name) for name in ("s", "t")]
    of_both = await server.watch("bundle", path="/api/streams?session=s&session=t")
    server.issue("second", 200, both, capabilities={Action.WATCH: ("s",)})
    await server.refresh("second")
    await trio.sleep(101)
    assert [client.ended for client in (of_s, of_t, of_both)] == [False, True, True]
    # The list shows what the newest token may watch.
    server.issue("first", 100, ANN)
    listed = await server.watch("list")
    server.issue("second", 200, Grant("ann"))
    await server.refresh("second")
    before = len(listed.received)
    await server.tracker.update("s", message="secret")
    await trio.sleep(3)
    assert "secret" not in str(listed.received[before:])
    assert not listed.ended


@pytest.mark.parametrize(
    "changes",
    [{"subject": "bob"}, {"issuer": "another"}, {"role": None}, {"expires_at": 1.0}],
    ids=lambda changes: next(iter(changes)),
)
async def test_tokens_that_extend_nothing(autojump_clock, server, changes):
    """Another subject's, another issuer's, one without rights, and one that has expired."""
    server.issue("first", 100)
    client = await server.watch("sse")
    server.issue("second", 200, **changes)
    await server.refresh("second", 401 if "expires_at" in changes else 200)
    await trio.sleep(101)
    assert client.ended


async def test_a_token_that_expires_sooner_takes_nothing_away(autojump_clock, server):
    """The stream goes on by what it has."""
    server.issue("first", 100)
    client = await server.watch("sse")
    server.issue("second", 50)
    await server.refresh("second")
    await trio.sleep(99)
    assert not client.ended
    server.issue("first")
    endless = await server.watch("sse")
    server.issue("second", 50)
    await server.refresh("second")
    assert (await server.refresh("first")).json == {"expires_in": None}
    await trio.sleep(500)
    assert not endless.ended
    assert not client.ended  # it was extended by that, too


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "body", [{"subject": "ann"}, {"token_id": "first"}, {"token_id": "second"}], ids=lambda body: str(body)
)
async def test_a_revocation_ends_streams(autojump_clock, server, transport, body):
    """At once: by the subject, by the token that opened it, or by one that extended it."""
    server.issue("first", 100, grant_for(transport))
    client = await server.watch(transport)
    server.issue("second", 200, grant_for(transport))
    await server.refresh("second")
    other = await server.watch("sse", "root")
    await trio.sleep(1)
    await server.revoke(**body)
    assert has_ended(client) or (transport in ("status", "history") and client.status == 401)
    assert not other.ended
    assert "expiring" not in client.names


async def test_a_revocation_holds_until_the_tokens_have_expired(autojump_clock, server):
    """Also for tokens that come later; a new login works, and so does another subject."""
    server.issue("first", 1000)
    server.issue("same second", 1000, issued_at=float(int(server.tracker.clock())))
    server.issue("unknown age", 1000, issued_at=None)
    server.issue("bob", 1000, subject="bob")
    await server.revoke(subject="ann")
    for token in ("first", "same second", "unknown age"):
        assert (await server.watch("sse", token)).status == 401
    assert (await server.watch("list", "bob")).status == 200
    await trio.sleep(1)
    server.issue("new", 1000)
    assert (await server.watch("sse", "new")).status == 200
    for seconds, count in ((LIFETIME + 28, 1), (62, 0)):
        await trio.sleep(seconds)
        assert len(server.app.revocations) == count


async def test_a_revocation_is_of_one_issuer_or_of_all(autojump_clock, server):
    """By the issuer that it names, if it names one."""
    server.issue("a", 1000, issuer="a")
    server.issue("b", 1000, issuer="b")
    clients = [await server.watch("sse", token) for token in "ab"]
    await server.revoke(subject="ann", issuer="a")
    assert [client.ended for client in clients] == [True, False]
    await server.revoke(subject="ann")
    assert clients[1].ended


@pytest.mark.parametrize(
    ("body", "status"),
    [({}, 422), ({"subject": "a", "token_id": "b"}, 422), ({"issuer": "a"}, 422), ({"subject": ""}, 422),
     ({"subject": "x" * 1025}, 422), ([], 422), (b"", 400), (b"{", 400)],
)  # fmt: skip
async def test_bodies_of_revocations(autojump_clock, server, body, status):
    """A subject or a token."""
    assert (await server.post("/api/revocations", body, bearer("root"))).status == status


@pytest.mark.parametrize("role", ["patient", "therapist", "service", None])
async def test_only_admins_revoke(autojump_clock, server, role):
    """403 for everybody else."""
    server.issue("first", 100, role=role)
    assert (await server.post("/api/revocations", {"subject": "b"}, bearer("first"))).status == 403
    assert len(server.app.revocations) == 0


# While a stream is being opened


@pytest.mark.parametrize("transport", [*STREAMED, *SOCKETS])
@pytest.mark.parametrize("what", ["expires", "is revoked", "is about to expire"])
async def test_a_token_that_ends_while_its_stream_is_being_opened(nursery, autojump_clock, transport, what):
    """No byte of the session is sent; what is sent is a response as it should be."""
    server = FaultyHarness(nursery)
    authority = Authority(ann=Grant("ann", "patient", token_id="a", expires_at=server.tracker.clock() + 40))
    server.app.admission.authenticate = authority.authenticate
    await server.tracker.create("s", owner="ann")
    await server.tracker.update("s", message="secret")
    read, waiting = server.engine.read, trio.Event()

    async def slow_read(*args):
        await waiting.wait()
        return await read(*args)

    server.engine.read = slow_read
    sessions = server.engine.sessions

    async def slow_sessions(*args):
        await waiting.wait()
        return await sessions(*args)

    server.engine.sessions = slow_sessions
    client = WatchClient(server, transport, token="ann")
    nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    if what == "is revoked":
        await server.app.coordination.store_revocation(
            msgspec.msgpack.encode(Revocation(token_id="a", at=0.0, until=1e12)), 1e12
        )
    else:
        await trio.sleep(41 if what == "expires" else 15)
    waiting.set()
    await wait_all_tasks_blocked()
    if what == "is about to expire":
        assert client.names[0] == "expiring"
        assert b"secret" in client.raw
        return
    assert client.ended
    assert client.status in (101, 200)
    assert b"secret" not in client.raw
    if transport in SOCKETS:
        assert client.code == 3000


@pytest.mark.parametrize("when", ["before the slots", "between the slots", "after the slots"])
async def test_a_token_that_ends_before_its_stream_is_open(autojump_clock, when):
    """It is refused with 401, and has no slot."""
    now = 0.0
    revocations = Revocations()
    streams = make_streams(clock=lambda: now, revocations=revocations)
    grant = Grant("ann", "admin", token_id="a", expires_at=100.0)

    class Coordination(LocalCoordination):
        async def take_slot(self, name, limit):
            nonlocal now
            if name.startswith("session b" if when == "after the slots" else "session a"):
                now = 131.0
            return await super().take_slot(name, limit)

    streams._coordination = Coordination()
    if when == "before the slots":
        now = 131.0
    with pytest.raises(Unauthorized):
        await streams.open(grant, "10.0.0.1", ("a", "b"))
    assert counts_of(streams) == NOTHING


async def test_a_stream_that_waits_for_a_session_ends_with_its_token(autojump_clock, server):
    """A dialect's stream may be open before there is a session."""
    server.issue("first", 100, Grant("ann", capabilities={Action.WATCH: ("job-*",)}))
    client = await server.watch("sse", session_id="job-1", path="/api/interaction/events/{}")
    await trio.sleep(101)
    assert (client.names, client.ended) == (["expiring"], True)
    server.issue("first", 100, Grant("ann", capabilities={Action.WATCH: ("job-*",)}))
    client = await server.watch("sse", session_id="job-1", path="/api/interaction/events/{}")
    server.issue("second", 200, Grant("ann", "patient"))  # who may watch it only once it is ann's
    await server.refresh("second")
    await trio.sleep(101)
    assert client.ended


@pytest.mark.parametrize("transport", ["sse", "websocket", "bundle"])
async def test_a_replay_in_progress_ends_with_its_token(autojump_clock, server, transport):
    """Between two pages of the log: the client does not get the rest of it."""
    for number in range(1000):
        await server.tracker.emit("s", "note", {"number": number, "text": "x" * 200})
    server.issue("first", 100)
    session = await server.tracker.get("s")
    client = WatchClient(server, transport, token="first", cursor=f"{session.epoch}-0")
    read, pages = server.tracker.engine.read, 0

    async def count_pages(*args):
        nonlocal pages
        pages += 1
        if pages == 3:
            await server.app.coordination.store_revocation(
                msgspec.msgpack.encode(Revocation(token_id="first", at=0.0, until=1e12)), 1e12
            )
        return await read(*args)

    server.tracker.engine.read = count_pages
    server.app.nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    assert client.ended
    numbers = [message.data for message in client.received if message.event == "note"]
    assert 0 < len(numbers) <= 2 * 128
    assert transport not in SOCKETS or client.code == 3000


async def test_a_client_that_does_not_read_is_ended(autojump_clock, server):
    """What waits for it is dropped; it was cut if that may have been the head."""
    server.issue("first", 100)
    stream = await server.stream("/api/sessions/s/status/stream", headers=bearer("first"))
    for number in range(50):
        await server.tracker.update("s", message=f"{number}" + "x" * 1000, progress=number)
    await server.revoke(token_id="first")
    await stream.connection.read_to_end()
    await wait_all_tasks_blocked()
    assert server.counts() == NOTHING


# The engine is unavailable


@pytest.mark.parametrize("transport", ["sse", "bundle", "websocket", "list"])
async def test_streams_end_while_the_engine_is_unavailable(nursery, autojump_clock, transport):
    """Nothing of that needs the engine. A stream that is opened then ends, too."""
    server = FaultyHarness(nursery)
    authority = Authority(ann=Grant("ann", "patient", expires_at=server.tracker.clock() + 100))
    server.app.admission.authenticate = authority.authenticate
    await server.tracker.create("s", owner="ann")
    client = WatchClient(server, transport, token="ann")
    nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    server.engine.fail()
    late = WatchClient(server, "sse", token="ann")
    nursery.start_soon(late.run)
    await trio.sleep(99)
    assert not client.ended
    assert not late.ended
    await trio.sleep(1.5)
    for each in (client, late):
        assert "expiring" in each.names
        assert each.ended


async def test_a_refresh_while_the_engine_is_unavailable(nursery, autojump_clock):
    """503 if rights depend on what is stored, and then it can be tried again."""
    server = FaultyHarness(nursery)
    now = server.tracker.clock()
    authority = Authority(
        ann=Grant("ann", "patient", expires_at=now + 100),
        ann_2=Grant("ann", "patient", expires_at=now + 200),
        root=Grant("root", "admin", expires_at=now + 100),
        root_2=Grant("root", "admin", expires_at=now + 200),
    )
    server.app.admission.authenticate = authority.authenticate
    await server.tracker.create("s", owner="ann")
    clients = [WatchClient(server, "sse", token=token) for token in ("ann", "root")]
    for client in clients:
        nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    server.engine.fail()
    statuses = [
        (await server.post("/api/tokens/refresh", headers=bearer(token))).status
        for token in ("ann_2", "root_2")
    ]
    assert statuses == [503, 200]
    server.engine.recover()
    assert (await server.post("/api/tokens/refresh", headers=bearer("ann_2"))).status == 200
    await trio.sleep(150)
    assert [client.ended for client in clients] == [False, False]


# Counting


def make_streams(*, clock, revocations=None, sessions=None, **limits):
    values = {"max_streams_per_user": 3, "max_streams_per_session": 4, "max_streams_per_address": 5} | limits

    async def find(session_id):
        await trio.lowlevel.checkpoint()
        return (sessions or {}).get(session_id)

    return OpenStreams(
        LocalCoordination(),
        Policy(),
        Revocations() if revocations is None else revocations,
        type("Limits", (), values),
        max_streams=8,
        clock=clock,
        find=find,
    )


def counts_of(streams):
    return (
        streams.total,
        streams._addresses,
        streams._credentials,
        streams._by_grant,
        streams._coordination.slots.taken,
        streams._waiting,
    )


async def test_a_claim_that_is_being_stored_is_not_lost_with_its_token(nursery, autojump_clock):
    """The worker gets the job: it would otherwise be nobody's, and be lost with its lease."""
    server = FaultyHarness(nursery, job_workers="remote")
    now = server.tracker.clock()
    authority = Authority(ann=Grant("ann", "service", expires_at=now + 5), root=Grant("root", "admin"))
    server.app.admission.authenticate = authority.authenticate
    client = WatchClient(server, "claim", token="ann")
    nursery.start_soon(client.run)
    await trio.sleep(4)
    append, stored = server.engine.append, 0

    async def slow_append(session, *args, **options):
        nonlocal stored
        stored += 1
        if stored == 2:
            await trio.sleep(3)  # the claim
        await append(session, *args, **options)

    server.engine.append = slow_append
    assert (await server.post("/api/jobs", {}, bearer("root"))).status == 202
    await trio.sleep(0.5)
    assert client.status is None
    await trio.sleep(5)
    assert client.status == 200


class Ended:
    """A client that closes its stream when it is ended, as the server's do."""

    def __init__(self, streams, stream):
        self.stream = stream
        self.told = []
        self._streams = streams
        self._streams.add(self)

    def expiring(self, seconds):
        self.told.append(seconds)

    def expire(self, _reason, _why):
        self.close()

    def close(self):
        if self in self._streams:
            self._streams.remove(self)
            self.stream.__exit__(None, None, None)


class FaultyCoordination(LocalCoordination):
    """One whose slots may fail to be taken: ``fault`` says how the next one does."""

    fault = None

    async def take_slot(self, name, limit):
        await trio.lowlevel.checkpoint()
        fault, self.fault = self.fault, None
        if fault == "unavailable":
            raise EngineUnavailable("away")
        if fault == "cancelled":
            raise trio.Cancelled._create(source="explicit")
        return fault != "full" and await super().take_slot(name, limit)


USERS = st.sampled_from([None, "ann", "bob"])
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("open"), USERS, st.sampled_from([None, "10.0.0.1", "10.0.0.2"]),
            st.sampled_from([(), ("a",), ("a", "b"), ("b", "c")]), st.sampled_from([None, 20, 90, 4000]),
            st.sampled_from([None, None, None, "full", "unavailable", "cancelled"]),
        ),
        st.tuples(st.just("close"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.sampled_from([1, 25, 70])),
        st.tuples(st.just("revoke"), USERS),
        st.tuples(st.just("extend"), USERS, st.sampled_from([None, 50, 500])),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=100)
@given(STEPS)
def test_no_slot_is_leaked(steps):
    """However streams are opened, refused, ended, extended and closed: nothing is left of them."""

    async def main():
        revocations = Revocations()
        streams = make_streams(clock=trio.current_time, revocations=revocations)
        streams._coordination = FaultyCoordination()
        open_now = set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(streams.run)
            for kind, *values in steps:
                await wait_all_tasks_blocked()
                now = trio.current_time()
                if kind == "open":
                    user, address, session_ids, seconds, streams._coordination.fault = values
                    expires_at = None if seconds is None else now + seconds
                    grant = (
                        None if user is None else Grant(user, "admin", issued_at=now, expires_at=expires_at)
                    )
                    try:
                        stream = await streams.open(grant, address, session_ids)
                    except (TooManyStreams, EngineUnavailable, Unauthorized, trio.Cancelled):
                        continue
                    stream.attach(Ended(open_now, stream))
                elif kind == "close" and open_now:
                    sorted(open_now, key=id)[values[0] % len(open_now)].close()
                elif kind == "wait":
                    await trio.sleep(values[0])
                elif kind == "revoke" and values[0] is not None:
                    revocations.add(Revocation(subject=values[0], at=now, until=now + 5000))
                elif kind == "extend" and values[0] is not None:
                    seconds = values[1]
                    expires_at = None if seconds is None else now + seconds
                    with suppress(Unauthorized):
                        await streams.extend(Grant(values[0], "admin", issued_at=now, expires_at=expires_at))
                assert streams.total == len(open_now)
            for client in list(open_now):
                client.close()
            assert counts_of(streams) == NOTHING
            nursery.cancel_scope.cancel()

    run(main)


async def test_what_is_due_is_forgotten_with_its_streams(autojump_clock, monkeypatch):
    """Streams that are opened and closed again and again, with tokens that are good for long."""
    monkeypatch.setattr(module, "SPARE", 16)
    streams = make_streams(clock=trio.current_time)
    for number in range(500):
        grant = Grant("ann", expires_at=1e6 + number)
        with await streams.open(grant, None, ()):
            pass
        assert len(streams._due) <= 20
    kept = [await streams.open(Grant("ann", expires_at=1e6), None, ()) for _ in range(3)]
    for _ in range(100):
        with suppress(TooManyStreams), await streams.open(Grant("bob", expires_at=1e6), None, ()):
            pass
    assert len(streams._due) <= 2 * 4 + 17
    assert {entry[2].grant.subject for entry in streams._due if entry[0] == entry[2].due} == {"ann"}
    for stream in kept:
        stream.__exit__(None, None, None)
    assert counts_of(streams) == NOTHING


async def test_many_streams_of_one_token_end_in_turns(autojump_clock):
    """Other tasks run in between; those that are attached meanwhile are told once, too."""
    streams = make_streams(
        clock=trio.current_time,
        max_streams_per_user=None,
        max_streams_per_session=None,
        max_streams_per_address=None,
    )
    streams._max_streams = 10_000
    grant = Grant("ann", expires_at=100.0)
    open_now = set()
    clients = [Ended(open_now, await streams.open(grant, None, ())) for _ in range(1000)]
    early, late = clients[:700], clients[700:]
    for client in early:
        client.stream.attach(client)
    async with trio.open_nursery() as nursery:

        async def attach_late():
            while not (count := sum(bool(client.told) for client in early)):
                await trio.lowlevel.checkpoint()
            assert count < 700
            for client in late:
                client.stream.attach(client)

        nursery.start_soon(streams.run)
        await trio.sleep_until(70)
        nursery.start_soon(attach_late)
        await trio.sleep(29)
        assert {tuple(client.told) for client in clients} == {(30.0,)}
        await trio.sleep(2)
        assert not open_now
        nursery.cancel_scope.cancel()
    assert counts_of(streams) == NOTHING


async def test_a_revocation_is_answered_when_many_streams_have_ended(autojump_clock, server):
    """They are ended one after another, so the response waits for the last one."""
    open_now = set()
    for number in range(3000):
        grant = Grant("ann", issuer=f"issuer {number % 10}")  # each of them has a user ann
        client = Ended(open_now, await server.open_streams.open(grant, None, ("s",)))
        client.stream.attach(client)
    response = await server.post("/api/revocations", {"subject": "ann"}, bearer("root"))
    assert (response.status, open_now) == (204, set())


async def test_the_tokens_of_a_stream_are_kept_once(autojump_clock):
    """Refreshing again and again does not keep all that there ever were, nor their rights."""
    streams = make_streams(clock=trio.current_time)
    rights = {Action.WATCH: ("*",)}
    with await streams.open(Grant("ann", capabilities=rights, expires_at=100.0), None, ("a",)) as stream:
        for number in range(200):
            await streams.extend(Grant("ann", capabilities=rights, expires_at=101.0 + number))
        assert len(stream.credential.grants) == 2
        for number in range(50):
            now = trio.current_time()
            await streams.extend(
                Grant("ann", None, frozenset({"x"}), rights, None, f"id {number}", now, now + 1000 + number)
            )
            await trio.sleep(100)
        assert len(stream.credential.earlier) < 20
        assert all(not (grant.capabilities or grant.patients) for grant in stream.credential.earlier)


def test_users_of_two_issuers_are_not_counted_together():
    """Whatever their names are."""
    grants = [Grant("b c", issuer="a"), Grant("c", issuer="a b"), Grant("a b c"), Grant("c", issuer="b")]
    assert len(set(map(user_name, grants))) == 4


class Told:
    """A client that remembers what it was told."""

    def __init__(self):
        self.calls = []

    def expiring(self, seconds):
        self.calls.append(seconds)

    def expire(self, reason, why):
        self.calls.append(reason)


@pytest.mark.parametrize("what", ["expires", "is revoked", "neither"])
async def test_a_token_that_ends_between_opening_and_attaching(autojump_clock, what):
    """As during the handshake of a WebSocket."""
    revocations = Revocations()
    streams = make_streams(clock=trio.current_time, revocations=revocations)
    with await streams.open(Grant("ann", token_id="a", expires_at=10.0), None, ()) as stream:
        if what == "expires":
            await trio.sleep(10)
        elif what == "is revoked":
            revocations.add(Revocation(token_id="a", at=0.0, until=1e9))
        client = Told()
        stream.attach(client)
        expected = {
            "expires": ["the token has expired"],
            "is revoked": ["the token was revoked"],
            "neither": [],
        }
        assert client.calls == expected[what]


@pytest.mark.parametrize("what", ["is revoked", "closes"])
async def test_what_happens_while_a_stream_is_extended(nursery, autojump_clock, what):
    """While the rights of the fresh token are checked that is revoked, or the stream closes."""
    revocations = Revocations()
    streams = make_streams(clock=trio.current_time, revocations=revocations)

    async def find(_session_id):
        await trio.sleep(1)
        return Session(id="s", epoch="e", owner="ann")

    streams._find = find
    nursery.start_soon(streams.run)
    client = Told()
    stream = await streams.open(Grant("ann", "patient", expires_at=100.0), None, ("s",))
    stream.attach(client)
    nursery.start_soon(streams.extend, Grant("ann", "patient", token_id="b", expires_at=500.0))
    await trio.sleep(0.5)
    if what == "is revoked":
        revocations.add(Revocation(token_id="b", at=0.0, until=1e9))
        await trio.sleep(100)
        assert client.calls == [30.0, "the token has expired"]
        streams.close(stream)
    else:
        streams.close(stream)
        await trio.sleep(1)
    assert counts_of(streams) == NOTHING


async def test_a_token_that_has_expired_extends_nothing(autojump_clock):
    """Nor does one that was revoked."""
    revocations = Revocations()
    revocations.add(Revocation(token_id="a", at=0.0, until=1e9))
    streams = make_streams(clock=lambda: 1000.0, revocations=revocations)
    for grant in (Grant("ann", expires_at=970.0), Grant("ann", token_id="a", expires_at=2000.0)):
        with pytest.raises(Unauthorized):
            await streams.extend(grant)


@pytest.mark.parametrize("transport", [*STREAMED, *SOCKETS])
@pytest.mark.parametrize("what", ["is about to expire", "expires"])
async def test_slots_that_take_their_time(autojump_clock, server, transport, what):
    """What a client was to be told meanwhile comes after the head of its response."""
    take_slot = server.app.coordination.take_slot

    async def slow_take_slot(name, limit):
        await trio.sleep(0.5)
        return await take_slot(name, limit)

    server.app.coordination.take_slot = slow_take_slot
    server.issue("first", 12 if what == "is about to expire" else 0.7)
    client = WatchClient(server, transport, token="first")
    server.app.nursery.start_soon(client.run)
    await trio.sleep(3)
    assert client.status in (101, 200)
    if what == "is about to expire":
        assert client.names.count("expiring") == 1
        assert client.names[0] == "expiring"
        assert not client.ended
    else:
        assert has_ended(client)


async def test_the_head_of_a_response_is_sent_though_its_token_ends(autojump_clock, nursery):
    """Of what waits for a client the head stays, and nothing else does."""
    harness = LiveHarness(nursery)
    client, stream = memory_stream_pair()
    async with trio.open_nursery() as connection:
        subscriber = PushSubscriber(harness.broker, encoding(chunked=True), Transport(stream), connection)
        subscriber.head = b"HEAD "
        subscriber.expiring(5)
        subscriber.write(b"secret")
        subscriber.expire("the token was revoked", EndReason.REVOKED)
        await trio.sleep(1)
    assert await client.receive_some() == b"HEAD 0\r\n\r\n"
