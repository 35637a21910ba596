"""Requests that are read without h11: h11 reads them alike, and all that is unusual is left to it."""

from __future__ import annotations

import socket

import h11
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from sseserve.http.messages import Request
from sseserve.live.transport import Transport
from sseserve.server.drain import IdleConnections
from sseserve.server.h1_fast import read_request

MAX_HEAD = 4096


def read_with_h11(data: bytes) -> tuple[Request, bytes, bytes]:
    """Return a request, its body and what follows, as h11 reads them; raises what h11 raises."""
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(data)
    head = parser.next_event()
    assert isinstance(head, h11.Request)
    body = b""
    while isinstance(event := parser.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    request = Request.create(head.method.decode(), head.target.decode(), head.headers, peer="peer")
    return request, body, parser.trailing_data[0]


REQUEST = b"POST /api/sessions/a/events?x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nX:\ty  z\r\n\r\nabcGET"


def test_request():
    """All parts of it, and what follows."""
    request, following = read_request(REQUEST, "192.0.2.1", MAX_HEAD)
    assert (request.method, request.raw_path, request.query) == (
        "POST",
        "/api/sessions/a/events",
        {"x": ""},
    )
    assert dict(request.headers) == {"host": "a", "content-length": "3", "x": "y  z"}
    assert (request.body.take(), following, request.peer) == (b"abc", b"GET", "192.0.2.1")


# Bytes that have a meaning in a request, to be put anywhere in one.
_pieces = [
    *[b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\0", b",", b";", b"/", b"%", b"\x80", b"\x7f", b"0", b"1"],
    *[b"Content-Length: 3\r\n", b"Content-Length: +3\r\n", b"Content-Length: 3, 3\r\n", b"Host: b\r\n"],
    *[b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n"],
    *[b"Upgrade: websocket\r\n", b"Accept: */*\r\n", b"Connection: keep-alive\r\n", b"X: \r\n", b"HTTP/1.0"],
]


@given(
    st.lists(st.tuples(st.integers(0, len(REQUEST)), st.integers(0, 3), st.sampled_from(_pieces)), max_size=4)
)
def test_h11_reads_the_same(changes):
    """However a request is changed: what is read without h11 is what h11 reads."""
    data = REQUEST
    for at, dropped, piece in changes:
        data = data[:at] + piece + data[at + dropped :]
    if (read := read_request(data, "peer", MAX_HEAD)) is None:
        return
    request, following = read
    expected, body, trailing = read_with_h11(data)
    assert (request.method, request.raw_path, request.path, request.query_string) == (
        expected.method,
        expected.raw_path,
        expected.path,
        expected.query_string,
    )
    assert dict(request.headers) == dict(expected.headers)
    assert (request.body.take(), following) == (body, trailing)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(REQUEST[:40], id="part of a request line"),
        pytest.param(REQUEST[:80], id="part of a head"),
        pytest.param(REQUEST[:-4], id="part of a body"),
        pytest.param(REQUEST.replace(b"1.1", b"1.0"), id="HTTP/1.0"),
        pytest.param(REQUEST.replace(b"POST", b"post"), id="unknown method"),
        pytest.param(REQUEST.replace(b"/api", b"http://a/api", 1), id="absolute target"),
        pytest.param(REQUEST.replace(b" HTTP", b"\x80 HTTP"), id="target that is not ASCII"),
        pytest.param(REQUEST.replace(b"Host: a\r\n", b""), id="no host"),
        pytest.param(REQUEST.replace(b"X:", b"Host:"), id="two hosts"),
        pytest.param(REQUEST.replace(b"X:\ty", b"Content-Length: 3"), id="two lengths"),
        pytest.param(REQUEST.replace(b"h: 3", b"h: +3"), id="length with a sign"),
        pytest.param(REQUEST.replace(b"h: 3", b"h: 3,3"), id="list of lengths"),
        pytest.param(REQUEST.replace(b"h: 3", b"h: 00000003"), id="long length"),
        pytest.param(REQUEST.replace(b"X:", b"X :"), id="space before a colon"),
        pytest.param(REQUEST.replace(b"X:", b" X:"), id="folded line"),
        pytest.param(REQUEST.replace(b"X:", b":"), id="empty name"),
        pytest.param(REQUEST.replace(b"y  z", b"y\x80z"), id="value that is not ASCII"),
        pytest.param(REQUEST.replace(b"y  z", b"y\0z"), id="value with NUL"),
        pytest.param(REQUEST.replace(b"y  z", b"y\rz"), id="value with CR"),
        pytest.param(REQUEST.replace(b"y  z", b"y\nz"), id="value with LF"),
        pytest.param(REQUEST.replace(b"\r\n", b"\n"), id="lines without CR"),
        pytest.param(REQUEST.replace(b"X:\ty  z", b"Transfer-Encoding: chunked"), id="transfer coding"),
        pytest.param(REQUEST.replace(b"X:\ty  z", b"Connection: close"), id="connection ends"),
        pytest.param(REQUEST.replace(b"X:\ty  z", b"Expect: 100-continue"), id="expectation"),
        pytest.param(REQUEST.replace(b"X:\ty  z", b"Upgrade: websocket"), id="upgrade"),
        pytest.param(REQUEST.replace(b"y  z", b"y" * MAX_HEAD), id="large head"),
    ],
)
def test_left_to_h11(data):
    """What is incomplete, or not of the usual form."""
    assert read_request(data, "peer", MAX_HEAD) is None


async def test_idle_connections_are_closed_at_their_time(autojump_clock, nursery):
    """Each when it has waited for so long, also one that had a request meanwhile."""
    idle, closed = IdleConnections(10), []
    nursery.start_soon(idle.run)
    began = trio.current_time()

    async def wait(name: str, transport: Transport, *begin_at: float) -> None:
        for at in begin_at:
            idle.begin(transport)
            with trio.move_on_at(began + at):
                try:
                    await transport.receive_later(1)
                except trio.ClosedResourceError:
                    closed.append((name, trio.current_time() - began))
            idle.end(transport)

    peers = []
    async with trio.open_nursery() as waiting:
        for name, begin_at in {"a": (0, 4, 30), "b": (0, 30), "c": (2, 7, 30)}.items():
            ours, theirs = socket.socketpair()
            peers.append(theirs)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            waiting.start_soon(wait, name, Transport(stream), *begin_at)
    assert closed == [("b", 10), ("a", 14), ("c", 17)]
    assert idle.waiting == 0
    for peer in peers:
        peer.close()
