"""The records: states, statuses, cursors, times."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseserve.model import (
    Artifact,
    Cursor,
    Event,
    Progress,
    Session,
    State,
    isotime,
    state_of,
)

STATES = {
    "queued": "queued pending created scheduled waiting accepted new submitted",
    "paused": "paused suspended on_hold on-hold",
    "succeeded": "succeeded success successful processed completed complete done finished",
    "failed": "failed failure error errored",
    "cancelled": "cancelled canceled aborted revoked",
    "lost": "lost",
    "running": "running processing rendering whatever undone",
}


@pytest.mark.parametrize(
    ("status", "state"), [(status, state) for state, words in STATES.items() for status in words.split()]
)
def test_every_status_has_its_state(status, state):
    """In any case, with any of the usual separators, and with surrounding white space."""
    for variant in (status, status.upper(), f" {status.title()}\n", status.replace("_", " ")):
        assert state_of(variant) is State(state)


@given(st.text())
def test_any_text_is_a_status(text):
    """An unknown status means running; no text raises."""
    assert isinstance(state_of(text), State)


def test_terminal_states():
    """Exactly four states are terminal."""
    assert [state.value for state in State if state.terminal] == ["succeeded", "failed", "cancelled", "lost"]


epochs = st.from_regex(r"[0-9A-Za-z]{1,32}", fullmatch=True)
cursors = st.builds(Cursor, epochs, st.integers(0, 10**18 - 1), st.integers(0, 999))


@given(cursors)
def test_cursor_round_trip(cursor):
    """A cursor written as an event id is the same when parsed as a Last-Event-ID."""
    assert Cursor.parse(str(cursor)) == cursor


@given(st.text(st.sampled_from("0123456789abcXYZ-. \n٣é"), max_size=40))
def test_cursor_text_is_canonical(text):
    """Each cursor has a single text; any other text is invalid."""
    cursor = Cursor.parse(text)
    assert cursor is None or str(cursor) == text


@pytest.mark.parametrize(
    "text",
    ["", "a", "a-", "-1", "a-01", "a-1 ", " a-1", "a-1\n", "a--1", "a-1.0", "a-1.", "a-1.01", "a-1.1000",
     "a-1e3", "a-٣", "é-1", "a" * 33 + "-1", "a-" + "9" * 19, "a-1-2"],
)  # fmt: skip
def test_invalid_cursor(text):
    """Text that no server can have written is not a cursor."""
    assert Cursor.parse(text) is None


@given(epochs, st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3))))
def test_cursor_within_an_event(epoch, positions):
    """After part of an event's messages the event is not complete; after all of them it is."""
    for seq, part in positions:
        assert Cursor(epoch, seq, part).complete_seq == seq - (part > 0)


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1767323045.6789, "2026-01-02T03:04:05.678Z"),
        (1767323045.0, "2026-01-02T03:04:05.000Z"),
        (-0.5, "1969-12-31T23:59:59.500Z"),
    ],
)
def test_times_are_rfc_3339(at, text):
    """Always in UTC with a Z and milliseconds."""
    assert isotime(at) == text


def test_records_are_immutable():
    """Setting an attribute of a record raises."""
    event = Event(1, "note", msgspec.Raw(b"1"), 0.0)
    for record in (event, Cursor("a", 1), Session(id="s", epoch="a"), Artifact("a")):
        with pytest.raises(AttributeError):
            record.seq = 2  # type: ignore[misc, union-attr]


def test_session_end_and_cursor():
    """A session without progress has not ended."""
    session = Session(id="s", epoch="a", seq=7)
    assert (str(session.cursor), session.ended) == ("a-7", False)
    for state in State:
        ended = msgspec.structs.replace(session, progress=Progress(status="x", state=state))
        assert ended.ended is state.terminal


def test_artifacts_reject_unknown_members():
    """A misspelt member is an error and is not ignored."""
    with pytest.raises(msgspec.ValidationError, match="size_byte"):
        msgspec.convert({"name": "a", "size_byte": 1}, Artifact)
