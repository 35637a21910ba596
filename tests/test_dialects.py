"""Encoding over each protocol, and the sessions dialect. The other dialects have their own tests."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_harness import encoding, make_reader
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Ping, TextMessage

from sseserve.dialects import Message, text_message, websocket_text
from sseserve.dialects.interaction import INTERACTION
from sseserve.dialects.jobs import JOBS
from sseserve.dialects.jobs_v1 import JOBS_V1
from sseserve.dialects.sessions import SESSIONS
from sseserve.dialects.transcription import TRANSCRIPTION
from sseserve.http.routes import ROUTES
from sseserve.live.subscriber import EncodedEvents
from sseserve.model import Artifact, Event, Progress, Session, State

ENCODINGS = [encoding("sse"), encoding("sse", chunked=True), encoding("ws")]


def parse_frames(data: bytes) -> list[object]:
    """Parse frames with wsproto, an independent implementation."""
    connection = Connection(ConnectionType.CLIENT)
    connection.receive_data(data)
    return list(connection.events())


def progress_event(state: State = State.RUNNING, **fields) -> Event:
    return Event(7, "progress", Progress(status=state.value, state=state, **fields), 0.0)


# Frames


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
@pytest.mark.parametrize("next_payload", [b"", b"more"])
def test_websocket_frame_lengths(size, next_payload):
    """Each payload is one final frame with the shortest length encoding, and no bytes are left over."""
    payload = b"x" * size
    frame = websocket_text(payload)
    assert len(frame) == size + (2 if size < 126 else 4 if size < 65536 else 10)
    *parts, last = parse_frames(frame + (websocket_text(next_payload) if next_payload else b""))
    if next_payload:
        assert last == TextMessage(data="more", frame_finished=True, message_finished=True)
    else:
        parts.append(last)
    assert "".join(part.data for part in parts) == payload.decode()
    assert [part.message_finished for part in parts] == [False] * (len(parts) - 1) + [True]


def test_websocket_ping_and_close():
    """The two control frames that the server sends are valid; SSE has no close message."""
    assert parse_frames(encoding("ws").heartbeat(0.0)) == [Ping(payload=bytearray(b""))]
    assert parse_frames(encoding("ws").close(1013, "too slow")) == [
        CloseConnection(code=1013, reason="too slow")
    ]
    assert encoding("sse").close(1000, "ended") == b""


def test_sse_heartbeat():
    """A comment, which every client ignores, and no empty line, which some take for a message."""
    assert encoding("sse").heartbeat(0.0) == b": heartbeat\n"


def test_chunks():
    """What is sent at once is one chunk (RFC 9112, section 7.1); nothing is none, not the last."""
    chunked = encoding("sse", chunked=True)
    event = Event(1, "note", msgspec.Raw(b'"a\\n"'), 0.0)
    encoded = EncodedEvents.encode([event], chunked, "s", "e")
    assert encoded.data == b'21\r\nevent: note\ndata: "a\\n"\nid: e-1\n\n\r\n'
    first = msgspec.structs.replace(progress_event(stage="tts"), changed=("state", "status", "stage"))
    jobs = EncodedEvents.encode([first, event], encoding("sse", JOBS, chunked=True), "s", "e")
    size, _, rest = jobs.data.partition(b"\r\n")
    assert (rest.count(b"\ndata: "), len(rest)) == (4, int(size, 16) + 2)
    assert chunked.heartbeat(0.0) == b"c\r\n: heartbeat\n\r\n"
    assert chunked.retry(500) == b"b\r\nretry: 500\n\r\n"
    assert chunked.join([]) == b""
    assert chunked.close(1000, "ended") == b"0\r\n\r\n"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=10,
)
names = st.from_regex(r"[^\r\n\0\ud800-\udfff]{1,20}", fullmatch=True).filter(lambda name: name != "error")


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(st.lists(st.tuples(names, json_values), min_size=1, max_size=5), st.integers(1, 50))
def test_every_encoding_round_trips(encoding, values, size):
    """Types, ids and data of any text are decoded unchanged, however the bytes are split."""
    events = [
        Event(seq, name, msgspec.Raw(msgspec.json.encode(data)), 0.0)
        for seq, (name, data) in enumerate(values, 1)
    ]
    raw = b"".join(encoding.chunk(encoding.event("s", "e", event)) for event in events)
    reader = make_reader(encoding)
    messages = [message for at in range(0, len(raw), size) for message in reader.feed(raw[at : at + size])]
    assert messages == [(name, f"e-{seq}", data) for seq, (name, data) in enumerate(values, 1)]
    assert reader.cursor == f"e-{len(values)}"


def test_text_message_has_the_retry_time():
    """If there is one."""
    assert msgspec.json.encode(text_message(Message("a", b"1", "e-1", retry=5))) == (
        b'{"id":"e-1","event":"a","data":1,"retry":5}'
    )


def test_text_message_is_one_line():
    """Characters that only Python treats as line ends stay inside the message."""
    event = Event(1, "note", msgspec.Raw('"a\u2028b\u0085c"'.encode()), 0.0)
    assert b"\n" not in encoding("ws").event("s", "e", event)


# The sessions dialect


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (State.QUEUED, "progress"),
        (State.RUNNING, "progress"),
        (State.PAUSED, "progress"),
        (State.SUCCEEDED, "complete"),
        (State.FAILED, "error"),
        (State.CANCELLED, "error"),
        (State.LOST, "error"),
    ],
)
def test_event_name_of_progress(state, name):
    """There are three names, two of them for the end."""
    (message,) = SESSIONS.messages("s", "e", progress_event(state))
    assert (message.event, message.id) == (name, "e-7")


def test_error_that_is_not_final_is_a_warning():
    """Clients of this dialect stop at an error."""
    assert SESSIONS.messages("s", "e", Event(1, "error", msgspec.Raw(b"1"), 0.0))[0].event == "warning"


@pytest.mark.parametrize("dialect", [INTERACTION, JOBS_V1, TRANSCRIPTION], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize(
    ("error", "message", "expected"),
    [
        ("no voice", "m", "no voice"),
        ({"code": "E", "message": "no voice"}, "m", "no voice"),
        ({"code": "E", "message": None}, "m", "m"),
        ({"code": "E", "message": ""}, "", "E"),
        ({"code": "E"}, "", "E"),
        ({"reason": ["a"]}, "", '{"reason":["a"]}'),
    ],
)
def test_message_of_a_failure(dialect, error, message, expected):
    """It is a text that says something, whatever the publisher's error has."""
    event = progress_event(State.FAILED, error=error, message=message)
    (rendered,) = dialect.messages("s", "e", event)
    assert msgspec.json.decode(rendered.data)["message"] == expected


def test_minimal_payload():
    """The required members, and no empty optional ones."""
    (message,) = SESSIONS.messages("s", "e", progress_event(percent=40))
    assert msgspec.json.decode(message.data) == {
        "session_id": "s",
        "status": "running",
        "progress": 40,
        "message": "",
        "updated_at": "1970-01-01T00:00:00.000Z",
        "state": "running",
    }


def test_full_payload():
    """Every field that a client may see, and no internal one."""
    record = {
        "percent": 40.5,
        "stage": "tts",
        "message": "m",
        "error": {"a": 1},
        "data": msgspec.Raw(b"[1]"),
        "artifacts": (Artifact("a", type="text/plain"),),
        "started_at": 1.0,
        "updated_at": 2.0,
        "ended_at": 3.0,
        "rate": 0.5,
        "eta": 119.0,
        "last_advance_at": 9.0,
        "weight": 9.0,
        "smoothed": 9.0,
    }
    (message,) = SESSIONS.messages("s", "e", progress_event(**record))
    assert msgspec.json.decode(message.data) == {
        "session_id": "s",
        "status": "running",
        "state": "running",
        "progress": 40.5,
        "stage": "tts",
        "phase": "tts",
        "message": "m",
        "error": {"a": 1},
        "data": [1],
        "artifacts": [{"name": "a", "type": "text/plain"}],
        "started_at": "1970-01-01T00:00:01.000Z",
        "updated_at": "1970-01-01T00:00:02.000Z",
        "ended_at": "1970-01-01T00:00:03.000Z",
        "rate": 0.5,
        "eta": 119.0,
    }


def test_snapshot():
    """Progress with the cursor, the title and the control request; without progress the session is queued."""
    session = Session(id="s", epoch="e", seq=7, title="t", created_at=1.0, touched_at=2.0)
    description = msgspec.json.decode(msgspec.json.encode(SESSIONS.describe(SESSIONS, session, 0)))
    assert description == {
        "session_id": "s",
        "status": "queued",
        "state": "queued",
        "progress": 0,
        "indeterminate": True,
        "message": "",
        "updated_at": "1970-01-01T00:00:02.000Z",
        "created_at": "1970-01-01T00:00:01.000Z",
        "id": "e-7",
        "title": "t",
        "control": "continue",
    }


def test_server_event_names_are_reserved():
    """No publisher can send events under the names that the server uses."""
    for state in State:
        name = SESSIONS.messages("s", "e", progress_event(state))[0].event
        assert name in ROUTES.reserved_events or name == "error"
    assert {"resume", "deleted", "overflow", "control", "stalled"} <= ROUTES.reserved_events
    # What an EventSource fires itself; its "error" is a warning in most dialects.
    assert {"open", "message"} <= ROUTES.reserved_events
