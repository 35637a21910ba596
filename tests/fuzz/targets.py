"""What the hostile client sends, by target: valid inputs, and the pieces that others are made of."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import hpack
from hypothesis import strategies as st
from raw_client import HANDSHAKE, chunk, request_bytes
from world import HOSTILE_TOKEN, TICKETS, Script, Step

__all__ = ["TARGETS", "Target", "scripts"]

TOKEN = ("Authorization", f"Bearer {HOSTILE_TOKEN}")
LINES = ("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Target(NamedTuple):
    """Valid inputs of one kind, which are changed, and pieces that are put together."""

    seeds: tuple[bytes, ...]
    pieces: tuple[bytes, ...]
    settings: Mapping[str, Any] = MappingProxyType({})  # of the server


def get(target: str, *headers: tuple[str, str]) -> bytes:
    return request_bytes("GET", target, headers=[TOKEN, *headers])


def publish(target: str, body: bytes, *headers: tuple[str, str]) -> bytes:
    return request_bytes("POST", target, body, [TOKEN, *headers])


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Encode a frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack("!I", len(payload))[1:] + bytes((kind, flags)) + struct.pack("!I", stream) + payload


def head(method: str, path: str, *more: tuple[str, str]) -> bytes:
    """Encode the header fields of a request, without the dynamic table."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    fields = [(":method", method), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
    return encoder.encode([*fields, (TOKEN[0].lower(), TOKEN[1]), *more])


def message(opcode: int, payload: bytes = b"", *, final: bool = True) -> bytes:
    """Encode a client's frame of a WebSocket, with a mask of zeros."""
    return bytes((opcode | 0x80 * final, 0x80 | len(payload))) + bytes(4) + payload


SOCKET = request_bytes("GET", "/api/sessions/a-1/status/ws", headers=[TOKEN, *HANDSHAKE])
STREAM = get("/api/sessions/a-1/status/stream")
PROGRESS = publish("/api/sessions/a-1/progress", b'{"progress": 7}')
SMALL = tuple(bytes((byte,)) for byte in (0, 9, 10, 13, 32, 34, 37, 44, 47, 58, 59, 61, 63, 127, 128, 255))

HEADS = Target(
    (PROGRESS, STREAM, SOCKET, get("/api/sessions?limit=5"), get("/api/sessions/a-1/status?wait=1")),
    (
        *SMALL,
        *(b"GET ", b"POST ", b"HEAD ", b"OPTIONS ", b"DELETE ", b"PRI ", b"CONNECT ", b"get "),
        *(b"/api/sessions/a-1/progress", b"/api/sessions/a-1", b"/api/sessions/b-1", b"/", b"*", b"//", b"%"),
        *(b"/api/sessions/%00/status", b"/api/sessions/a%2f..%2fb-1/status", b"http://localhost/health"),
        *(b"?wait=", b"?limit=", b"?after=", b"1e400", b"nan", b"-1", b"9" * 40, b"&", b"?session=a-1"),
        *(
            b" HTTP/1.1\r\n",
            b" HTTP/1.0\r\n",
            b" HTTP/2.0\r\n",
            b" HTTP/0.9\r\n",
            b"\r\n",
            b"\r\n\r\n",
            b"\n",
        ),
        *(
            b"Host: localhost\r\n",
            b"Host: b\r\n",
            b"Host:\r\n",
            b"Host: [::1\r\n",
            b"Host: localhost:99999\r\n",
        ),
        *(b"Content-Length: 15\r\n", b"Content-Length: 0\r\n", b"Content-Length: -1\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Connection: close\r\n"),
        *(b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\n", b"Connection: Upgrade\r\n", b"X: \xff\r\n"),
        *(b"Origin: null\r\n", b"Origin: http://localhost\r\n", b"Sec-Fetch-Site: cross-site\r\n"),
        *(b"Content-Type: application/json\r\n", b"Content-Type: application/x-ndjson\r\n"),
        *(
            b"Idempotency-Key: 1\r\n",
            b"Idempotency-Key:\r\n",
            b"X-Request-ID: \x7f\r\n",
            b"If-None-Match: *\r\n",
        ),
        *(b'{"progress": 7}', b"f\r\n", b"0\r\n\r\n", request_bytes("GET", "/health"), PREFACE),
        b"Authorization: Bearer " + HOSTILE_TOKEN.encode() + b"\r\n",
    ),
)
FRAMES = Target(
    (
        SOCKET + message(1, b"hello") + message(9, b"ping") + message(8, b"\x03\xe8"),
        SOCKET + message(1, b"a", final=False) + message(0, b"b"),
    ),
    (
        *(
            SOCKET,
            message(1, b"text"),
            message(1, b"\xff"),
            message(2, b"\0"),
            message(0),
            message(1, b"a", final=False),
        ),
        *(
            message(8),
            message(8, b"\x03"),
            message(8, b"\x03\xe8bye"),
            message(8, b"\x03\xed"),
            message(9, b"p" * 125),
        ),
        *(
            message(10),
            message(3),
            message(11),
            b"\x81\x05hello",
            b"\x81\xfe\xff\xff",
            b"\x81\xff" + b"\xff" * 8,
        ),
        *(b"\xf1\x80\0\0\0\0", b"\x89\xfe\x00\x7e", b"\x01", PROGRESS, b"\x88\x80", bytes(5000)),
    ),
)
LINES_HEAD = publish("/api/sessions/a-2/events", b"", *LINES)
NDJSON = Target(
    (
        LINES_HEAD + chunk(b'{"type":"x","data":1}\n{"type":"y"}\n') + chunk(b""),
        LINES_HEAD + chunk(b'{"progress": 5}\n') + chunk(b'{"status":"done"}\n') + chunk(b"") + PROGRESS,
    ),
    (
        *(
            LINES_HEAD,
            PROGRESS,
            chunk(b""),
            chunk(b"\n"),
            chunk(b"\n\n\r\n"),
            chunk(b"{}\n"),
            chunk(b"[]\n"),
            chunk(b"{"),
        ),
        *(
            chunk(b'{"type":"x"}\n'),
            chunk(b'{"type":"x"}'),
            chunk(b'{"type":"progress"}\n'),
            chunk(b'{"type":1}\n'),
        ),
        *(
            chunk(b'{"type":"x","data":' + b"[" * 600),
            chunk(b'{"progress": 1e999}\n'),
            chunk(b'{"progress":-1}\n'),
        ),
        *(chunk(b'{"type":"x","data":"\\ud800"}\n'), chunk(b'{"type":"\xff"}\n'), chunk(b"\xef\xbb\xbf{}\n")),
        *(
            chunk(b'{"status":"done"}\n'),
            chunk(b'{"type":"x","data":"' + b"y" * 9000 + b'"}\n'),
            b"\r\n",
            b"zz\r\n",
            *SMALL,
        ),
        publish("/api/sessions/a-2/events", b"", *LINES, ("Idempotency-Key", "k")),
    ),
)
_CURSORS = (
    *(
        "",
        "-",
        "x",
        "x-0",
        "00000000-1",
        "-1",
        "1-",
        "0-18446744073709551616",
        "a" * 5000,
        "*",
        "\xff",
        "%00",
        "a b",
    ),
    *(
        "00000000-0,00000001-1",
        ",",
        ",,,",
        "=",
        "eyJ9",
        "9" * 400,
        "00000000-0x1",
        "00000000-+1",
        "00000000- 1",
    ),
)
_WATCHES = (
    *("/api/sessions/a-1/status/stream", "/api/streams?session=a-1&session=a-2", "/api/streams?session=a-1"),
    *("/api/jobs/a-1/events", "/api/v1/jobs/a-1/events", "/api/interaction/events/a-1"),
)
CURSORS = Target(
    (
        *(get(path, ("Last-Event-ID", "00000000-1")) for path in _WATCHES),
        *(get(f"/api/sessions/a-1/events?{name}=00000000-1&limit=2") for name in ("after", "last_event_id")),
        get("/api/sessions?after=AAAA&limit=1"),
        request_bytes(
            "GET", "/api/sessions/a-1/status/ws?last_event_id=00000000-1", headers=[TOKEN, *HANDSHAKE]
        ),
    ),
    (
        *(
            get(path, ("Last-Event-ID", cursor))
            for path in _WATCHES[:2]
            for cursor in _CURSORS
            if cursor.isascii()
        ),
        *(
            get(f"{path}?{name}={cursor}".replace(" ", "%20"))
            for path in ("/api/sessions/a-1/events", "/api/sessions", "/api/sessions/a-1/status/stream")
            for name in ("after", "last_event_id", "lastEventId")
            for cursor in _CURSORS
            if cursor.isascii()
        ),
        *SMALL,
    ),
)
_JWT = HOSTILE_TOKEN.encode()
_HEADER, _CLAIMS, _SIGNATURE = _JWT.split(b".")
TOKENS = Target(
    (get("/api/sessions/b-1/status"), get("/api/sessions/a-1/status"), SOCKET, STREAM),
    (
        *(
            b"GET /api/sessions/b-1/status HTTP/1.1\r\nHost: localhost\r\n",
            b"GET /api/sessions HTTP/1.1\r\nHost: localhost\r\n",
        ),
        *(
            b"Authorization: ",
            b"Bearer ",
            b"bearer ",
            b"Basic ",
            b"Cookie: __Host-sseserve=",
            b"; ",
            b"\r\n",
            b"\r\n\r\n",
        ),
        *(
            _JWT,
            _HEADER,
            _CLAIMS,
            _SIGNATURE,
            b".",
            b"..",
            b"eyJhbGciOiJub25lIn0",
            b"eyJhbGciOiJIUzI1NiIsImtpZCI6Ii4uLyJ9",
        ),
        *(b"e30", b"=", b"==", b"-", b"_", b"+", b"/", b"A" * 4000, b"W10", b"bnVsbA", *SMALL),
    ),
)
_H = head("GET", "/api/sessions/a-1/status/stream")
_P = head("POST", "/api/sessions/a-1/progress", ("content-type", "application/json"))
_C = head("CONNECT", "/api/sessions/a-1/status/ws", (":protocol", "websocket"))
HTTP2 = Target(
    (
        PREFACE + frame(4) + frame(1, 5, 1, _H),
        PREFACE + frame(4) + frame(1, 4, 1, _P) + frame(0, 1, 1, b'{"progress": 7}') + frame(1, 5, 3, _H),
        PREFACE + frame(4) + frame(1, 1, 1, _H[:9]) + frame(9, 4, 1, _H[9:]) + frame(3, 0, 1, bytes(4)),
    ),
    (
        *(
            PREFACE,
            frame(4),
            frame(4, 1),
            frame(4, 0, 0, bytes(6)),
            frame(4, 0, 0, b"\0\4\0\0\0\0"),
            frame(4, 0, 0, b"\0\4\xff\xff\xff\xff"),
        ),
        *(frame(1, 5, number, _H) for number in (0, 1, 2, 3, 5)),
        *(frame(1, 4, number, _P) for number in (1, 3, 5)),
        *(
            frame(1, 4, 7, _C),
            frame(1, 5, 9, head("GET", "/")),
            frame(1, 5, 11, head("GET", "", ("content-length", "5"))),
        ),
        *(
            frame(1, 5, 13, head("POST", "/api/sessions/a-1/progress", ("content-length", "9")))[:n]
            for n in (12, 200)
        ),
        *(frame(1, 4, 15, head("POST", "/api/sessions/a-1/progress", ("host", "b"), ("x", "a\r\nb: c"))),),
        *(
            frame(1, 1, 1, _H[:9]),
            frame(9, 4, 1, _H[9:]),
            frame(9, 0, 1),
            frame(9, 4, 3, _H),
            frame(1, 5, 1, b"\xff" * 9),
        ),
        *(frame(0, flags, number, b'{"progress": 7}') for flags in (0, 1, 8) for number in (0, 1, 3, 7)),
        *(frame(0, 0, 7, message(1, b"hi")), frame(0, 0, 7, message(8)), frame(0, 1, 7)),
        *(frame(3, 0, number, bytes(4)) for number in (0, 1, 3, 7)),
        *(
            frame(8, 0, number, size)
            for number in (0, 1, 3)
            for size in (bytes(4), b"\0\0\0\1", b"\x7f\xff\xff\xff")
        ),
        *(
            frame(6, 0, 0, bytes(8)),
            frame(6, 0, 0, b"x"),
            frame(7, 0, 0, bytes(8)),
            frame(2, 0, 1, bytes(5)),
            frame(5, 4, 1, bytes(4)),
        ),
        *(frame(99, 255, 1, b"x"), b"\0\xff\xff", b"\xff\xff\xff\0\0\0\0\0\0", *SMALL[:4]),
    ),
)
HAND_OVER = Target(
    (
        PROGRESS + STREAM + PROGRESS,
        PROGRESS + SOCKET + message(9, b"p") + message(8, b"\x03\xe8"),
        get("/health") + PREFACE + frame(4),
        PREFACE + frame(4) + frame(1, 5, 1, _H) + PROGRESS,
        get("/api/sessions/a-1/status?wait=1") + PROGRESS + SOCKET,
        publish("/nothing", b"x" * 100) + STREAM,
    ),
    (
        PROGRESS,
        STREAM,
        SOCKET,
        PREFACE,
        frame(4),
        frame(1, 5, 1, _H),
        message(9, b"p"),
        message(8),
        *SMALL[:5],
        b"x" * 300,
    ),
)
MAKE_TICKET = publish("/api/tickets", b'{"sessions": ["a-1"]}')


def with_ticket(ticket: str, path: str = "/api/sessions/a-1/status/stream") -> bytes:
    return request_bytes("GET", f"{path}?ticket={ticket}", headers=HANDSHAKE if path.endswith("/ws") else ())


TICKET = Target(
    (
        MAKE_TICKET + with_ticket(TICKETS[0]),
        MAKE_TICKET * 2 + with_ticket(TICKETS[1], "/api/sessions/a-1/status/ws"),
        MAKE_TICKET + with_ticket(TICKETS[0], "/api/sessions/b-1/status/stream"),
        publish("/api/tickets", b'{"sessions": [], "list": true}')
        + with_ticket(TICKETS[0], "/api/streams/sessions"),
    ),
    (
        *(
            MAKE_TICKET,
            publish("/api/tickets", b'{"sessions": ["b-1"]}'),
            publish("/api/tickets", b'{"list": 1}'),
        ),
        *(
            publish("/api/tickets", body)
            for body in (b"", b"[]", b"{", b'{"sessions": [1]}', b'{"sessions": "a"}')
        ),
        publish("/api/tickets", b'{"sessions": [' + b",".join([b'"a-1"'] * 200) + b"]}"),
        *(with_ticket(ticket) for ticket in (*TICKETS[:2], "", "x", "%00", "a" * 5000, "%ff", "&ticket=x")),
        *(with_ticket(ticket, "/api/sessions/b-1/status/stream") for ticket in TICKETS[:2]),
        *(with_ticket(ticket, "/api/streams") for ticket in TICKETS[:2]),
        with_ticket(TICKETS[0] + "&session=a-1&session=b-1", "/api/streams"),
        with_ticket(TICKETS[0], "/api/sessions/a-1/status"),
        *(publish("/api/tokens/refresh", b""), publish("/api/revocations", b'{"subject": "honest"}')),
        *(publish("/api/revocations", b'{"token_id": "x"}'), *SMALL),
    ),
)
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_ADDRESSES = bytes((10, 0, 0, 1, 10, 0, 0, 2, 0, 80, 0, 81))
_V1 = b"PROXY TCP4 10.0.0.1 10.0.0.2 80 81\r\n"
PROXY = Target(
    (
        _V1 + PROGRESS,
        _V2 + b"\x21\x11\0\x0c" + _ADDRESSES + STREAM,
        _V2 + b"\x21\x21\0\x24" + bytes(36) + SOCKET,
        _V2 + b"\x20\0\0\0" + PREFACE + frame(4) + frame(1, 5, 1, _H),
        b"PROXY UNKNOWN\r\n" + PROGRESS,
    ),
    (
        *(
            _V1,
            _V2,
            b"PROXY ",
            b"TCP4 ",
            b"TCP6 ",
            b"UNKNOWN",
            b"10.0.0.1 ",
            b"::1 ",
            b"80 ",
            b"99999",
            b"\r\n",
            b" ",
        ),
        *(
            b"\x21",
            b"\x11",
            b"\x20",
            b"\x31",
            b"\0\x0c",
            b"\xff\xff",
            _ADDRESSES,
            bytes(36),
            b"x" * 110,
            PROGRESS,
            STREAM,
        ),
        *SMALL,
    ),
    MappingProxyType({"trusted_proxies": ("127.0.0.1",), "proxy_header": "proxy-protocol"}),
)
TARGETS: dict[str, Target] = {
    "heads": HEADS,
    "frames": FRAMES,
    "ndjson": NDJSON,
    "cursors": CURSORS,
    "tokens": TOKENS,
    "http2": HTTP2,
    "hand-over": HAND_OVER,
    "tickets": TICKET,
    "proxy": PROXY,
}


@st.composite
def _changed(draw: st.DrawFn, target: Target) -> bytes:
    """A valid input with a few changes."""
    data = draw(st.sampled_from(target.seeds))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        removed = draw(st.integers(0, 8))
        data = data[:at] + draw(st.binary(max_size=4) | st.sampled_from(target.pieces)) + data[at + removed :]
    return data


@st.composite
def scripts(draw: st.DrawFn, target: Target) -> Script:
    """Scripts of a target: its inputs on one or two connections, in pieces, with pauses, ends and closes."""
    pieces = st.lists(st.sampled_from(target.pieces), min_size=1, max_size=10).map(b"".join)
    steps: list[Step] = []
    for number in range(draw(st.integers(1, 2))):
        data = draw(_changed(target) | pieces)
        cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
        steps += [
            Step("send", number, data[start:end])
            for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)
        ]
        if draw(st.booleans()):
            steps.append(Step(draw(st.sampled_from(["end", "close", "wait"])), number))
    # Those of two connections take turns.
    return tuple(draw(st.permutations(steps)) if draw(st.booleans()) and len(steps) < 5 else steps)
