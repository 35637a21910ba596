"""The codec of Server-Sent Events, tested against the standard and by round trips."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sseserve.sse import Decoder, ServerSentEvent, comment, encode, retry_line, valid_field

# Ends of lines for str.splitlines, but not for the standard.
NOT_LINE_ENDS = "\u2028\u2029\x0b\x0c\x1c\x1d\x1e\x85"

text = st.text(st.characters(codec="utf-8") | st.sampled_from("\r\n: \ufeff\0é😀" + NOT_LINE_ENDS))
field = text.map(lambda value: re.sub("[\r\n\0]", "", value))
blocks = st.fixed_dictionaries(
    {"data": text},
    optional={
        "event": field,
        "id": field,
        "retry": st.integers(0, 10**18 - 1),
    },
)
chunkings = st.lists(st.integers(0, 400), max_size=12)


def split(raw: bytes, positions: list[int]) -> list[bytes]:
    """Split ``raw`` at ``positions``; empty pieces are kept."""
    ends = sorted({min(position, len(raw)) for position in positions} | {len(raw)})
    return [raw[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def decode(*chunks: bytes) -> list[ServerSentEvent]:
    """Feed a new decoder chunk by chunk."""
    decoder = Decoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def expected(stream: list[dict[str, object]]) -> list[ServerSentEvent]:
    """Return the events of a stream of blocks: ids stay in force, and all line ends in data become LF."""
    events, last_id = [], ""
    for block in stream:
        last_id = block.get("id", last_id)
        data = re.sub("\r\n?", "\n", block["data"])
        events.append(ServerSentEvent(data, block.get("event") or "message", last_id, block.get("retry")))
    return events


@given(st.lists(blocks, max_size=4), chunkings)
@example([{"data": "é😀\u2028\x85", "id": "é"}], [9, 10, 11, 12, 13, 14])
def test_round_trip_with_every_split(stream, positions):
    """Encoded events are decoded unchanged, wherever the bytes are split."""
    raw = b"".join(encode(**block) for block in stream)
    assert decode(*split(raw, positions)) == expected(stream)


def test_every_split_in_two():
    """Multibyte characters, CRLF and several data lines, split at every position."""
    raw = "\ufeff: hi\r\nid: é1\r\nevent: ü\r\ndata: 😀\r\ndata:\r\ndata: b\r\n\r\ndata: c\n\n".encode()
    whole = [ServerSentEvent("😀\n\nb", "ü", "é1"), ServerSentEvent("c", "message", "é1")]
    for position in range(len(raw) + 1):
        assert decode(raw[:position], raw[position:]) == whole
    assert decode(*(raw[i : i + 1] for i in range(len(raw)))) == whole


@given(st.lists(blocks, max_size=3), st.sampled_from(["\r", "\n", "\r\n"]), st.booleans(), chunkings)
def test_line_ends_and_bom(stream, line_end, bom, positions):
    """CR, LF and CRLF are equivalent, and one BOM at the start is ignored."""
    lines = b"".join(encode(**block) for block in stream).decode().replace("\n", line_end)
    raw = ("\ufeff" * bom + lines).encode()
    assert decode(*split(raw, positions)) == expected(stream)


@given(
    st.lists(
        st.sampled_from(
            [b"data", b"id", b"event", b"retry", b":", b" ", b"\r", b"\n", b"\0", b"\xef\xbb\xbf"]
        )
        | st.binary(max_size=6)
    ).map(b"".join),
    chunkings,
)
@example(b"\xed\xa0\x80\n\n", [1, 2])
@example(b"data: \xf0\x9f\n\ndata\xed\xa0\n\n", [7, 8, 17])
def test_any_bytes(raw, positions):
    """Invariant: no bytes raise, and the result does not depend on how they are split."""
    whole, pieces, single = Decoder(), Decoder(), Decoder()
    events = whole.feed(raw)
    assert [e for chunk in split(raw, positions) for e in pieces.feed(chunk)] == events
    assert [e for i in range(len(raw)) for e in single.feed(raw[i : i + 1])] == events
    for other in (pieces, single):
        assert (other.last_event_id, other.retry) == (whole.last_event_id, whole.retry)
    for event in events:
        assert valid_field(event.event)
        assert valid_field(event.id)


def test_standard_multi_line_data():
    """Section 9.2.6, first example: data fields are joined by line feeds."""
    assert decode(b"data: YHOO\ndata: +2\ndata: 10\n\n") == [ServerSentEvent("YHOO\n+2\n10")]


def test_standard_four_blocks():
    """Section 9.2.6, second example: a comment, an id, an id that is reset, and a leading space kept."""
    raw = b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"
    assert decode(raw) == [
        ServerSentEvent("first event", id="1"),
        ServerSentEvent("second event"),
        ServerSentEvent(" third event"),
    ]


def test_standard_empty_data():
    """Section 9.2.6, third example: an empty event, an event of one LF, and an incomplete one."""
    assert decode(b"data\n\ndata\ndata\n\ndata:") == [ServerSentEvent(""), ServerSentEvent("\n")]


def test_standard_space_after_colon():
    """Section 9.2.6, last example: one space after the colon is not part of the value."""
    assert decode(b"data:test\n\ndata: test\n\n") == [ServerSentEvent("test")] * 2


def test_id_with_nul_is_ignored():
    """An id with a NUL does not replace the previous one."""
    assert decode(b"id: 1\n\nid: 2\0\ndata: a\n\n") == [ServerSentEvent("a", id="1")]


@pytest.mark.parametrize("value", ["", "-1", "1.5", "1e3", " 5", "+5", "٣", "²", "0x10", "9" * 19])
def test_retry_accepts_digits_only(value):
    """Anything but ASCII digits is ignored, and so is a number of more than 18 digits."""
    decoder = Decoder(retry=7)
    assert decoder.feed(f"retry: {value}\ndata: a\n\n".encode()) == [ServerSentEvent("a")]
    assert decoder.retry == 7


@pytest.mark.parametrize(("value", "retry"), [("0", 0), ("00", 0), ("0" * 5000 + "1500", 1500)])
def test_retry_with_leading_zeros(value, retry):
    """The digits are read in base ten, however many zeros lead."""
    decoder = Decoder()
    decoder.feed(f"retry: {value}\n".encode())
    assert decoder.retry == retry


def test_retry_takes_effect_at_once():
    """A retry time takes effect with its line, even without an event, as the standard requires."""
    decoder = Decoder()
    assert decoder.feed(b"retry: 1500\n") == []
    assert decoder.retry == 1500


def test_incomplete_block_does_not_change_the_cursor():
    """A connection lost inside a block must not skip that block's event on resume."""
    decoder = Decoder()
    decoder.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n")
    assert decoder.last_event_id == "1"
    decoder.feed(b"\n")
    assert decoder.last_event_id == "2"


def test_id_without_data_changes_the_cursor():
    """A block with only an id dispatches nothing but sets the cursor."""
    decoder = Decoder()
    assert decoder.feed(encode(id="e-5")) == []
    assert decoder.last_event_id == "e-5"


def test_decoder_of_the_next_connection():
    """A decoder created with the last id and retry time keeps both in force."""
    decoder = Decoder(last_event_id="e-5", retry=10)
    assert decoder.feed(b"data: a\n\n") == [ServerSentEvent("a", id="e-5")]
    assert decoder.retry == 10


def test_only_the_first_bom_is_ignored():
    """A second BOM makes the first line an unknown field; one inside data is kept."""
    assert decode("\ufeff\ufeffdata: a\n\n".encode()) == []
    assert decode("data: \ufeff\n\n".encode()) == [ServerSentEvent("\ufeff")]


def test_unknown_fields_and_case():
    """Field names are case-sensitive; unknown fields are ignored."""
    assert decode(b"DATA: a\ndata : b\nfoo: c\nevent: x\n\n") == []


def test_event_type_is_reset_after_its_block():
    """An event type without data is discarded at the end of its block."""
    assert decode(b"event: x\n\ndata: a\n\n") == [ServerSentEvent("a")]


def test_invalid_utf8_is_replaced():
    """Undecodable bytes become U+FFFD, as the standard's UTF-8 decoding requires."""
    assert decode(b"data: \xff\xc3\n\n") == [ServerSentEvent("\ufffd\ufffd")]


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b"])
@pytest.mark.parametrize("name", ["id", "event"])
def test_encoding_rejects_line_breaks_and_nul(name, bad):
    """CR, LF and NUL are not allowed in an id or an event type."""
    with pytest.raises(ValueError, match="cannot hold CR, LF or NUL"):
        encode("x", **{name: bad})


def test_encoding_rejects_a_negative_retry():
    """A reconnection time is not negative."""
    with pytest.raises(ValueError, match="negative"):
        encode("x", retry=-1)


def test_data_cannot_inject_a_field():
    """Line ends in data, of any kind, never start a field of their own."""
    raw = encode("a\rid: 9\r\nevent: x\n\ndata: y", id="1")
    assert decode(raw) == [ServerSentEvent("a\nid: 9\nevent: x\n\ndata: y", id="1")]


def test_encoded_form():
    """One block: event, retry, data, id, an empty line; comments and ``retry_line`` have no empty line."""
    assert encode("a\nb", event="t", id="1", retry=5) == b"event: t\nretry: 5\ndata: a\ndata: b\nid: 1\n\n"
    assert comment("a\nb") == b": a\n: b\n"
    assert retry_line(5) == b"retry: 5\n"


@given(st.lists(blocks, min_size=1, max_size=3))
def test_the_id_is_behind_the_data(stream):
    """A client that takes an id as soon as its line is complete has read all of that event's data."""
    lines = b"".join(encode(**block) for block in stream).decode().split("\n")
    for number, line in enumerate(lines):
        if line.startswith("id: "):
            assert lines[number + 1] == ""


@given(text)
def test_comments_are_ignored(value):
    """A comment dispatches nothing, whatever its text."""
    assert decode(comment(value), b"data: a\n\n") == [ServerSentEvent("a")]
