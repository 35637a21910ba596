"""The client against servers that cut, reset, hang, refuse and lie, and against our own."""

from __future__ import annotations

import gc
import math
import warnings
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from fakes import (
    SSE_HEAD,
    FakeServer,
    accept_websocket,
    close_frame,
    read_body,
    reset_on_close,
    respond,
    respond_error,
    send_messages,
    send_raw,
)

from sseserve import client, sse
from sseserve.client import (
    TRANSPORTS,
    Backoff,
    CannotConnect,
    ConnectionLost,
    InvalidResponse,
    Publisher,
    ReceivedMessage,
    RequestRejected,
    SessionFinished,
    UnknownSession,
    watch,
)
from sseserve.client import publisher as publisher_module
from sseserve.client.retry import RetryPolicy
from sseserve.model import Control
from sseserve.server import serve

AT_ONCE = Backoff(initial=0.0, maximum=0.0)
every_transport = pytest.mark.parametrize("transport", TRANSPORTS)

ONE = ("e-1", "progress", {"progress": 10, "state": "running"})
TWO = ("e-2", "note", [2])
DONE = ("e-3", "complete", {"progress": 100, "state": "succeeded"})
RESUMED = (None, "resume", {"status": "ok", "missed": 0})


async def watched(fake, transport, **options):
    """Watch to the end and return all messages."""
    options = {"backoff": AT_ONCE, **options}
    async with watch(fake.url, "s", transport=transport, **options) as messages:
        return [message async for message in messages]


def messages(*triples):
    """What should be received of ``(id, event, data)``; without an id the one before is in force."""
    cursor, out = None, []
    for own, event, data in triples:
        cursor = own or cursor
        out.append(ReceivedMessage(cursor, event, data))
    return out


@asynccontextmanager
async def nothing_left_behind():
    """Check that no generator is left to the garbage collector."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# Watching


@every_transport
async def test_watches_to_the_end(transport, nursery):
    """All messages come, once and in order, and then the iteration ends."""
    fake = await FakeServer(send_messages(transport, ONE, TWO, DONE, then="end")).start(nursery)
    assert await watched(fake, transport) == messages(ONE, TWO, DONE)
    assert len(fake.requests) == 1


@every_transport
async def test_comes_back_with_its_cursor(transport, nursery):
    """A cut connection is made anew behind the last message, and what happened is told."""
    fake = FakeServer(
        send_messages(transport, ONE, TWO),
        send_raw(head=b"", then="reset"),
        send_messages(transport, RESUMED, DONE, then="end"),
    )
    await fake.start(nursery)
    lost = []
    got = await watched(fake, transport, on_reconnect=lambda error, delay: lost.append(str(error)))
    assert got == messages(ONE, TWO, RESUMED, DONE)
    # A poll's connection ends with every answer, which is no loss.
    assert [request.cursor for request in fake.requests[1:]] == ["e-2", "e-2"]
    assert len(lost) == (1 if transport == "poll" else 2)


@every_transport
async def test_begins_behind_a_given_cursor(transport, nursery):
    """A cursor from an earlier watch, over whatever transport, is sent with the first request."""
    fake = await FakeServer(send_messages(transport, RESUMED, DONE, then="end")).start(nursery)
    got = await watched(fake, transport, cursor="e-2")
    assert got == [ReceivedMessage("e-2", "resume", {"status": "ok", "missed": 0}), *messages(DONE)]
    assert fake.requests[0].cursor == "e-2"


@every_transport
@pytest.mark.parametrize("status", ["gap", "reset"])
async def test_passes_bad_verdicts_on(transport, status, nursery):
    """Whoever came back too late learns it before the snapshot."""
    verdict = (None, "resume", {"status": status, "missed": 5})
    fake = await FakeServer(send_messages(transport, verdict, DONE, then="end")).start(nursery)
    got = await watched(fake, transport, cursor="e-0")
    assert got == [ReceivedMessage("e-0", "resume", {"status": status, "missed": 5}), *messages(DONE)]


@every_transport
async def test_cursor_at_the_end(transport, nursery):
    """Who has seen all is told that there is no more: 204, a normal close, or an answer that ends."""
    handler = (
        respond(204)
        if transport == "sse"
        else send_messages(transport, RESUMED, ("e-3", None, None), then="end")
    )
    fake = await FakeServer(handler).start(nursery)
    assert await watched(fake, transport, cursor="e-3") == messages(("e-3", *RESUMED[1:]))
    assert len(fake.requests) == 1


@every_transport
async def test_cursor_without_a_message(transport, nursery):
    """A place to come back to may come alone, before anything has happened."""
    fake = FakeServer(
        send_messages(transport, ("e-0", None, None)), send_messages(transport, DONE, then="end")
    )
    await fake.start(nursery)
    assert await watched(fake, transport) == messages(DONE)
    assert fake.requests[1].cursor == "e-0"


@every_transport
async def test_unknown_session(transport, nursery):
    """There is nothing to wait for."""
    fake = await FakeServer(respond_error(404, "session_not_found", "there is no session 's'")).start(nursery)
    with pytest.raises(UnknownSession, match="there is no session 's'") as caught:
        await watched(fake, transport)
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (
        404,
        "session_not_found",
        "r1",
    )


@every_transport
async def test_session_deleted_meanwhile(transport, nursery):
    """A session that is gone when we come back has been deleted, which is an end."""
    fake = await FakeServer(send_messages(transport, ONE), respond_error(404, "session_not_found")).start(
        nursery
    )
    got = await watched(fake, transport, retry_timeout=0)
    assert got == [*messages(ONE), ReceivedMessage("e-1", "deleted", {})]


@every_transport
async def test_server_that_forgets(transport, nursery):
    """A server that has begun anew may not know the session yet; it has its time to come again."""
    gone = respond_error(404, "session_not_found", "there is no session 's'")
    verdict = (None, "resume", {"status": "reset", "missed": 1})
    cut = send_raw(head=b"", then="reset")
    again = send_messages(transport, verdict, ("f-1", *DONE[1:]), then="end")
    fake = await FakeServer(send_messages(transport, ONE), cut, gone, gone, again).start(nursery)
    got = await watched(fake, transport)
    assert got == messages(ONE, verdict, ("f-1", *DONE[1:]))


@pytest.mark.parametrize("transport", ["sse", "ws"])
async def test_retry_timeout_for_an_unknown_session_starts_when_the_server_is_back(transport, nursery):
    """However long the restart took and whatever its wait was, the session has its own time to come again."""
    gone = respond_error(404, "session_not_found", "gone")
    cut = send_raw(head=b"", then="reset")
    fake = await FakeServer(
        send_messages(transport, ONE, retry=60), cut, cut, gone, send_messages(transport, DONE, then="end")
    ).start(nursery)
    delays = []
    got = await watched(
        fake,
        transport,
        backoff=Backoff(initial=0.01, maximum=60.0),
        retry_timeout=0.1,
        on_reconnect=lambda error, delay: delays.append((str(error), delay)),
    )
    assert got == messages(ONE, DONE)
    assert len(delays) == 4
    assert delays[3][0] == "gone"
    assert delays[2][1] > delays[3][1]


async def test_poll_learns_of_a_deletion_at_once(nursery):
    """A server that knew the session a moment ago is right when it says that it is gone."""
    fake = await FakeServer(send_messages("poll", ONE), respond_error(404, "session_not_found")).start(
        nursery
    )
    got = await watched(fake, "poll", retry_timeout=math.inf)
    assert got == [*messages(ONE), ReceivedMessage("e-1", "deleted", {})]


@every_transport
async def test_deleted_is_an_end(transport, nursery):
    """The server's farewell ends the watch; it has no cursor of its own."""
    fake = await FakeServer(send_messages(transport, ONE, (None, "deleted", {}), then="hang")).start(nursery)
    assert await watched(fake, transport) == [*messages(ONE), ReceivedMessage("e-1", "deleted", {})]


@every_transport
async def test_failure_is_an_end(transport, nursery):
    """An error event is terminal."""
    failed = ("e-2", "error", {"state": "failed"})
    fake = await FakeServer(send_messages(transport, ONE, failed, then="hang")).start(nursery)
    assert await watched(fake, transport) == messages(ONE, failed)


@every_transport
async def test_other_rejections(transport, nursery):
    """An error that a retry would not cure is raised as it is."""
    fake = await FakeServer(respond_error(403, "forbidden", "not yours")).start(nursery)
    with pytest.raises(RequestRejected, match="not yours") as caught:
        await watched(fake, transport)
    assert (caught.value.status, caught.value.code) == (403, "forbidden")


@every_transport
async def test_busy_server_is_tried_again(transport, nursery):
    """503 passes; its Retry-After is kept to the letter at first."""
    fake = FakeServer(
        respond(503, b"starting", "Retry-After: 0"),
        respond_error(503, "unavailable"),
        send_messages(transport, DONE, then="end"),
    )
    await fake.start(nursery)
    lost = []
    got = await watched(fake, transport, on_reconnect=lambda error, delay: lost.append((str(error), delay)))
    assert got == messages(DONE)
    assert lost == [("HTTP 503 Service Unavailable", 0.05), ("no", 0.0)]


@every_transport
async def test_gives_up_if_there_never_was_a_connection(transport, nursery):
    """After ``retry_timeout`` the last failure is the reason given."""
    fake = await FakeServer(respond_error(503, "unavailable", "too many")).start(nursery)
    with pytest.raises(CannotConnect, match=r"cannot connect to .*/api/sessions/s: too many"):
        await watched(fake, transport, backoff=Backoff(initial=60.0), retry_timeout=5.0)


@every_transport
async def test_nobody_listens(transport):
    """A refused connection is a failure like any other."""
    with trio.socket.socket() as bound:
        await bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(CannotConnect, match="Connection refused"):
            async with watch(url, "s", transport=transport, retry_timeout=0) as got:
                await anext(got)


@every_transport
async def test_never_gives_up_once_connected(transport, nursery):
    """After the first connection ``retry_timeout`` no longer applies."""
    fails = [send_raw(head=b"", then="reset")] * 3
    fake = await FakeServer(
        send_messages(transport, ONE), *fails, send_messages(transport, DONE, then="end")
    ).start(nursery)
    assert await watched(fake, transport, retry_timeout=0) == messages(ONE, DONE)


@every_transport
async def test_wrong_server(transport, nursery):
    """A page of something else is no reason to try again."""
    fake = await FakeServer(respond(200, b"<html>", "Content-Type: text/html")).start(nursery)
    with pytest.raises(InvalidResponse):
        await watched(fake, transport)


@every_transport
async def test_redirect_is_no_answer_to_a_socket(transport, nursery):
    """HTTP transports follow a redirect; a WebSocket handshake cannot."""
    target = await FakeServer(send_messages(transport, DONE, then="end")).start(nursery)
    location = {"sse": "/api/sessions/s/status/stream", "ws": "/x", "poll": "/api/sessions/s/events"}[
        transport
    ]
    fake = await FakeServer(respond(307, None, f"Location: {target.url}{location}")).start(nursery)
    if transport == "ws":
        with pytest.raises(InvalidResponse, match="307"):
            await watched(fake, transport)
    else:
        assert await watched(fake, transport) == messages(DONE)


@every_transport
async def test_data_that_is_not_json(transport, nursery):
    """A message that cannot be decoded is an error; it is not skipped."""
    handler = {
        "sse": send_raw(b"data: {\n\n"),
        "ws": accept_websocket(b"\x81\x01{"),
        "poll": respond(200, {"events": [1], "next": "e-1"}),
    }
    fake = await FakeServer(handler[transport]).start(nursery)
    with pytest.raises(InvalidResponse):
        await watched(fake, transport)


@every_transport
async def test_retry_time_is_kept(transport, nursery):
    """The server's reconnection time replaces our own for the first attempt."""
    fake = await FakeServer(send_messages(transport, ONE, retry=60_000), send_raw(head=b"")).start(nursery)

    class Told(Exception):
        pass

    def told(error, delay):
        raise Told(delay)

    with pytest.raises(Told, match=r"^60.0$"):
        await watched(fake, transport, on_reconnect=told)


@every_transport
async def test_session_id_is_quoted(transport, nursery):
    """An id with a slash stays one segment of the path."""
    fake = await FakeServer(respond_error(404, "session_not_found")).start(nursery)
    with pytest.raises(UnknownSession):
        async with watch(fake.url + "/", "a/b c?", transport=transport) as got:
            await anext(got)
    assert fake.requests[0].path.startswith("/api/sessions/a%2Fb%20c%3F/")


@every_transport
async def test_headers_are_sent(transport, nursery):
    """What the server asks for beyond the path goes with every request."""
    fake = await FakeServer(send_messages(transport, DONE, then="end")).start(nursery)
    await watched(fake, transport, headers={"X-Key": "secret"})
    assert fake.requests[0].headers["x-key"] == "secret"


@every_transport
async def test_leaving_early(transport, nursery):
    """Whoever leaves in the middle closes the connection and leaves nothing behind."""
    left = trio.Event()
    hang = send_messages(transport, ONE, TWO, DONE, then="hang")

    async def handler(stream, request):
        try:
            await hang(stream, request)
        finally:
            left.set()

    fake = await FakeServer(handler).start(nursery)
    async with nothing_left_behind():
        async with watch(fake.url, "s", transport=transport) as got:
            async for message in got:
                assert message == messages(ONE)[0]
                break
        await left.wait()


@every_transport
async def test_errors_of_the_caller_stay_bare(transport, nursery):
    """What the block raises comes out as it is, not in a group."""
    fake = await FakeServer(send_messages(transport, ONE, then="hang")).start(nursery)
    async with nothing_left_behind():
        with pytest.raises(KeyError):  # noqa: PT012 - the block's own error is what this is about
            async with watch(fake.url, "s", transport=transport) as got:
                await anext(got)
                raise KeyError


@every_transport
async def test_cancelling(transport, nursery):
    """A cancelled watch is over at once."""
    fake = await FakeServer(
        send_messages(transport, ONE, then="hang"), send_messages(transport, then="hang")
    ).start(nursery)
    async with nothing_left_behind():
        with trio.CancelScope() as scope:
            async with watch(fake.url, "s", transport=transport) as got:
                await anext(got)
                scope.cancel()
                await anext(got)
        assert scope.cancelled_caught


@every_transport
async def test_idle_timeout(transport, nursery, mock_clock):
    """A connection that receives nothing for ``idle_timeout`` is replaced by a new one."""
    request_received = trio.Event()

    async def mute(stream, _):
        request_received.set()
        await trio.sleep_forever()

    first = (
        [send_messages("poll", ONE), mute]
        if transport == "poll"
        else [send_messages(transport, ONE, then="hang")]
    )
    fake = await FakeServer(*first, send_messages(transport, DONE, then="end")).start(nursery)
    lost = []
    async with watch(
        fake.url,
        "s",
        transport=transport,
        backoff=AT_ONCE,
        on_reconnect=lambda error, delay: lost.append(str(error)),
    ) as got:
        assert await anext(got) == messages(ONE)[0]

        async def jump():
            if transport == "poll":
                await request_received.wait()
            await trio.testing.wait_all_tasks_blocked(0.01)
            mock_clock.jump(46)

        nursery.start_soon(jump)
        assert await anext(got) == messages(DONE)[0]
    assert lost == ["timed out waiting for data from the server"]


def test_unknown_transport():
    """A transport that we do not have is the caller's mistake."""
    with pytest.raises(ValueError, match="unknown transport"):
        watch("http://127.0.0.1:1", "s", transport="pigeon")


# Watching: each transport's own troubles


@pytest.mark.parametrize("then", ["close", "reset"])
async def test_cut_inside_an_event(then, nursery):
    """Half an event is no event: neither it nor its id counts, and it comes whole the next time."""
    whole = sse.encode("[2]", event="note", id="e-2")
    for length in range(1, len(whole)):
        fake = FakeServer(
            send_raw(sse.encode("[1]", id="e-1"), whole[:length]), send_messages("sse", TWO, DONE)
        )
        await fake.start(nursery)
        got = await watched(fake, "sse")
        assert got == messages(("e-1", "message", [1]), TWO, DONE)
        assert fake.requests[1].cursor == "e-1"


async def test_reset_connection(nursery):
    """A reset while we wait is a loss like any other."""

    async def handler(stream, request):
        await stream.send_all(SSE_HEAD + sse.encode("[1]", event="note", id="e-1"))
        await proceed.wait()
        reset_on_close(stream)

    proceed = trio.Event()
    fake = await FakeServer(handler, send_messages("sse", DONE)).start(nursery)
    async with watch(fake.url, "s", backoff=AT_ONCE) as got:
        assert await anext(got) == ReceivedMessage("e-1", "note", [1])
        proceed.set()
        assert await anext(got) == messages(DONE)[0]


async def test_heartbeats_are_signs_of_life_and_nothing_else(nursery):
    """Comments never come out."""
    fake = await FakeServer(
        send_raw(sse.comment("heartbeat"), sse.encode("{}", event="complete", id="e-1"))
    ).start(nursery)
    assert await watched(fake, "sse") == [ReceivedMessage("e-1", "complete", {})]


async def test_chunked_stream_that_is_cut(nursery):
    """A proxy's chunked stream that breaks off inside a chunk is a loss."""
    head = SSE_HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked")
    fake = await FakeServer(send_raw(b"ff\r\nid: e-1\n", head=head), send_messages("sse", DONE)).start(
        nursery
    )
    assert await watched(fake, "sse") == messages(DONE)
    assert fake.requests[1].cursor is None


@pytest.mark.parametrize("transport", ["sse", "ws"])
async def test_overflow_is_a_loss(transport, nursery):
    """Being cut for slowness is about the connection, so it is told there and not among the messages."""
    fake = FakeServer(
        send_messages(transport, ONE, (None, "overflow", {})), send_messages(transport, DONE, then="end")
    )
    await fake.start(nursery)
    lost = []
    got = await watched(fake, transport, on_reconnect=lambda error, delay: lost.append(str(error)))
    assert got == messages(ONE, DONE)
    assert lost == ["the server closed the connection: this client reads too slowly"]


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (send_raw(head=b"", then="close"), "the server closed the connection during the handshake"),
        (send_raw(head=b"", then="reset"), "the connection was lost during the handshake"),
        (
            send_raw(head=b"HTTP/1.1 404 X\r\nContent-Length: 99\r\n\r\n{"),
            "the server closed the connection during the handshake",
        ),
        (
            accept_websocket(close_frame(1012, "restart"), then="hang"),
            "the server closed the connection: 1012 restart",
        ),
        (accept_websocket(close_frame(1013)), "the server closed the connection: 1013 TRY_AGAIN_LATER"),
        (accept_websocket(then="reset"), "the connection was lost"),
    ],
    ids=["hang up", "reset", "half an answer", "restart", "slow", "reset later"],
)
async def test_socket_losses(handler, why, nursery):
    """However a WebSocket comes to grief, it is made anew."""
    fake = await FakeServer(handler, send_messages("ws", DONE, then="end")).start(nursery)
    lost = []
    got = await watched(fake, "ws", on_reconnect=lambda error, delay: lost.append(str(error)))
    assert got == messages(DONE)
    # A connection that is reset right behind the handshake may be noticed inside it or after it.
    assert lost[0].startswith(why)
    assert len(lost) == 1


async def test_socket_garbage(nursery):
    """What is no HTTP is no handshake."""
    fake = await FakeServer(
        send_raw(head=b"\x00\x01garbage\r\n\r\n"), send_messages("ws", DONE, then="end")
    ).start(nursery)
    assert await watched(fake, "ws") == messages(DONE)


async def test_socket_handshake_without_an_answer(nursery, mock_clock):
    """A server that takes the connection and says nothing does not hold us."""
    request_received = trio.Event()

    async def mute(stream, _):
        request_received.set()
        await trio.sleep_forever()

    fake = await FakeServer(mute, send_messages("ws", DONE, then="end")).start(nursery)

    async def jump():
        await request_received.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        mock_clock.jump(11)

    nursery.start_soon(jump)
    assert await watched(fake, "ws", retry_timeout=math.inf) == messages(DONE)


async def test_socket_answers_pings(nursery):
    """The server's heartbeat is a ping, and it gets its pong while nothing else happens."""

    async def ping(stream, request):
        await accept_websocket(b"\x89\x02hi")(stream, request)
        frame = b""
        while len(frame) < 8:
            frame += await stream.receive_some()
        mask, payload = frame[2:6], frame[6:8]
        pongs.append((frame[0], bytes(a ^ b for a, b in zip(payload, mask, strict=False))))

    pongs = []
    fake = await FakeServer(ping, send_messages("ws", DONE, then="end")).start(nursery)
    assert await watched(fake, "ws") == messages(DONE)
    assert pongs == [(0x8A, b"hi")]


async def test_poll_pages_in_a_row(nursery):
    """A good verdict on each answer is no news; only the first one, on coming back, is passed on."""
    fake = FakeServer(
        send_messages("poll", RESUMED, ONE),
        send_messages("poll", RESUMED, TWO),
        send_messages("poll", RESUMED, DONE, then="end"),
    )
    await fake.start(nursery)
    assert await watched(fake, "poll") == messages(ONE, TWO, DONE)
    assert [request.query["after"] for request in fake.requests] == [["0-0"], ["e-1"], ["e-2"]]
    assert [request.query["wait"] for request in fake.requests] == [["0"], ["22.5"], ["22.5"]]


async def test_poll_paces_a_server_that_does_not_wait(nursery, mock_clock):
    """Empty answers that come at once are requested once a second, no more."""
    empty = respond(200, {"events": [], "next": "e-1", "end": False})
    fake = await FakeServer(send_messages("poll", ONE), empty, send_messages("poll", DONE, then="end")).start(
        nursery
    )
    async with watch(fake.url, "s", transport="poll") as got:
        await anext(got)

        async def jump():
            while len(fake.requests) < 2:
                await trio.testing.wait_all_tasks_blocked(0.01)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(fake.requests) == 2
            mock_clock.jump(1)

        nursery.start_soon(jump)
        assert await anext(got) == messages(DONE)[0]


# Backoff


def test_backoff_grows_to_its_maximum():
    """It doubles from ``initial`` to ``maximum``; jitter takes away up to half of it."""
    backoff = Backoff(initial=1.0, maximum=30.0)
    assert [backoff.delay(n, rand=lambda: 1.0) for n in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [backoff.delay(n, rand=lambda: 0.0) for n in range(3)] == [0.5, 1, 2]
    assert backoff.delay(10**6, rand=lambda: 1.0) == 30


def test_backoff_applies_the_delay_that_the_server_requests():
    """Exactly at first, then as the lower bound; never less than 50 ms."""
    backoff = Backoff(initial=1.0, maximum=30.0)
    assert backoff.delay(0, 3.3) == 3.3
    assert backoff.delay(0, 0.0) == 0.05
    assert backoff.delay(1, 3.0, rand=lambda: 1.0) == 6
    assert backoff.delay(9, 60.0, rand=lambda: 1.0) == 60


# Retries of the publishers


def retries(retry_timeout=5.0):
    """A policy without delays of its own: only the errors request one."""
    return RetryPolicy("http://h/s", retry_timeout, Backoff(initial=0.0, maximum=0.0))


def test_retry_timeout_counts_from_the_first_failure():
    """Both the elapsed time and the delays count, since the caller's sleep may return early."""
    for step in (0.0, 1.0):
        policy = retries()
        assert policy.next_delay(ConnectionLost("down", 1.0), 100.0) == 1.0
        assert policy.next_delay(ConnectionLost("down"), 100.0 + step) == 0.0
    policy = retries()
    policy.next_delay(ConnectionLost("down", 1.0), 100.0)
    with pytest.raises(CannotConnect, match=r"^cannot publish to http://h/s: late$"):
        policy.next_delay(ConnectionLost("late"), 105.0)
    with pytest.raises(CannotConnect):
        retries().next_delay(ConnectionLost("down", 5.0), 0.0)


def test_retry_of_errors():
    """A lost connection and a request that is still being processed are retried, and nothing else is."""
    conflict = RequestRejected("in progress", status=409, code="conflict")
    assert retries().next_delay(conflict, 0.0) == 0.0
    with pytest.raises(CannotConnect, match="in progress"):
        retries(retry_timeout=0).next_delay(conflict, 0.0)
    for error_ in (RequestRejected("no", status=422, code="invalid"), InvalidResponse("html")):
        with pytest.raises(type(error_)) as caught:
            retries().next_delay(error_, 0.0)
        assert caught.value is error_


# Publishing


@asynccontextmanager
async def publisher(fake, **options):
    """A publisher that does not wait between attempts."""
    async with Publisher(fake.url, **{"backoff": AT_ONCE, **options}) as made:
        yield made


def accepted(cursor="e-1", control="continue", **more):
    """The response of a server that has applied a publish request."""
    return respond(202, {"id": cursor, "control": control, **more})


async def test_publishes_progress(nursery):
    """What is said is sent, what is not said is not."""
    fake = await FakeServer(accepted(control="pause")).start(nursery)
    async with publisher(fake) as p:
        got = await p.progress("a b", progress=40, message="hi", error={"code": 1})
    assert (got.id, got.control, got.applied) == ("e-1", Control.PAUSE, 1)
    request = fake.requests[0]
    assert (request.method, request.path) == ("POST", "/api/sessions/a%20b/progress")
    assert request.headers["content-type"] == "application/json"
    assert msgspec.json.decode(request.body) == {"progress": 40, "message": "hi", "error": {"code": 1}}


async def test_publishes_events(nursery):
    """An event goes with its type and data, and a reconnection time if there is one."""
    fake = await FakeServer(accepted(), accepted()).start(nursery)
    async with publisher(fake) as p:
        await p.event("s", "note", [1])
        await p.event("s", "note", retry=500)
    bodies = [msgspec.json.decode(request.body) for request in fake.requests]
    assert bodies == [{"type": "note", "data": [1]}, {"type": "note", "data": None, "retry": 500}]


async def test_retries_with_the_same_key(nursery):
    """All attempts of one call carry one key, and another call another."""
    fake = FakeServer(
        send_raw(head=b"", then="reset"),
        respond_error(503, "unavailable"),
        respond_error(409, "conflict"),
        accepted(),
        accepted("e-2"),
    )
    await fake.start(nursery)
    async with publisher(fake) as p:
        assert (await p.progress("s", progress=1)).id == "e-1"
        assert (await p.progress("s", progress=2)).id == "e-2"
    keys = [request.headers["idempotency-key"] for request in fake.requests]
    assert len(set(keys[:4])) == 1
    assert keys[4] != keys[0]


async def test_own_key(nursery):
    """A key of the caller's own is sent as it is."""
    fake = await FakeServer(accepted()).start(nursery)
    async with publisher(fake) as p:
        await p.progress("s", progress=1, key="mine")
    assert fake.requests[0].headers["idempotency-key"] == "mine"


async def test_rejected_requests(nursery):
    """A rejected request is not retried; a finished session has its own error class."""
    fake = await FakeServer(
        respond_error(409, "session_ended", "over"), respond_error(422, "invalid_progress", "back")
    ).start(nursery)
    async with publisher(fake) as p:
        with pytest.raises(SessionFinished, match="over"):
            await p.progress("s", progress=1)
        with pytest.raises(RequestRejected, match="back") as caught:
            await p.progress("s", progress=1)
    assert caught.value.code == "invalid_progress"
    assert len(fake.requests) == 2


async def test_gives_up_publishing(nursery):
    """After ``retry_timeout`` the last failure is the reason given."""
    fake = await FakeServer(respond_error(503, "unavailable", "full")).start(nursery)
    async with publisher(fake, backoff=Backoff(initial=60), retry_timeout=5) as p:
        with pytest.raises(CannotConnect, match=r"cannot publish to .*/progress: full"):
            await p.progress("s", progress=1)


async def test_answer_without_a_receipt(nursery):
    """A web page is an invalid response."""
    fake = await FakeServer(respond(200, b"<html>")).start(nursery)
    async with publisher(fake) as p:
        with pytest.raises(InvalidResponse):
            await p.progress("s", progress=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_progress_that_json_cannot_say(value, nursery):
    """It would silently become null."""
    fake = await FakeServer().start(nursery)
    async with publisher(fake) as p:
        with pytest.raises(ValueError, match="finite"):
            await p.progress("s", progress=value)
    assert fake.requests == []


async def test_batch_of_a_list(nursery):
    """Lines may be text, bytes or mappings, with or without their line end."""
    fake = await FakeServer(accepted("e-3", applied=3)).start(nursery)
    async with publisher(fake) as p:
        got = await p.batch("s", ['{"progress":1}', b'{"progress":2}\n', {"progress": 3}])
    assert (got.applied, got.id) == (3, "e-3")
    assert fake.requests[0].body == b'{"progress":1}\n{"progress":2}\n{"progress":3}\n'
    assert fake.requests[0].headers["content-type"] == "application/x-ndjson"


async def test_batch_of_nothing(nursery):
    """No lines, or only empty ones, are no request."""
    fake = await FakeServer().start(nursery)
    async with publisher(fake) as p:
        assert (await p.batch("s", ["", "\n"])).applied == 0
    assert fake.requests == []


async def test_batch_lines_go_out_as_they_come(nursery, monkeypatch):
    """A line is with the server before the next one is written."""
    monkeypatch.setattr(publisher_module, "_LINE_TIMEOUT", math.inf)
    arrived = [trio.Event(), trio.Event()]

    async def handler(stream, request):
        for event in arrived:
            await read_body(stream, request, chunks=1)
            event.set()
        await accepted("e-2", applied=2)(stream, request)

    async def lines():
        for event in arrived:
            yield {"progress": 1}
            await event.wait()

    fake = await FakeServer(handler).start(nursery)
    async with publisher(fake) as p, nothing_left_behind():
        assert (await p.batch("s", lines())).applied == 2


async def test_batch_that_pauses_is_answered(nursery, monkeypatch):
    """When no line comes for a moment the request ends, and its answer is news."""
    monkeypatch.setattr(publisher_module, "_LINE_TIMEOUT", 0.01)
    answered = trio.Event()
    totals = []

    async def lines():
        yield {"progress": 1}
        await answered.wait()
        yield {"progress": 2}

    def told(total):
        totals.append((total.applied, total.id, total.control))
        answered.set()

    fake = await FakeServer(accepted("e-1", "pause", applied=1), accepted("e-2", applied=1)).start(nursery)
    async with publisher(fake) as p:
        got = await p.batch("s", lines(), on_result=told)
    assert totals == [(1, "e-1", "pause"), (2, "e-2", "continue")]
    assert (got.applied, got.id) == (2, "e-2")
    assert len({request.headers["idempotency-key"] for request in fake.requests}) == 2


async def test_batch_with_a_key_is_one_request(nursery, monkeypatch):
    """One key stands for all lines, so they are not split, however slowly they come or many they are."""
    monkeypatch.setattr(publisher_module, "_LINE_TIMEOUT", 0)
    monkeypatch.setattr(publisher_module, "_MAX_LINES", 1)
    fake = await FakeServer(accepted(applied=3)).start(nursery)
    async with publisher(fake) as p:
        await p.batch("s", [{"progress": n} for n in range(3)], key="k")
    assert fake.requests[0].headers["idempotency-key"] == "k"
    assert fake.requests[0].body.count(b"\n") == 3


async def test_batch_is_split_by_size(nursery, monkeypatch):
    """What is kept for sending again is bounded."""
    monkeypatch.setattr(publisher_module, "_MAX_LINES", 2)
    fake = await FakeServer(accepted("e-2", applied=2), accepted("e-3", applied=1)).start(nursery)
    async with publisher(fake) as p:
        assert (await p.batch("s", [{"progress": n} for n in range(3)])).applied == 3
    assert [request.body.count(b"\n") for request in fake.requests] == [2, 1]


async def test_batch_names_the_bad_line_of_the_whole(nursery, monkeypatch):
    """Lines are counted over all requests, empty ones too."""
    monkeypatch.setattr(publisher_module, "_MAX_LINES", 1)
    bad = respond_error(422, "invalid", "no number", line=2, applied=0)
    fake = await FakeServer(accepted(applied=1), bad).start(nursery)
    async with publisher(fake) as p:
        with pytest.raises(RequestRejected, match=r"^line 3: no number$") as caught:
            await p.batch("s", ['{"progress":1}', "", '{"progress":"x"}', '{"progress":3}'])
    assert (caught.value.line, caught.value.applied) == (3, 1)
    assert fake.requests[1].body == b'\n{"progress":"x"}\n'


async def test_batch_is_sent_again_as_it_was(nursery, monkeypatch):
    """Another attempt says what the first has said and no more; what came meanwhile is the next request."""
    monkeypatch.setattr(publisher_module, "_LINE_TIMEOUT", math.inf)
    cut = trio.Event()

    async def handler(stream, request):
        await read_body(stream, request, chunks=1)
        reset_on_close(stream)
        await trio.aclose_forcefully(stream)
        cut.set()

    async def lines():
        yield {"progress": 1}
        await cut.wait()
        yield {"progress": 2}
        yield {"progress": 3}

    fake = await FakeServer(handler, accepted("e-2", applied=2), accepted("e-3", applied=1)).start(nursery)
    async with publisher(fake) as p, nothing_left_behind():
        await p.batch("s", lines())
    first, again, rest = fake.requests
    assert first.headers["idempotency-key"] == again.headers["idempotency-key"]
    assert again.body.startswith(first.body)
    assert again.body + rest.body == b'{"progress":1}\n{"progress":2}\n{"progress":3}\n'


async def test_batch_refused_while_it_is_sent(nursery, monkeypatch):
    """A server that answers and hangs up early is heard when the next line does not get through."""
    monkeypatch.setattr(publisher_module, "_LINE_TIMEOUT", math.inf)
    gone = trio.Event()

    async def handler(stream, request):
        await read_body(stream, request, chunks=1)
        await respond(422, {"error": {"code": "invalid", "message": "no", "line": 1}}, "X: y")(
            stream, msgspec.structs.replace(request, method="GET")
        )
        await stream.aclose()
        gone.set()

    async def lines():
        yield {"progress": 1}
        await gone.wait()
        while True:
            yield {"progress": 2}

    again = respond_error(422, "invalid", "no", line=1)
    fake = await FakeServer(handler, again).start(nursery)
    async with publisher(fake) as p, nothing_left_behind():
        with pytest.raises(RequestRejected, match="line 1: no"):
            await p.batch("s", lines())


async def test_batch_errors_of_the_source_stay_bare(nursery):
    """What the lines raise comes out as it is."""

    def lines():
        yield "{}"
        raise KeyError

    fake = await FakeServer(accepted()).start(nursery)
    async with publisher(fake) as p, nothing_left_behind():
        with pytest.raises(KeyError):
            await p.batch("s", lines())


async def test_batch_line_with_a_line_break(nursery):
    """It would be two lines, and all line numbers wrong."""
    fake = await FakeServer(accepted()).start(nursery)
    async with publisher(fake) as p:
        with pytest.raises(ValueError, match="line break"):
            await p.batch("s", ["{}\n{}"])


# With our own server


@every_transport
async def test_our_own_server(transport):
    """A session watched live has the same messages over every transport, and resumes over any other."""
    async with serve(port=0) as server, Publisher(server.url) as p:
        await p.progress("s", progress=10, stage="read")
        got = []
        async with watch(server.url, "s", transport=transport) as received:
            got.append(await anext(received))
            await p.batch("s", [{"type": "note", "data": {"n": 1}}, {"progress": 50}])
            got.append(await anext(received))
            await p.progress("s", status="done")
            got += [message async for message in received]
        assert [message.event for message in got] == ["progress", "note", "progress", "complete"]
        with pytest.raises(SessionFinished):
            await p.progress("s", progress=99)
        for other in TRANSPORTS:
            async with watch(server.url, "s", transport=other, cursor=got[1].id) as received:
                resumed, *rest = [message async for message in received]
            assert resumed == ReceivedMessage(got[1].id, "resume", {"status": "ok", "missed": 0})
            assert rest == got[2:]
            async with watch(server.url, "s", transport=other, cursor=got[-1].id) as received:
                assert [message.event async for message in received] == ["resume"]
            async with watch(server.url, "s", transport=other) as received:
                assert [message async for message in received] == got[-1:]


async def test_our_own_server_applies_a_batch_once():
    """A batch under one key stands once, however often it is sent."""
    lines = [{"type": "note", "data": n} for n in range(5)]
    async with serve(port=0) as server, Publisher(server.url) as p:
        for _ in range(2):
            assert (await p.batch("s", lines, key="k")).applied == 5
        assert (await p.progress("s", status="done")).id.endswith("-6")


def test_public_names():
    """What the package offers is there."""
    for name in client.__all__:
        assert hasattr(client, name)
