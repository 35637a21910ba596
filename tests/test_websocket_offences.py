"""A client that breaks the WebSocket protocol is told so by a close frame (RFC 6455, section 7.1.7)."""

from __future__ import annotations

import logging
import struct

import pytest
import trio
import trio.testing
from harness import ServerHarness
from live_harness import socket_streams
from raw_client import HANDSHAKE, RawConnection, RawWebSocket, frame, request_bytes

SOCKET = request_bytes("GET", "/api/sessions/a/status/ws", headers=HANDSHAKE)
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
PROTOCOL_ERROR, NOT_UTF8, TOO_LARGE = 1002, 1007, 1009  # section 7.4.1


def with_length(first: int, size: bytes, payload: bytes = b"") -> bytes:
    """A frame whose length is written as it should not be."""
    return bytes((first,)) + size + b"\0\0\0\0" + payload


def close(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, struct.pack("!H", code) + reason)


OFFENCES: dict[str, tuple[bytes, int]] = {
    # Section 5.2
    **{f"reserved bit {bit:#x}": (frame(TEXT | bit, b"a"), PROTOCOL_ERROR) for bit in (0x40, 0x20, 0x10)},
    **{f"reserved bit of a ping {bit:#x}": (frame(PING | bit), PROTOCOL_ERROR) for bit in (0x40, 0x20, 0x10)},
    **{f"opcode {opcode:#x}": (frame(opcode), PROTOCOL_ERROR) for opcode in (3, 4, 5, 6, 7)},
    **{f"opcode {opcode:#x}": (frame(opcode), PROTOCOL_ERROR) for opcode in (11, 12, 13, 14, 15)},
    "a length of 125 in 2 bytes": (with_length(0x82, b"\xfe\0\x7d", b"x" * 125), PROTOCOL_ERROR),
    "a length of 125 in 8 bytes": (with_length(0x82, b"\xff" + b"\0" * 7 + b"\x7d"), PROTOCOL_ERROR),
    "noise": (b"\xff" * 100, PROTOCOL_ERROR),
    "a length of 64 bits": (with_length(0x82, b"\xff\x80" + b"\0" * 7), PROTOCOL_ERROR),
    # Section 5.1
    **{
        f"unmasked {opcode:#x}": (frame(opcode, payload, masked=False), PROTOCOL_ERROR)
        for opcode, payload in ((TEXT, b"a"), (BINARY, b""), (PING, b""), (CLOSE, b"\x03\xe8"))
    },
    # Section 5.4
    "continuation without a start": (frame(0, b"a"), PROTOCOL_ERROR),
    "continuation after the end": (frame(TEXT, b"a") + frame(0, b"b"), PROTOCOL_ERROR),
    "text within fragments": (frame(TEXT, b"a", final=False) + frame(TEXT, b"b"), PROTOCOL_ERROR),
    "binary within fragments": (frame(TEXT, b"a", final=False) + frame(BINARY, b"b"), PROTOCOL_ERROR),
    # Section 5.5
    "fragmented ping": (frame(PING, b"a", final=False), PROTOCOL_ERROR),
    "fragmented pong": (frame(PONG, b"a", final=False), PROTOCOL_ERROR),
    "fragmented close": (frame(CLOSE, b"\x03\xe8", final=False), PROTOCOL_ERROR),
    "ping of 126 bytes": (frame(PING, b"x" * 126), PROTOCOL_ERROR),
    "close of 126 bytes": (close(1000, b"x" * 124), PROTOCOL_ERROR),
    # Sections 5.5.1 and 7.4
    "close of 1 byte": (frame(CLOSE, b"\x03"), PROTOCOL_ERROR),
    **{
        f"close code {code}": (close(code), PROTOCOL_ERROR)
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535)
    },
    "reason is not UTF-8": (close(1000, b"\xff"), NOT_UTF8),
    "reason ends within a character": (close(1000, "é".encode()[:1]), NOT_UTF8),
    # Section 8.1
    "text is not UTF-8": (frame(TEXT, b"a\xff"), NOT_UTF8),
    "text has a surrogate": (frame(TEXT, b"\xed\xa0\x80"), NOT_UTF8),
    "text ends within a character": (frame(TEXT, "é".encode()[:1]), NOT_UTF8),
    "fragment is not UTF-8": (frame(TEXT, b"a", final=False) + frame(0, b"\xff", final=False), NOT_UTF8),
    "character broken by fragments": (frame(TEXT, b"\xc3", final=False) + frame(0, b"a"), NOT_UTF8),
    "fragments end within a character": (frame(TEXT, b"a", final=False) + frame(0, b"\xc3"), NOT_UTF8),
    # Section 10.4
    "text of 5000 bytes": (frame(TEXT, b"x" * 5000), TOO_LARGE),
    "fragments of 5000 bytes": (frame(TEXT, b"x" * 2500, final=False) + frame(0, b"x" * 2500), TOO_LARGE),
}
offences = pytest.mark.parametrize(("data", "code"), OFFENCES.values(), ids=OFFENCES)


@pytest.fixture
async def server(autojump_clock, nursery):
    server = ServerHarness(nursery)
    await server.tracker.update("a", progress=1)
    return server


async def check_failed(connection: RawConnection, code: int) -> None:
    """Check that the close frame comes next, with the code and a reason, and then the end."""
    opcode, payload = await RawWebSocket(connection).frame()
    assert (opcode, *struct.unpack("!H", payload[:2])) == (CLOSE, code)
    assert payload[2:].decode()
    assert await connection.read_to_end() == b""
    assert connection.ended == "eof"


@offences
async def test_an_offence_is_answered_by_a_close_frame(server, caplog, data, code):
    """In one piece and byte by byte; nothing comes after it, and nothing is logged as a problem."""
    for size in (len(data), 1 if code != TOO_LARGE else 4000):
        socket = await RawWebSocket.open(server.connect(), "a")
        await socket.message()
        for at in range(0, len(data), size):
            await socket.connection.send(data[at : at + size])
        await trio.testing.wait_all_tasks_blocked()
        await server.tracker.emit("a", "x", 1)
        await check_failed(socket.connection, code)
        assert server.broker.statistics().subscribers == 0
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("data", "answers"),
    [
        (b"", {TEXT}),
        (frame(TEXT, b"a") + frame(PING, b"b"), {TEXT, PONG}),
        (frame(TEXT, b"\xff"), {TEXT, CLOSE}),
    ],
    ids=["none", "valid", "invalid"],
)
async def test_frames_before_the_handshake_are_read_after_it(server, caplog, data, answers):
    """A client may not send them (section 4.1), but they are no reason to refuse it."""
    connection = server.connect()
    await connection.send(SOCKET + data)
    assert (await connection.read_head()).status == 101
    socket = RawWebSocket(connection)
    assert {(await socket.frame())[0] for _ in answers} == answers
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("end", [close(1000), close(1002), close(3000, b"bye"), close(4999), frame(CLOSE)])
async def test_a_valid_close_frame_is_echoed(server, end):
    """With its code, also if that is one that says that we broke the protocol (section 5.5.1)."""
    socket = await RawWebSocket.open(server.connect(), "a")
    await socket.message()
    await socket.connection.send(end)
    opcode, payload = await socket.frame()
    sent = bytes(byte ^ end[2 + i % 4] for i, byte in enumerate(end[6:]))
    assert (opcode, payload[:2]) == (CLOSE, sent[:2])
    assert await socket.connection.read_to_end() == b""


@pytest.mark.parametrize("data", [frame(TEXT, b"\xff"), close(1000), frame(3)])
async def test_there_is_one_close_frame(server, data):
    """What a client sends at the moment in which the session ends is not answered by another one."""
    socket = await RawWebSocket.open(server.connect(), "a")
    await socket.message()
    await server.tracker.update("a", status="done")
    await socket.connection.send(data)
    assert (await socket.frame())[0] == TEXT
    assert (await socket.frame())[0] == CLOSE
    assert await socket.connection.read_to_end() == b""


async def test_a_client_that_does_not_read_its_close_frame(autojump_clock, nursery):
    """It costs no more than the send timeout."""
    server = ServerHarness(nursery, send_timeout=5)
    await server.tracker.update("a", progress=1)
    ours, theirs = socket_streams()
    closed = trio.Event()

    async def serve() -> None:
        await server.app.connections.serve(ours)
        closed.set()

    nursery.start_soon(serve)
    socket = await RawWebSocket.open(RawConnection(theirs), "a")
    await socket.message()
    while not server.broker.subscribers()[0].has_backlog:
        await server.tracker.emit("a", "x", "y" * 500)
        await trio.testing.wait_all_tasks_blocked()
    await socket.connection.send(frame(3))
    with trio.fail_after(7):
        await closed.wait()
    await theirs.aclose()
