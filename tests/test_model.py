"""The records: states and labels, phases, cursors, times."""

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
    ("label", "state"), [(label, state) for state, labels in STATES.items() for label in labels.split()]
)
def test_every_label_has_its_state(label, state):
    """In any case, with any of the usual separators, and spaces around it."""
    for variant in (label, label.upper(), f" {label.title()}\n", label.replace("_", " ")):
        assert state_of(variant) is State(state)


@given(st.text())
def test_any_text_is_a_label(text):
    """An unknown label means running; none raises."""
    assert isinstance(state_of(text), State)


def test_which_states_are_the_end():
    """Four of them, and nothing else."""
    assert [state.value for state in State if state.terminal] == ["succeeded", "failed", "cancelled", "lost"]


epochs = st.from_regex(r"[0-9A-Za-z]{1,32}", fullmatch=True)
cursors = st.builds(Cursor, epochs, st.integers(0, 10**18 - 1), st.integers(0, 999))


@given(cursors)
def test_a_cursor_survives_its_text(cursor):
    """What is written as an id comes back the same as a Last-Event-ID."""
    assert Cursor.parse(str(cursor)) == cursor


@given(st.text(st.sampled_from("0123456789abcXYZ-. \n٣é"), max_size=40))
def test_what_is_read_as_a_cursor_is_written_the_same(text):
    """There is one way to write each, and all else is none."""
    cursor = Cursor.parse(text)
    assert cursor is None or str(cursor) == text


@pytest.mark.parametrize(
    "text",
    ["", "a", "a-", "-1", "a-01", "a-1 ", " a-1", "a-1\n", "a--1", "a-1.0", "a-1.", "a-1.01", "a-1.1000",
     "a-1e3", "a-٣", "é-1", "a" * 33 + "-1", "a-" + "9" * 19, "a-1-2"],
)  # fmt: skip
def test_what_is_no_cursor(text):
    """Nothing that no log of ours can have written is taken for a place."""
    assert Cursor.parse(text) is None


@given(epochs, st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3))))
def test_a_place_within_an_event_is_before_its_end(epoch, places):
    """A part is not done with its event; a whole is."""
    for seq, part in places:
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
    """In UTC with a Z and milliseconds, always."""
    assert isotime(at) == text


def test_records_do_not_change():
    """An event that somebody holds stays as it is."""
    event = Event(1, "note", msgspec.Raw(b"1"), 0.0)
    for record in (event, Cursor("a", 1), Session(id="s", epoch="a"), Artifact("a")):
        with pytest.raises(AttributeError):
            record.seq = 2  # type: ignore[misc, union-attr]


def test_a_session_knows_its_end_and_its_cursor():
    """Without progress it has not ended."""
    session = Session(id="s", epoch="a", seq=7)
    assert (str(session.cursor), session.ended) == ("a-7", False)
    for state in State:
        ended = msgspec.structs.replace(session, progress=Progress(status="x", state=state))
        assert ended.ended is state.terminal


def test_artifacts_have_no_unknown_members():
    """A misspelt one is an error, not lost in silence."""
    with pytest.raises(msgspec.ValidationError, match="size_byte"):
        msgspec.convert({"name": "a", "size_byte": 1}, Artifact)
