"""Requests that two parsers may divide differently: what is a body for one must be no request for the other.

Each case has a marked request where only a wrong parser finds one: it must not be executed. Behind nginx and
HAProxy, whose clients share connections to the server, every client must get the response to its own request.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from typing import NamedTuple

import pytest
import trio
from harness import ServerHarness
from processes import run_server
from raw_client import HANDSHAKE, RawConnection, chunk, connect, get, post, request_bytes
from reverse_proxies import CONFIGURATIONS, run_proxy
from trio.testing import wait_all_tasks_blocked

JSON = b'{"progress": 7}'
CHUNKED = chunk(JSON) + chunk(b"")
MARK = b"smuggled-00"
MARKED = request_bytes(
    "POST", f"/api/sessions/{MARK.decode()}/progress", JSON, [("X-Request-ID", MARK.decode())]
)


class Case(NamedTuple):
    """A request; the statuses that it may get; whether the connection ends with it."""

    data: bytes
    statuses: set[int]
    ends: bool = True


def request(
    fields: bytes, body: bytes = b"", target: bytes = b"/api/sessions/a/progress", method: bytes = b"POST"
) -> bytes:
    first = b"%b %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % (method, target)
    return first + fields + b"\r\n" + body


def length(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n" % len(body)


TE = b"Transfer-Encoding: chunked\r\n"
BAD = {400, 501}
DONE = {202}
CASES: dict[str, Case] = {
    # Two lengths
    "CL.TE": Case(request(length(CHUNKED + MARKED) + TE, CHUNKED + MARKED), DONE),
    "TE.CL": Case(request(TE + b"Content-Length: 4\r\n", CHUNKED + MARKED), DONE),
    "TE.TE": Case(request(TE + b"Transfer-Encoding: identity\r\n", CHUNKED + MARKED), BAD),
    "TE twice": Case(request(b"Transfer-Encoding: chunked, chunked\r\n", CHUNKED + MARKED), BAD),
    "TE xchunked": Case(request(b"Transfer-Encoding: xchunked\r\n" + length(MARKED), MARKED), BAD),
    "TE identity": Case(request(b"Transfer-Encoding: identity\r\n" + length(MARKED), MARKED), BAD),
    "TE vertical tab": Case(request(b"Transfer-Encoding: \x0bchunked\r\n" + length(MARKED), MARKED), BAD),
    "TE quoted": Case(request(b'Transfer-Encoding: "chunked"\r\n' + length(MARKED), MARKED), BAD),
    "TE space before colon": Case(request(b"Transfer-Encoding : chunked\r\n" + length(MARKED), MARKED), BAD),
    "TE folded": Case(
        request(b"Transfer-Encoding:\r\n chunked\r\n" + length(MARKED), CHUNKED + MARKED), DONE
    ),
    "TE underscore": Case(
        request(b"Transfer_Encoding: chunked\r\n" + length(MARKED), MARKED), {400}, ends=False
    ),
    "TE of HTTP/1.0": Case(request(TE, CHUNKED + MARKED).replace(b"HTTP/1.1", b"HTTP/1.0", 1), DONE),
    "CL twice, the same": Case(request(length(JSON) * 2, JSON), DONE, ends=False),
    "CL twice, different": Case(request(length(JSON) + length(MARKED), JSON + MARKED), BAD),
    "CL list": Case(request(b"Content-Length: 15, 16\r\n", JSON + MARKED), BAD),
    "CL sign": Case(request(b"Content-Length: +15\r\n", JSON + MARKED), BAD),
    "CL negative": Case(request(b"Content-Length: -15\r\n", JSON + MARKED), BAD),
    "CL space": Case(request(b"Content-Length: 1 5\r\n", JSON + MARKED), BAD),
    "CL hexadecimal": Case(request(b"Content-Length: 0xf\r\n", JSON + MARKED), BAD),
    "CL underscore": Case(request(b"Content-Length: 1_5\r\n", JSON + MARKED), BAD),
    "CL other digits": Case(request("Content-Length: \uff11\uff15\r\n".encode(), JSON + MARKED), BAD),
    "CL empty": Case(request(b"Content-Length:\r\n", JSON + MARKED), BAD),
    "CL long": Case(request(b"Content-Length: %b\r\n" % (b"9" * 30), JSON + MARKED), BAD),
    "CL space before colon": Case(request(b"Content-Length : 15\r\n", JSON + MARKED), BAD),
    # Chunks
    "chunk extension": Case(request(TE, b"f;a=b\r\n%b\r\n0;c\r\n\r\n" % JSON), DONE, ends=False),
    "chunk extension, LF": Case(request(TE, b"f;a\n%b\r\n0\r\n\r\n" % JSON + MARKED), BAD),
    "chunk size, LF": Case(request(TE, b"f\n%b\r\n0\r\n\r\n" % JSON + MARKED), BAD),
    "chunk without CRLF": Case(request(TE, b"f\r\n%bXX0\r\n\r\n" % JSON + MARKED), BAD),
    "chunk size 0x": Case(request(TE, b"0xf\r\n%b\r\n0\r\n\r\n" % JSON + MARKED), BAD),
    "chunk size, sign": Case(request(TE, b"+f\r\n%b\r\n0\r\n\r\n" % JSON + MARKED), BAD),
    "chunk size, 64 bits": Case(request(TE, b"1%bf\r\n%b\r\n0\r\n\r\n" % (b"0" * 20, JSON) + MARKED), BAD),
    "trailers": Case(
        request(TE, b"f\r\n%b\r\n0\r\nContent-Length: 5\r\nHost: x\r\n\r\n" % JSON), DONE, ends=False
    ),
    # Lines
    "CR in a value": Case(
        request(b"X: a\rTransfer-Encoding: chunked\r\n" + length(JSON), JSON + MARKED), BAD
    ),
    "NUL in a value": Case(request(b"X: a\0b\r\n" + length(JSON), JSON + MARKED), BAD),
    "NUL in a name": Case(request(b"X\0: a\r\n" + length(JSON), JSON + MARKED), BAD),
    "NUL in the target": Case(request(length(JSON), JSON + MARKED, b"/api/sessions/a\0/progress"), BAD),
    "space in the target": Case(request(length(JSON), JSON + MARKED, b"/a b"), BAD),
    "folded": Case(request(b"X: a\r\n b\r\n" + length(JSON), JSON), DONE, ends=False),
    "LF for CRLF": Case(request(length(JSON)).replace(b"\r\n", b"\n") + JSON, DONE, ends=False),
    "HTTP/0.9": Case(b"GET /health\r\n\r\n" + MARKED, BAD),
    "HTTP/2 later": Case(request(b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"/health", b"GET"), {200}),
    # Hosts
    "two hosts": Case(request(b"Host: localhost\r\n" + length(JSON), JSON + MARKED), BAD),
    "no host": Case(request(length(JSON), JSON + MARKED).replace(b"Host: localhost\r\n", b""), BAD),
    "host of the target": Case(
        request(length(MARKED), MARKED, b"http://evil.example/api/sessions/a/progress"), {421}, ends=False
    ),
    # Bodies that nobody reads
    "body of a GET": Case(request(length(MARKED), MARKED, b"/health", b"GET"), {200}, ends=False),
    "body of a HEAD": Case(request(length(MARKED), MARKED, b"/health", b"HEAD"), {200}, ends=False),
    "body of a long-poll": Case(
        request(length(MARKED), MARKED, b"/api/sessions/a/status?wait=1", b"GET"), {200, 304}, ends=False
    ),
    "body for nothing": Case(request(length(MARKED), MARKED, b"/nothing"), {404}, ends=False),
    "body of a wrong method": Case(request(length(MARKED), MARKED, b"/health"), {405}, ends=False),
    "body after a 100": Case(
        request(b"Expect: 100-continue\r\n" + length(MARKED), MARKED, b"/nothing"), {404}, ends=False
    ),
    # What takes the connection over
    "body of a stream": Case(
        request(length(MARKED), MARKED, b"/api/sessions/done/status/stream", b"GET"), {200}
    ),
    "request after a stream": Case(request(b"", MARKED, b"/api/sessions/done/status/stream", b"GET"), {200}),
    "body of a refused WebSocket": Case(
        request(
            b"Upgrade: websocket\r\nConnection: Upgrade\r\n" + length(MARKED),
            MARKED,
            b"/api/sessions/a/status/ws",
            b"GET",
        ),
        {426},
    ),
    "request after a WebSocket": Case(
        request_bytes("GET", "/api/sessions/done/status/ws", headers=HANDSHAKE) + MARKED, {101}
    ),
    "upgrade to h2c": Case(
        request(
            b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n"
            + length(MARKED),
            MARKED,
            b"/health",
            b"GET",
        ),
        {200},
        ends=False,
    ),
}


async def read_status(connection: RawConnection) -> int:
    """Read the status of the response; 0: the connection has ended without one."""
    while b"\r\n\r\n" not in connection.buffer:
        if not await connection.receive():
            return 0
    status = int(connection.buffer.split(b" ", 2)[1])
    if status == 100:
        connection.buffer = connection.buffer.partition(b"\r\n\r\n")[2]
        return await read_status(connection)
    return status


@pytest.mark.parametrize("name", CASES)
async def test_a_request_in_a_body_is_not_executed(autojump_clock, nursery, caplog, name):
    """It gets what is expected, and where its end is in doubt, the connection ends."""
    harness = ServerHarness(nursery)
    await harness.tracker.update("a", progress=1)
    await harness.tracker.update("done", status="done")
    case = CASES[name]
    connection = harness.connect()
    await connection.send(case.data)
    assert await read_status(connection) in case.statuses
    await wait_all_tasks_blocked()
    if not case.ends:
        connection.buffer = b""
        await connection.send(request_bytes("GET", "/health", headers=[("X-Request-ID", "next")]))
        while b"X-Request-ID: next\r\n" not in connection.buffer:
            assert await connection.receive()
        await connection.stream.aclose()
    else:
        await connection.read_to_end()
    assert {session.id for session in await harness.tracker.sessions()} == {"a", "done"}
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("split", ["each byte", "halves"])
@pytest.mark.parametrize("name", ["CL.TE", "TE.CL", "body for nothing", "chunk extension, LF"])
async def test_a_request_in_a_body_that_arrives_in_pieces(autojump_clock, nursery, name, split):
    """The pieces change nothing."""
    harness = ServerHarness(nursery)
    case = CASES[name]
    size = 1 if split == "each byte" else len(case.data) // 2 + 1
    connection = harness.connect()
    for at in range(0, len(case.data), size):
        try:
            await connection.send(case.data[at : at + size])
        except trio.BrokenResourceError:
            break
        await wait_all_tasks_blocked()
    assert await read_status(connection) in case.statuses
    await connection.stream.aclose()
    await wait_all_tasks_blocked()
    assert MARK.decode() not in {session.id for session in await harness.tracker.sessions()}


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "data",
    [
        f"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization : Bearer {SECRET}\r\n\r\n",
        f"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {SECRET}\0\r\n\r\n",
        f"GET /api/streams?ticket={SECRET} x HTTP/1.1\r\nHost: localhost\r\n\r\n",
        f"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{SECRET}\r\n\r\n",
    ],
)
async def test_what_cannot_be_parsed_is_not_repeated(autojump_clock, nursery, caplog, data):
    """Neither in the error nor in the log: it may be a token or a ticket."""
    caplog.set_level(logging.DEBUG)
    connection = ServerHarness(nursery).connect()
    await connection.send(data.encode())
    response = await connection.read_response()
    assert response.status == 400
    assert SECRET not in response.error["message"] + caplog.text
    assert "bytearray" not in response.error["message"]


@pytest.mark.parametrize("proxy", ["nginx", "haproxy", "haproxy-default", "haproxy-h2"])
async def test_both_sides_of_a_proxy_see_the_same_requests(tmp_path, proxy):
    """Others who share the proxy's connections get the responses to their own requests.

    A marked request is executed only if the proxy has seen it too: then its response goes to who sent it.
    """
    outputs: dict[str, RawConnection] = {}
    with run_server() as url, run_proxy(tmp_path, CONFIGURATIONS[proxy], url) as (proxy_url, _):
        port = int(proxy_url.rpartition(":")[2])
        assert (await post(port, "/api/sessions/a/progress", {"progress": 1})).status == 202
        assert (await post(port, "/api/sessions/done/progress", {"status": "done"})).status == 202
        async with AsyncExitStack() as opened, trio.open_nursery() as nursery:
            for number, (name, case) in enumerate(CASES.items()):
                mark = f"smuggled-{number:02}"
                connection = outputs[mark] = await connect(port)
                await opened.enter_async_context(connection.stream)
                await connection.send(case.data.replace(MARK, mark.encode()))
                nursery.start_soon(read_all, connection)
                for request_id in (f"first-{number}", f"second-{number}"):
                    response = await get(port, "/api/sessions/a/status", [("X-Request-ID", request_id)])
                    assert (response.status, response.headers["x-request-id"]) == (200, request_id), name
            sessions = (await get(port, "/api/sessions")).json["sessions"]
            executed = {session["session_id"] for session in sessions} - {"a", "done"}
            for mark in executed:
                while mark.encode() not in outputs[mark].buffer:
                    assert outputs[mark].ended is None, f"{mark}: {outputs[mark].buffer!r}"
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    bodies = {f"smuggled-{n:02}" for n, name in enumerate(CASES) if name.startswith("body")}
    assert not executed & bodies


async def read_all(connection: RawConnection) -> None:
    while await connection.receive():
        pass
