"""``python -m benchmarks http2``: its reader of frames, and a tiny run with real servers."""

from __future__ import annotations

from benchmarks.load.events import Position, first_number, payload_template, stamp
from benchmarks.load.http2 import Reading, frame
from benchmarks.operations import http2

RUN = 2


def event(place: int) -> bytes:
    payload = payload_template(150) % (first_number(RUN, 0) + place, stamp(1.5))
    return b"data: %b\n\n" % payload


def test_frames_may_be_split_anywhere():
    """Each stream has its events; pings and settings get their answers."""
    data = frame(4) + frame(6, 0, 0, b"12345678")
    data += b"".join(frame(0, 0, number, event(place)) for place in range(3) for number in (1, 3))
    first = Reading(dict.fromkeys((1, 3), Position(RUN, (0,))))
    for cut in range(len(data)):
        reading, gained, reply = first, 0, b""
        for piece in (data[:cut], data[cut:]):
            reading, more, answer = reading.advance(piece)
            gained += more
            reply += answer
        assert gained == 6
        assert [position.lost({0: 3}) for position in reading.streams.values()] == [0, 0]
        assert reply == frame(4, 1) + frame(6, 1, 0, b"12345678")


def test_windows_are_opened_again():
    """When half of them is used."""
    reading = Reading({1: Position(RUN, (0,))})
    replies = b""
    for _ in range(16):
        reading, _, reply = reading.advance(frame(0, 0, 1, b"x" * 2**20))
        replies += reply
    updates = [replies[at : at + 13] for at in range(0, len(replies), 13)]
    assert [(int.from_bytes(update[5:9]), int.from_bytes(update[9:])) for update in updates] == [
        (1, 3 * 2**20),
        (1, 3 * 2**20),
        (0, 8 * 2**20),
        (1, 3 * 2**20),
        (1, 3 * 2**20),
        (1, 3 * 2**20),
        (0, 8 * 2**20),
    ]


def test_end_of_a_stream_counts():
    reading = Reading({1: Position(RUN, (0,))})
    assert reading.advance(frame(3, 0, 1, bytes(4))).after.ended == 1
    assert reading.advance(frame(0, 1, 1)).after.ended == 1


def test_connections_that_have_read_the_same_share_it():
    """Whatever the pieces were in which they have read it."""
    first = Reading({1: Position(RUN, (0,))})
    data = b"".join(frame(0, 0, 1, event(place)) for place in range(3))
    after = first.advance(data).after
    for cut in range(1, len(data)):
        part = first.advance(data[:cut]).after
        assert part is not after
        assert part.advance(data[cut:]).after is after
    doubled = first.advance(data + frame(0, 0, 1, event(2))).after
    assert doubled is not after


def test_tiny_run(capsys):
    """All clients have all events, and there is a figure with its ratio for each contender."""
    rounds = {
        contender.name: [http2.run_round(contender, clients=100, seconds=0.1, settle=0.1)]
        for contender in (http2.CONTENDERS[0], http2.CONTENDERS[-1])
    }
    http2.print_table(rounds)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + 2 + len(http2.LOADS) + 2
    assert all(line.count("(1.00)") >= 1 for line in lines[2:])
