"""Events as our own clients get them, over each protocol. The other dialects have tests of their own."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_harness import READERS, encoding
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Ping, TextMessage

from sseserve.dialects import Message, text_message, websocket_text
from sseserve.dialects.sessions import SESSIONS
from sseserve.http.routes import ROUTES
from sseserve.model import Artifact, Event, Progress, Session, State

PROTOCOLS = ["sse", "ws"]


def frames(data: bytes) -> list[object]:
    """What a WebSocket client that is not ours makes of bytes."""
    connection = Connection(ConnectionType.CLIENT)
    connection.receive_data(data)
    return list(connection.events())


def progress(state: State = State.RUNNING, **fields) -> Event:
    return Event(7, "progress", Progress(status=state.value, state=state, **fields), 0.0)


# Frames


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
@pytest.mark.parametrize("behind", [b"", b"more"])
def test_frames_at_the_edges_of_their_lengths(size, behind):
    """One whole unfragmented message each, in the shortest form, with nothing left over."""
    payload = b"x" * size
    frame = websocket_text(payload)
    assert len(frame) == size + (2 if size < 126 else 4 if size < 65536 else 10)
    *parts, last = frames(frame + (websocket_text(behind) if behind else b""))
    if behind:
        assert last == TextMessage(data="more", frame_finished=True, message_finished=True)
    else:
        parts.append(last)
    assert "".join(part.data for part in parts) == payload.decode()
    assert [part.message_finished for part in parts] == [False] * (len(parts) - 1) + [True]


def test_a_ping_and_a_close():
    """The two control frames that we write are what they should be."""
    assert frames(encoding("ws").heartbeat(0.0)) == [Ping(payload=bytearray(b""))]
    assert frames(encoding("ws").close(1013, "too slow")) == [CloseConnection(code=1013, reason="too slow")]
    assert encoding("sse").close(1000, "ended") == b""


def test_heartbeats():
    """A comment that every client ignores; nothing where somebody else frames."""
    assert encoding("sse").heartbeat(0.0) == b": heartbeat\n\n"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=10,
)
names = st.from_regex(r"[^\r\n\0\ud800-\udfff]{1,20}", fullmatch=True).filter(lambda name: name != "error")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(st.lists(st.tuples(names, json_values), min_size=1, max_size=5), st.integers(1, 50))
def test_every_protocol_says_the_same(protocol, said, size):
    """Types, ids and data of any text come back, however the bytes are cut."""
    events = [
        Event(seq, name, msgspec.Raw(msgspec.json.encode(data)), 0.0)
        for seq, (name, data) in enumerate(said, 1)
    ]
    raw = b"".join(encoding(protocol).event("s", "e", event) for event in events)
    reader = READERS[protocol]()
    seen = [message for at in range(0, len(raw), size) for message in reader.feed(raw[at : at + size])]
    assert seen == [(name, f"e-{seq}", data) for seq, (name, data) in enumerate(said, 1)]
    assert reader.cursor == f"e-{len(said)}"


def test_a_message_without_data_is_null():
    """It only tells the cursor; a retry time is told where one is asked for."""
    (seen,) = READERS["ws"]().feed(encoding("ws").message(Message(None, None, "e-1")))
    assert seen == (None, "e-1", None)
    assert msgspec.json.encode(text_message(Message("a", b"1", "e-1", retry=5))) == (
        b'{"id":"e-1","event":"a","data":1,"retry":5}'
    )


def test_text_is_a_line_each():
    """What Python alone takes for the end of a line stays within its message."""
    event = Event(1, "note", msgspec.Raw('"a\u2028b\u0085c"'.encode()), 0.0)
    assert b"\n" not in encoding("ws").event("s", "e", event)


# Our own dialect


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
def test_the_name_of_progress(state, name):
    """Three names, of which two are the end."""
    (message,) = SESSIONS.messages("s", "e", progress(state))
    assert (message.event, message.id) == (name, "e-7")


def test_an_error_that_ends_nothing_is_a_warning():
    """Since clients of this dialect stop at an error."""
    assert SESSIONS.messages("s", "e", Event(1, "error", msgspec.Raw(b"1"), 0.0))[0].event == "warning"


def test_the_payload_of_progress():
    """What is always there, and nothing that has nothing to say."""
    (message,) = SESSIONS.messages("s", "e", progress(percent=40))
    assert msgspec.json.decode(message.data) == {
        "session_id": "s",
        "status": "running",
        "progress": 40,
        "message": "",
        "updated_at": "1970-01-01T00:00:00.000Z",
        "state": "running",
    }


def test_the_payload_of_all_that_there_is():
    """Every field of the record that a client may see, and none that it may not."""
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
    (message,) = SESSIONS.messages("s", "e", progress(**record))
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


def test_a_snapshot():
    """Progress with the cursor, the title and what is asked; without progress the session waits."""
    session = Session(id="s", epoch="e", seq=7, title="t", created_at=1.0, touched_at=2.0)
    shown = msgspec.json.decode(msgspec.json.encode(SESSIONS.describe(SESSIONS, session, 0)))
    assert shown == {
        "session_id": "s",
        "status": "queued",
        "state": "queued",
        "progress": 0,
        "message": "",
        "updated_at": "1970-01-01T00:00:02.000Z",
        "created_at": "1970-01-01T00:00:01.000Z",
        "id": "e-7",
        "title": "t",
        "control": "continue",
    }


def test_what_the_server_says_is_reserved():
    """No publisher can pass for it."""
    for state in State:
        name = SESSIONS.messages("s", "e", progress(state))[0].event
        assert name in ROUTES.reserved_events or name == "error"
    assert {"resume", "deleted", "overflow", "control", "stalled"} <= ROUTES.reserved_events
