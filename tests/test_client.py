"""The client, against fake servers that misbehave and against a real one."""

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
    drip_response,
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

NO_DELAY = Backoff(initial=0.0, maximum=0.0)
every_transport = pytest.mark.parametrize("transport", TRANSPORTS)

ONE = ("e-1", "progress", {"progress": 10, "state": "running"})
TWO = ("e-2", "note", [2])
DONE = ("e-3", "complete", {"progress": 100, "state": "succeeded"})
RESUMED = (None, "resume", {"status": "ok", "missed": 0})


async def watch_all(fake, transport, **options):
    """Watch to the end and return all messages."""
    options = {"backoff": NO_DELAY, **options}
    async with watch(fake.url, "s", transport=transport, **options) as messages:
        return [message async for message in messages]


def received(*triples):
    """Return the messages expected for ``(id, event, data)``; without an id the previous one applies."""
    cursor, out = None, []
    for own, event, data in triples:
        cursor = own or cursor
        out.append(ReceivedMessage(cursor, event, data))
    return out


@asynccontextmanager
async def no_unclosed_generators():
    """Check that no generator is left to the garbage collector."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# Watching: all transports


@every_transport
async def test_watches_to_the_end(transport, nursery):
    """All messages arrive once and in order, and then the iteration ends."""
    fake = await FakeServer(send_messages(transport, ONE, TWO, DONE, then="end")).start(nursery)
    assert await watch_all(fake, transport) == received(ONE, TWO, DONE)
    assert len(fake.requests) == 1


@every_transport
async def test_reconnects_with_its_cursor(transport, nursery):
    """A lost connection is resumed after the last message, and the loss is reported."""
    fake = FakeServer(
        send_messages(transport, ONE, TWO),
        send_raw(head=b"", then="reset"),
        send_messages(transport, RESUMED, DONE, then="end"),
    )
    await fake.start(nursery)
    lost = []
    got = await watch_all(fake, transport, on_reconnect=lambda error, delay: lost.append(str(error)))
    assert got == received(ONE, TWO, RESUMED, DONE)
    # A poll's connection ends with every response, which is not an error.
    assert [request.cursor for request in fake.requests[1:]] == ["e-2", "e-2"]
    assert len(lost) == (1 if transport == "poll" else 2)


@every_transport
async def test_starts_after_a_given_cursor(transport, nursery):
    """A cursor from an earlier watch, over any transport, is sent with the first request."""
    fake = await FakeServer(send_messages(transport, RESUMED, DONE, then="end")).start(nursery)
    got = await watch_all(fake, transport, cursor="e-2")
    assert got == [ReceivedMessage("e-2", "resume", {"status": "ok", "missed": 0}), *received(DONE)]
    assert fake.requests[0].cursor == "e-2"


@every_transport
@pytest.mark.parametrize("status", ["gap", "reset"])
async def test_reports_missed_events(transport, status, nursery):
    """A client whose cursor is too old gets the resume result before the snapshot."""
    resume = (None, "resume", {"status": status, "missed": 5})
    fake = await FakeServer(send_messages(transport, resume, DONE, then="end")).start(nursery)
    got = await watch_all(fake, transport, cursor="e-0")
    assert got == [ReceivedMessage("e-0", "resume", {"status": status, "missed": 5}), *received(DONE)]


@every_transport
async def test_cursor_at_the_end(transport, nursery):
    """No more messages follow: response 204, a normal closure, or a page with ``end``."""
    handler = (
        respond(204)
        if transport == "sse"
        else send_messages(transport, RESUMED, ("e-3", None, None), then="end")
    )
    fake = await FakeServer(handler).start(nursery)
    assert await watch_all(fake, transport, cursor="e-3") == received(("e-3", *RESUMED[1:]))
    assert len(fake.requests) == 1


@every_transport
async def test_cursor_without_a_message(transport, nursery):
    """A cursor may be sent alone, before the first event."""
    fake = FakeServer(
        send_messages(transport, ("e-0", None, None)), send_messages(transport, DONE, then="end")
    )
    await fake.start(nursery)
    assert await watch_all(fake, transport) == received(DONE)
    assert fake.requests[1].cursor == "e-0"


@every_transport
async def test_unknown_session(transport, nursery):
    """A session that does not exist is an error at once."""
    fake = await FakeServer(respond_error(404, "session_not_found", "there is no session 's'")).start(nursery)
    with pytest.raises(UnknownSession, match="there is no session 's'") as caught:
        await watch_all(fake, transport)
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (
        404,
        "session_not_found",
        "r1",
    )


@every_transport
async def test_session_deleted_while_disconnected(transport, nursery):
    """A session that is unknown after a reconnection was deleted, which ends the watch."""
    fake = await FakeServer(send_messages(transport, ONE), respond_error(404, "session_not_found")).start(
        nursery
    )
    got = await watch_all(fake, transport, retry_timeout=0)
    assert got == [*received(ONE), ReceivedMessage("e-1", "deleted", {})]


@every_transport
async def test_server_that_restarted(transport, nursery):
    """A restarted server may not know the session yet; the client waits for ``retry_timeout``."""
    unknown = respond_error(404, "session_not_found", "there is no session 's'")
    resume = (None, "resume", {"status": "reset", "missed": 1})
    disconnect = send_raw(head=b"", then="reset")
    again = send_messages(transport, resume, ("f-1", *DONE[1:]), then="end")
    fake = await FakeServer(send_messages(transport, ONE), disconnect, unknown, unknown, again).start(nursery)
    got = await watch_all(fake, transport)
    assert got == received(ONE, resume, ("f-1", *DONE[1:]))


@pytest.mark.parametrize("transport", ["sse", "ws"])
async def test_retry_timeout_for_an_unknown_session_starts_when_the_server_is_back(transport, nursery):
    """It does not depend on how long the restart took or on the reconnection time of the server."""
    unknown = respond_error(404, "session_not_found", "unknown")
    disconnect = send_raw(head=b"", then="reset")
    fake = await FakeServer(
        send_messages(transport, ONE, retry=60),
        disconnect,
        disconnect,
        unknown,
        send_messages(transport, DONE, then="end"),
    ).start(nursery)
    delays = []
    got = await watch_all(
        fake,
        transport,
        backoff=Backoff(initial=0.01, maximum=60.0),
        retry_timeout=0.1,
        on_reconnect=lambda error, delay: delays.append((str(error), delay)),
    )
    assert got == received(ONE, DONE)
    assert len(delays) == 4
    assert delays[3][0] == "unknown"
    assert delays[2][1] > delays[3][1]


async def test_poll_detects_a_deletion_at_once(nursery):
    """Between two polls there is no restart, so an unknown session was deleted."""
    fake = await FakeServer(send_messages("poll", ONE), respond_error(404, "session_not_found")).start(
        nursery
    )
    got = await watch_all(fake, "poll", retry_timeout=math.inf)
    assert got == [*received(ONE), ReceivedMessage("e-1", "deleted", {})]


@every_transport
async def test_deleted_is_final(transport, nursery):
    """A ``deleted`` message ends the watch; it has no cursor of its own."""
    fake = await FakeServer(send_messages(transport, ONE, (None, "deleted", {}), then="hang")).start(nursery)
    assert await watch_all(fake, transport) == [*received(ONE), ReceivedMessage("e-1", "deleted", {})]


@every_transport
async def test_error_is_final(transport, nursery):
    """An error event is terminal."""
    failed = ("e-2", "error", {"state": "failed"})
    fake = await FakeServer(send_messages(transport, ONE, failed, then="hang")).start(nursery)
    assert await watch_all(fake, transport) == received(ONE, failed)


@every_transport
async def test_other_rejections(transport, nursery):
    """An error that a retry would not cure is raised as it is."""
    fake = await FakeServer(respond_error(403, "forbidden", "not yours")).start(nursery)
    with pytest.raises(RequestRejected, match="not yours") as caught:
        await watch_all(fake, transport)
    assert (caught.value.status, caught.value.code) == (403, "forbidden")


@every_transport
async def test_unavailable_server_is_retried(transport, nursery):
    """503 is temporary; the first retry is after exactly its ``Retry-After``."""
    fake = FakeServer(
        respond(503, b"starting", "Retry-After: 0"),
        respond_error(503, "unavailable"),
        send_messages(transport, DONE, then="end"),
    )
    await fake.start(nursery)
    lost = []
    got = await watch_all(fake, transport, on_reconnect=lambda error, delay: lost.append((str(error), delay)))
    assert got == received(DONE)
    assert lost == [("HTTP 503 Service Unavailable", 0.05), ("no", 0.0)]


DEGRADED = (None, "degraded", {"reason": "Redis does not respond"})
RESTORED = (None, "restored", {})


async def test_an_engine_that_is_unavailable_is_waited_for(nursery):
    """A stream that says nothing of the session is no sign that there is one: what follows tells."""
    fake = FakeServer(
        send_messages("sse", DEGRADED, RESTORED, retry=50), send_messages("sse", ONE, DONE, then="end")
    )
    await fake.start(nursery)
    assert await watch_all(fake, "sse", retry_timeout=1) == received(DEGRADED, RESTORED, ONE, DONE)
    unknown = respond_error(404, "session_not_found", "there is no session 's'")
    fake = await FakeServer(send_messages("sse", DEGRADED, RESTORED, retry=50), unknown).start(nursery)
    with pytest.raises(UnknownSession):
        await watch_all(fake, "sse")


@every_transport
async def test_cannot_connect(transport, nursery):
    """After ``retry_timeout`` the last failure is the reason given."""
    fake = await FakeServer(respond_error(503, "unavailable", "too many")).start(nursery)
    with pytest.raises(CannotConnect, match=r"cannot connect to .*/api/sessions/s: too many"):
        await watch_all(fake, transport, backoff=Backoff(initial=60.0), retry_timeout=5.0)


@every_transport
async def test_connection_refused(transport):
    """A refused connection is retried like any other failure."""
    with trio.socket.socket() as bound:
        await bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(CannotConnect, match="Connection refused"):
            async with watch(url, "s", transport=transport, retry_timeout=0) as got:
                await anext(got)


@every_transport
async def test_retries_without_limit_once_connected(transport, nursery):
    """After the first connection ``retry_timeout`` no longer applies."""
    failures = [send_raw(head=b"", then="reset")] * 3
    fake = await FakeServer(
        send_messages(transport, ONE), *failures, send_messages(transport, DONE, then="end")
    ).start(nursery)
    assert await watch_all(fake, transport, retry_timeout=0) == received(ONE, DONE)


@every_transport
async def test_wrong_server(transport, nursery):
    """A web page is an invalid response, and not retried."""
    fake = await FakeServer(respond(200, b"<html>", "Content-Type: text/html")).start(nursery)
    with pytest.raises(InvalidResponse):
        await watch_all(fake, transport)


@pytest.mark.parametrize("media_type", ["TEXT/EVENT-STREAM", "text/event-stream ; charset=utf-8"])
async def test_event_stream_type(media_type, nursery):
    """A media type has no case, and may have parameters (RFC 9110, section 8.3.1)."""
    body = sse.encode("{}", event="deleted")
    fake = await FakeServer(respond(200, body, f"Content-Type: {media_type}")).start(nursery)
    assert [message.event for message in await watch_all(fake, "sse")] == ["deleted"]


@pytest.mark.parametrize("media_type", ["text/event-streamfoo", "text/event-stream-v2", "text/plain", ""])
async def test_not_an_event_stream(media_type, nursery):
    """A type that only begins like an event stream's is another one; the error names it."""
    body = sse.encode("{}", event="deleted")
    fake = await FakeServer(respond(200, body, f"Content-Type: {media_type}")).start(nursery)
    with pytest.raises(InvalidResponse, match=f"is not an event stream: {media_type or 'no type'}$"):
        await watch_all(fake, "sse")


@every_transport
async def test_redirect(transport, nursery):
    """HTTP transports follow a redirect; a WebSocket handshake does not."""
    target = await FakeServer(send_messages(transport, DONE, then="end")).start(nursery)
    location = {"sse": "/api/sessions/s/status/stream", "ws": "/x", "poll": "/api/sessions/s/events"}[
        transport
    ]
    fake = await FakeServer(respond(307, None, f"Location: {target.url}{location}")).start(nursery)
    if transport == "ws":
        with pytest.raises(InvalidResponse, match="307"):
            await watch_all(fake, transport)
    else:
        assert await watch_all(fake, transport) == received(DONE)


@every_transport
async def test_invalid_json(transport, nursery):
    """A message that cannot be decoded is an error; it is not skipped."""
    handler = {
        "sse": send_raw(b"data: {\n\n"),
        "ws": accept_websocket(b"\x81\x01{"),
        "poll": respond(200, {"events": [1], "next": "e-1"}),
    }
    fake = await FakeServer(handler[transport]).start(nursery)
    with pytest.raises(InvalidResponse):
        await watch_all(fake, transport)


@every_transport
async def test_reconnection_time(transport, nursery):
    """The server's reconnection time is the delay of the first attempt."""
    fake = await FakeServer(send_messages(transport, ONE, retry=60_000), send_raw(head=b"")).start(nursery)

    class Reported(Exception):
        pass

    def report(error, delay):
        raise Reported(delay)

    with pytest.raises(Reported, match=r"^60.0$"):
        await watch_all(fake, transport, on_reconnect=report)


@every_transport
async def test_session_id_is_percent_encoded(transport, nursery):
    """An id with a slash stays one segment of the path."""
    fake = await FakeServer(respond_error(404, "session_not_found")).start(nursery)
    with pytest.raises(UnknownSession):
        async with watch(fake.url + "/", "a/b c?", transport=transport) as got:
            await anext(got)
    assert fake.requests[0].path.startswith("/api/sessions/a%2Fb%20c%3F/")


@every_transport
async def test_headers_are_sent(transport, nursery):
    """The caller's headers are sent with the request."""
    fake = await FakeServer(send_messages(transport, DONE, then="end")).start(nursery)
    await watch_all(fake, transport, headers={"X-Key": "secret"})
    assert fake.requests[0].headers["x-key"] == "secret"


@every_transport
async def test_leaving_the_context_early(transport, nursery):
    """Leaving the context closes the connection and everything that belongs to it."""
    exited = trio.Event()
    hang = send_messages(transport, ONE, TWO, DONE, then="hang")

    async def handler(stream, request):
        try:
            await hang(stream, request)
        finally:
            exited.set()

    fake = await FakeServer(handler).start(nursery)
    async with no_unclosed_generators():
        async with watch(fake.url, "s", transport=transport) as got:
            async for message in got:
                assert message == received(ONE)[0]
                break
        await exited.wait()


@every_transport
async def test_errors_of_the_caller_are_not_wrapped(transport, nursery):
    """What the block raises is not wrapped in an exception group."""
    fake = await FakeServer(send_messages(transport, ONE, then="hang")).start(nursery)
    async with no_unclosed_generators():
        with pytest.raises(KeyError):  # noqa: PT012 - the block's own error is what this is about
            async with watch(fake.url, "s", transport=transport) as got:
                await anext(got)
                raise KeyError


@every_transport
async def test_cancellation(transport, nursery):
    """A cancelled watch ends at once."""
    fake = await FakeServer(
        send_messages(transport, ONE, then="hang"), send_messages(transport, then="hang")
    ).start(nursery)
    async with no_unclosed_generators():
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

    async def no_response(stream, _):
        request_received.set()
        await trio.sleep_forever()

    first = (
        [send_messages("poll", ONE), no_response]
        if transport == "poll"
        else [send_messages(transport, ONE, then="hang")]
    )
    fake = await FakeServer(*first, send_messages(transport, DONE, then="end")).start(nursery)
    lost = []
    async with watch(
        fake.url,
        "s",
        transport=transport,
        backoff=NO_DELAY,
        on_reconnect=lambda error, delay: lost.append(str(error)),
    ) as got:
        assert await anext(got) == received(ONE)[0]

        async def jump():
            if transport == "poll":
                await request_received.wait()
            await trio.testing.wait_all_tasks_blocked(0.01)
            mock_clock.jump(46)

        nursery.start_soon(jump)
        assert await anext(got) == received(DONE)[0]
    assert lost == ["timed out waiting for data from the server"]


def test_unknown_transport():
    """An unknown transport is a ``ValueError``."""
    with pytest.raises(ValueError, match="unknown transport"):
        watch("http://127.0.0.1:1", "s", transport="pigeon")


# Watching: single transports


@pytest.mark.parametrize("then", ["close", "reset"])
async def test_connection_lost_inside_an_event(then, nursery):
    """An incomplete event is ignored with its id, and received completely after the reconnection."""
    whole = sse.encode("[2]", event="note", id="e-2")
    for length in range(1, len(whole)):
        fake = FakeServer(
            send_raw(sse.encode("[1]", id="e-1"), whole[:length]), send_messages("sse", TWO, DONE)
        )
        await fake.start(nursery)
        got = await watch_all(fake, "sse")
        assert got == received(("e-1", "message", [1]), TWO, DONE)
        assert fake.requests[1].cursor == "e-1"


async def test_connection_reset(nursery):
    """A reset during the stream leads to a reconnection."""

    async def handler(stream, request):
        await stream.send_all(SSE_HEAD + sse.encode("[1]", event="note", id="e-1"))
        await proceed.wait()
        reset_on_close(stream)

    proceed = trio.Event()
    fake = await FakeServer(handler, send_messages("sse", DONE)).start(nursery)
    async with watch(fake.url, "s", backoff=NO_DELAY) as got:
        assert await anext(got) == ReceivedMessage("e-1", "note", [1])
        proceed.set()
        assert await anext(got) == received(DONE)[0]


async def test_heartbeats_are_not_messages(nursery):
    """Comments are ignored."""
    fake = await FakeServer(
        send_raw(sse.comment("heartbeat"), sse.encode("{}", event="complete", id="e-1"))
    ).start(nursery)
    assert await watch_all(fake, "sse") == [ReceivedMessage("e-1", "complete", {})]


async def test_incomplete_chunk(nursery):
    """A chunked stream that ends inside a chunk, as behind a proxy, leads to a reconnection."""
    head = SSE_HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked")
    fake = await FakeServer(send_raw(b"ff\r\nid: e-1\n", head=head), send_messages("sse", DONE)).start(
        nursery
    )
    assert await watch_all(fake, "sse") == received(DONE)
    assert fake.requests[1].cursor is None


@pytest.mark.parametrize("transport", ["sse", "ws"])
async def test_overflow_is_a_lost_connection(transport, nursery):
    """It concerns the connection, so it is reported there and not as a message."""
    fake = FakeServer(
        send_messages(transport, ONE, (None, "overflow", {})), send_messages(transport, DONE, then="end")
    )
    await fake.start(nursery)
    lost = []
    got = await watch_all(fake, transport, on_reconnect=lambda error, delay: lost.append(str(error)))
    assert got == received(ONE, DONE)
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
    ids=["close", "reset", "incomplete response", "restart", "slow", "reset later"],
)
async def test_websocket_lost(handler, why, nursery):
    """Every loss of a WebSocket leads to a reconnection."""
    fake = await FakeServer(handler, send_messages("ws", DONE, then="end")).start(nursery)
    lost = []
    got = await watch_all(fake, "ws", on_reconnect=lambda error, delay: lost.append(str(error)))
    assert got == received(DONE)
    # A connection that is reset right after the handshake may be noticed during or after it.
    assert lost[0].startswith(why)
    assert len(lost) == 1


async def test_websocket_handshake_with_invalid_response(nursery):
    """A response that is not HTTP leads to a reconnection."""
    fake = await FakeServer(
        send_raw(head=b"\x00\x01garbage\r\n\r\n"), send_messages("ws", DONE, then="end")
    ).start(nursery)
    assert await watch_all(fake, "ws") == received(DONE)


async def test_websocket_handshake_timeout(nursery, mock_clock):
    """A server that accepts the connection but does not respond does not block the client."""
    request_received = trio.Event()

    async def no_response(stream, _):
        request_received.set()
        await trio.sleep_forever()

    fake = await FakeServer(no_response, send_messages("ws", DONE, then="end")).start(nursery)

    async def jump():
        await request_received.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        mock_clock.jump(11)

    nursery.start_soon(jump)
    assert await watch_all(fake, "ws", retry_timeout=math.inf) == received(DONE)


async def test_websocket_pong(nursery):
    """A ping of the server gets its pong while the client waits for a message."""

    async def ping(stream, request):
        await accept_websocket(b"\x89\x02hi")(stream, request)
        frame = b""
        while len(frame) < 8:
            frame += await stream.receive_some()
        mask, payload = frame[2:6], frame[6:8]
        pongs.append((frame[0], bytes(a ^ b for a, b in zip(payload, mask, strict=False))))

    pongs = []
    fake = await FakeServer(ping, send_messages("ws", DONE, then="end")).start(nursery)
    assert await watch_all(fake, "ws") == received(DONE)
    assert pongs == [(0x8A, b"hi")]


async def test_poll_reports_only_the_first_ok(nursery):
    """A resume result of ``ok`` is reported only after a reconnection, not with each page."""
    fake = FakeServer(
        send_messages("poll", RESUMED, ONE),
        send_messages("poll", RESUMED, TWO),
        send_messages("poll", RESUMED, DONE, then="end"),
    )
    await fake.start(nursery)
    assert await watch_all(fake, "poll") == received(ONE, TWO, DONE)
    assert [request.query["after"] for request in fake.requests] == [["0-0"], ["e-1"], ["e-2"]]
    assert [request.query["wait"] for request in fake.requests] == [["0"], ["22.5"], ["22.5"]]


async def test_poll_rate_is_limited(nursery, mock_clock):
    """If empty pages arrive immediately, there is one request per second."""
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
        assert await anext(got) == received(DONE)[0]


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


def retry_policy(retry_timeout=5.0):
    """Return a policy without delays of its own: only the errors request delays."""
    return RetryPolicy("http://h/s", retry_timeout, Backoff(initial=0.0, maximum=0.0))


def test_retry_timeout_counts_from_the_first_failure():
    """Both the elapsed time and the delays count, since the caller's sleep may return early."""
    for step in (0.0, 1.0):
        policy = retry_policy()
        assert policy.next_delay(ConnectionLost("down", 1.0), 100.0) == 1.0
        assert policy.next_delay(ConnectionLost("down"), 100.0 + step) == 0.0
    policy = retry_policy()
    policy.next_delay(ConnectionLost("down", 1.0), 100.0)
    with pytest.raises(CannotConnect, match=r"^cannot publish to http://h/s: late$"):
        policy.next_delay(ConnectionLost("late"), 105.0)
    with pytest.raises(CannotConnect):
        retry_policy().next_delay(ConnectionLost("down", 5.0), 0.0)


def test_retry_of_errors():
    """A lost connection and a request that is still being processed are retried, and nothing else is."""
    conflict = RequestRejected("in progress", status=409, code="conflict")
    assert retry_policy().next_delay(conflict, 0.0) == 0.0
    with pytest.raises(CannotConnect, match="in progress"):
        retry_policy(retry_timeout=0).next_delay(conflict, 0.0)
    for error_ in (RequestRejected("no", status=422, code="invalid"), InvalidResponse("html")):
        with pytest.raises(type(error_)) as caught:
            retry_policy().next_delay(error_, 0.0)
        assert caught.value is error_


# Publishing


@asynccontextmanager
async def publisher(fake, **options):
    """Return a publisher that does not wait between attempts."""
    async with Publisher(fake.url, **{"backoff": NO_DELAY, **options}) as publisher_:
        yield publisher_


def accepted(cursor="e-1", control="continue", **members):
    """Respond as a server that has applied a publish request."""
    return respond(202, {"id": cursor, "control": control, **members})


async def test_publishes_progress(nursery):
    """Arguments that are None are not sent."""
    fake = await FakeServer(accepted(control="pause")).start(nursery)
    async with publisher(fake) as p:
        got = await p.progress("a b", progress=40, message="hi", error={"code": 1})
    assert (got.id, got.control, got.applied) == ("e-1", Control.PAUSE, 1)
    request = fake.requests[0]
    assert (request.method, request.path) == ("POST", "/api/sessions/a%20b/progress")
    assert request.headers["content-type"] == "application/json"
    assert msgspec.json.decode(request.body) == {"progress": 40, "message": "hi", "error": {"code": 1}}


async def test_dripping_response(nursery):
    """Each byte arrives in time, but the response is never complete: ``timeout`` is the sum."""
    fake = await FakeServer(drip_response).start(nursery)
    async with publisher(fake, timeout=0.1, retry_timeout=0) as p:
        with pytest.raises(CannotConnect, match="timed out"):
            await p.progress("s", progress=1)
    nursery.cancel_scope.cancel()


async def test_publishes_events(nursery):
    """An event has its type and data, and a reconnection time if one is given."""
    fake = await FakeServer(accepted(), accepted()).start(nursery)
    async with publisher(fake) as p:
        await p.event("s", "note", [1])
        await p.event("s", "note", retry=500)
    bodies = [msgspec.json.decode(request.body) for request in fake.requests]
    assert bodies == [{"type": "note", "data": [1]}, {"type": "note", "data": None, "retry": 500}]


async def test_retries_with_the_same_key(nursery):
    """All attempts of one call have the same key, and each call has another."""
    fake = FakeServer(
        send_raw(head=b"", then="reset"),
        respond_error(503, "unavailable"),
        respond_error(507, "insufficient_storage"),
        respond_error(409, "conflict"),
        accepted(),
        accepted("e-2"),
    )
    await fake.start(nursery)
    async with publisher(fake) as p:
        assert (await p.progress("s", progress=1)).id == "e-1"
        assert (await p.progress("s", progress=2)).id == "e-2"
    keys = [request.headers["idempotency-key"] for request in fake.requests]
    assert len(set(keys[:5])) == 1
    assert keys[5] != keys[0]


async def test_key_of_the_caller(nursery):
    """A key given by the caller is sent unchanged."""
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


async def test_cannot_connect_to_publish(nursery):
    """After ``retry_timeout`` the last failure is the reason given."""
    fake = await FakeServer(respond_error(503, "unavailable", "full")).start(nursery)
    async with publisher(fake, backoff=Backoff(initial=60), retry_timeout=5) as p:
        with pytest.raises(CannotConnect, match=r"cannot publish to .*/progress: full"):
            await p.progress("s", progress=1)


async def test_response_without_a_result(nursery):
    """A web page is an invalid response."""
    fake = await FakeServer(respond(200, b"<html>")).start(nursery)
    async with publisher(fake) as p:
        with pytest.raises(InvalidResponse):
            await p.progress("s", progress=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_progress_that_json_cannot_represent(value, nursery):
    """It would be encoded as null without notice."""
    fake = await FakeServer().start(nursery)
    async with publisher(fake) as p:
        with pytest.raises(ValueError, match="finite"):
            await p.progress("s", progress=value)
    assert fake.requests == []


async def test_ndjson_of_a_list(nursery):
    """Lines may be text, bytes or mappings, with or without a line break at the end."""
    fake = await FakeServer(accepted("e-3", applied=3)).start(nursery)
    async with publisher(fake) as p:
        got = await p.ndjson("s", ['{"progress":1}', b'{"progress":2}\n', {"progress": 3}])
    assert (got.applied, got.id) == (3, "e-3")
    assert fake.requests[0].body == b'{"progress":1}\n{"progress":2}\n{"progress":3}\n'
    assert fake.requests[0].headers["content-type"] == "application/x-ndjson"


async def test_empty_batch(nursery):
    """No lines, or only empty ones, lead to no request."""
    fake = await FakeServer().start(nursery)
    async with publisher(fake) as p:
        assert (await p.ndjson("s", ["", "\n"])).applied == 0
    assert fake.requests == []


async def test_ndjson_lines_are_sent_immediately(nursery, monkeypatch):
    """A line is at the server before the next one is produced."""
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
    async with publisher(fake) as p, no_unclosed_generators():
        assert (await p.ndjson("s", lines())).applied == 2


async def test_ndjson_request_ends_when_lines_pause(nursery, monkeypatch):
    """If no line follows for a moment, the request is completed and its result reported."""
    monkeypatch.setattr(publisher_module, "_LINE_TIMEOUT", 0.01)
    responded = trio.Event()
    totals = []

    async def lines():
        yield {"progress": 1}
        await responded.wait()
        yield {"progress": 2}

    def report(total):
        totals.append((total.applied, total.id, total.control))
        responded.set()

    fake = await FakeServer(accepted("e-1", "pause", applied=1), accepted("e-2", applied=1)).start(nursery)
    async with publisher(fake) as p:
        got = await p.ndjson("s", lines(), on_result=report)
    assert totals == [(1, "e-1", "pause"), (2, "e-2", "continue")]
    assert (got.applied, got.id) == (2, "e-2")
    assert len({request.headers["idempotency-key"] for request in fake.requests}) == 2


async def test_ndjson_with_a_key_is_one_request(nursery, monkeypatch):
    """The key covers all lines, so they are not split, however slow or many they are."""
    monkeypatch.setattr(publisher_module, "_LINE_TIMEOUT", 0)
    monkeypatch.setattr(publisher_module, "_MAX_LINES", 1)
    fake = await FakeServer(accepted(applied=3)).start(nursery)
    async with publisher(fake) as p:
        await p.ndjson("s", [{"progress": n} for n in range(3)], key="k")
    assert fake.requests[0].headers["idempotency-key"] == "k"
    assert fake.requests[0].body.count(b"\n") == 3


async def test_ndjson_is_split_by_size(nursery, monkeypatch):
    """The memory for retries is bounded."""
    monkeypatch.setattr(publisher_module, "_MAX_LINES", 2)
    fake = await FakeServer(accepted("e-2", applied=2), accepted("e-3", applied=1)).start(nursery)
    async with publisher(fake) as p:
        assert (await p.ndjson("s", [{"progress": n} for n in range(3)])).applied == 3
    assert [request.body.count(b"\n") for request in fake.requests] == [2, 1]


async def test_ndjson_numbers_lines_across_requests(nursery, monkeypatch):
    """Lines are counted over all requests, including empty lines."""
    monkeypatch.setattr(publisher_module, "_MAX_LINES", 1)
    bad = respond_error(422, "invalid", "no number", line=2, applied=0)
    fake = await FakeServer(accepted(applied=1), bad).start(nursery)
    async with publisher(fake) as p:
        with pytest.raises(RequestRejected, match=r"^line 3: no number$") as caught:
            await p.ndjson("s", ['{"progress":1}', "", '{"progress":"x"}', '{"progress":3}'])
    assert (caught.value.line, caught.value.applied) == (3, 1)
    assert fake.requests[1].body == b'\n{"progress":"x"}\n'


async def test_ndjson_retry_sends_the_same_lines(nursery, monkeypatch):
    """A retry sends the same lines and no more; later lines are in the next request."""
    monkeypatch.setattr(publisher_module, "_LINE_TIMEOUT", math.inf)
    disconnect = trio.Event()

    async def handler(stream, request):
        await read_body(stream, request, chunks=1)
        reset_on_close(stream)
        await trio.aclose_forcefully(stream)
        disconnect.set()

    async def lines():
        yield {"progress": 1}
        await disconnect.wait()
        yield {"progress": 2}
        yield {"progress": 3}

    fake = await FakeServer(handler, accepted("e-2", applied=2), accepted("e-3", applied=1)).start(nursery)
    async with publisher(fake) as p, no_unclosed_generators():
        await p.ndjson("s", lines())
    first, again, rest = fake.requests
    assert first.headers["idempotency-key"] == again.headers["idempotency-key"]
    assert again.body.startswith(first.body)
    assert again.body + rest.body == b'{"progress":1}\n{"progress":2}\n{"progress":3}\n'


async def test_ndjson_rejected_while_it_is_sent(nursery, monkeypatch):
    """A server that responds early and closes is noticed when the next line cannot be sent."""
    monkeypatch.setattr(publisher_module, "_LINE_TIMEOUT", math.inf)
    closed = trio.Event()

    async def handler(stream, request):
        await read_body(stream, request, chunks=1)
        await respond(422, {"error": {"code": "invalid", "message": "no", "line": 1}}, "X: y")(
            stream, msgspec.structs.replace(request, method="GET")
        )
        await stream.aclose()
        closed.set()

    async def lines():
        yield {"progress": 1}
        await closed.wait()
        while True:
            yield {"progress": 2}

    again = respond_error(422, "invalid", "no", line=1)
    fake = await FakeServer(handler, again).start(nursery)
    async with publisher(fake) as p, no_unclosed_generators():
        with pytest.raises(RequestRejected, match="line 1: no"):
            await p.ndjson("s", lines())


async def test_ndjson_errors_of_the_source_are_not_wrapped(nursery):
    """What the iterable raises is not wrapped in an exception group."""

    def lines():
        yield "{}"
        raise KeyError

    fake = await FakeServer(accepted()).start(nursery)
    async with publisher(fake) as p, no_unclosed_generators():
        with pytest.raises(KeyError):
            await p.ndjson("s", lines())


async def test_ndjson_line_with_a_line_break(nursery):
    """It would be two lines, and the line numbers would be wrong."""
    fake = await FakeServer(accepted()).start(nursery)
    async with publisher(fake) as p:
        with pytest.raises(ValueError, match="line break"):
            await p.ndjson("s", ["{}\n{}"])


# With a real server


@every_transport
async def test_real_server(transport):
    """A session has the same messages over every transport, and can be resumed over any other."""
    async with serve(port=0) as server, Publisher(server.url) as p:
        await p.progress("s", progress=10, stage="read")
        got = []
        async with watch(server.url, "s", transport=transport) as messages:
            got.append(await anext(messages))
            await p.ndjson("s", [{"type": "note", "data": {"n": 1}}, {"progress": 50}])
            got.append(await anext(messages))
            await p.progress("s", status="done")
            got += [message async for message in messages]
        assert [message.event for message in got] == ["progress", "note", "progress", "complete"]
        with pytest.raises(SessionFinished):
            await p.progress("s", progress=99)
        for other in TRANSPORTS:
            async with watch(server.url, "s", transport=other, cursor=got[1].id) as messages:
                resumed, *rest = [message async for message in messages]
            assert resumed == ReceivedMessage(got[1].id, "resume", {"status": "ok", "missed": 0})
            assert rest == got[2:]
            async with watch(server.url, "s", transport=other, cursor=got[-1].id) as messages:
                assert [message.event async for message in messages] == ["resume"]
            async with watch(server.url, "s", transport=other) as messages:
                assert [message async for message in messages] == got[-1:]


async def test_real_server_applies_a_batch_once():
    """A batch with one key is applied once, however often it is sent."""
    lines = [{"type": "note", "data": n} for n in range(5)]
    async with serve(port=0) as server, Publisher(server.url) as p:
        for _ in range(2):
            assert (await p.ndjson("s", lines, key="k")).applied == 5
        assert (await p.progress("s", status="done")).id.endswith("-6")


def test_public_names():
    """Every name in ``__all__`` exists."""
    for name in client.__all__:
        assert hasattr(client, name)
