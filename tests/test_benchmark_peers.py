"""``python -m benchmarks peers``: the check of every event, and a tiny comparison with real servers."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from benchmarks.load.events import Position, first_number, payload_template, stamp
from benchmarks.load.publishers import PublishRequest
from benchmarks.peers.command import find_faults, measure
from benchmarks.peers.contenders import PEERS, Peer
from benchmarks.peers.plan import QUICK
from benchmarks.results import Results
from benchmarks.servers import ServerProcess, free_port

RUN = 3


def event(place: int, sequence: int = 0, run: int = RUN, size: int = 150) -> bytes:
    """Return an event as a server may send it."""
    payload = payload_template(size) % (first_number(run, sequence) + place, stamp(1.5))
    return b"id: e-%d\ndata: %b\n\n" % (place, payload)


def read(*pieces: bytes, sequences: int = 1) -> Position:
    """Return where a client is that has read these pieces."""
    position = Position(RUN, range(sequences))
    for piece in pieces:
        position = position.advance(piece)
    return position


def test_events_in_order_have_no_fault():
    position = read(*(event(place) for place in range(5)))
    assert (position.lost({0: 5}), position.doubled, position.reordered, position.foreign) == (0, 0, 0, 0)
    assert position.times == [stamp(1.5)]


def test_lost_event_counts():
    """In the middle and at the end."""
    assert read(event(0), event(2)).lost({0: 3}) == 1
    assert read(event(0), event(1)).lost({0: 3}) == 1
    assert read().lost({0: 3}) == 3


def test_doubled_event_counts():
    position = read(event(0), event(1), event(1))
    assert (position.doubled, position.reordered, position.lost({0: 2})) == (1, 0, 0)


def test_reordered_event_counts_and_is_not_lost():
    position = read(event(0), event(2), event(1))
    assert (position.reordered, position.doubled, position.lost({0: 3})) == (1, 0, 0)


def test_event_of_another_channel_or_run_counts():
    position = read(event(0), event(0, sequence=1), event(0, run=RUN - 1))
    assert (position.foreign, position.gained, position.lost({0: 1})) == (2, 0, 0)


def test_sequences_are_independent():
    """Each publisher's events have an order, those of different publishers have none."""
    position = read(event(0, 1), event(0, 0) + event(1, 1), event(1, 0), sequences=2)
    assert (position.lost({0: 2, 1: 2}), position.reordered, position.doubled) == (0, 0, 0)


def test_events_may_be_split_anywhere():
    data = b"".join(event(place) for place in range(3))
    for cut in range(len(data)):
        position = Position(RUN, (0,))
        gained = 0
        for piece in (data[:cut], data[cut:]):
            position = position.advance(piece)
            gained += position.gained
        assert (gained, position.lost({0: 3}), position.foreign) == (3, 0, 0), cut


def test_event_may_be_spread_over_chunks_of_the_response():
    """A chunk may end anywhere in an event, and a read anywhere in what is between two chunks."""
    data = event(0)
    for split in range(len(data)):
        chunked = b"%x\r\n%b\r\n%x\r\n%b\r\n" % (split, data[:split], len(data) - split, data[split:])
        for cut in range(len(chunked)):
            position = read(chunked[:cut], chunked[cut:], b"5\r\n:\n\n\r\n")
            assert position.lost({0: 1}) == 0, (split, cut)


def test_clients_that_read_the_same_share_a_position():
    start = Position(RUN, (0,))
    after = start.advance(event(0))
    assert start.following[event(0)] is after


@pytest.mark.parametrize("size", [64, 150, 16_384])
def test_payload_has_its_size(size: int):
    assert len(payload_template(size) % (first_number(99, 9_999) + 999_999, stamp())) == size


def test_request_of_a_form_is_percent_encoded():
    """And its Content-Length is that of the completed body."""
    request = PublishRequest(
        "/hub", b"topic=*&data=", content_type="application/x-www-form-urlencoded", is_form=True
    )
    head, _, body = (request.template("a", 64) % (first_number(0, 0), stamp())).partition(b"\r\n\r\n")
    assert body.startswith(b"topic=a&data=%7B%22n%22%3A1")
    assert f"Content-Length: {len(body)}".encode() in head


TINY = dataclasses.replace(
    QUICK,
    fanout_clients=(1, 5),
    fanout_seconds=0.05,
    fanout_publishers=2,
    many_channels=10,
    many_publishers=(1, 3),
    many_seconds=0.05,
    paced_clients=5,
    paced_rates=(50.0,),
    paced_seconds=0.1,
    publish_seconds=0.05,
    streams=20,
    streams_rate=20.0,
    streams_seconds=0.1,
    storm_events=10,
    payload_sizes=(64, 1024),
    payload_seconds=0.05,
)


def peers(*names: str) -> tuple[Peer, ...]:
    return tuple(peer for peer in PEERS if peer.name in names)


def test_tiny_comparison(tmp_path, capsys):
    """All scenarios but those that wait, with real sockets and processes."""
    only = ["many-3", "fanout-5-2", "paced-50", "publish", "accept", "storm"]
    results = measure(TINY, only=only, peers=peers("sseserve", "send-loop"))
    assert results.failures == []
    for scenario in results.scenarios:
        expected = {"sseserve", "send-loop"} - set(scenario.skipped)
        assert {turn.contender for turn in scenario.rounds} == expected, scenario.name
        for turn in scenario.rounds:
            assert turn.faults == [], (scenario.name, turn)
            for figure in scenario.figures:
                assert turn.values[figure.key] >= 0, (scenario.name, figure.key)
    skipped = {scenario.name: scenario.skipped for scenario in results.scenarios if scenario.skipped}
    assert set(skipped) == {"storm", "publish-lines"}
    assert find_faults(results) == {}
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


FAULTY_LOOP = """
import sys
from collections import Counter
from benchmarks.peers.apps.send_loop import Loop


class FaultyLoop(Loop):
    seen = Counter()
    held = {}

    def _send(self, fd, data):
        if data.startswith(b"data:"):
            self.seen[fd] += 1
            if self.seen[fd] == 15:  # after the warm-up
                %s
        super()._send(fd, data)
        if fd in self.held:
            super()._send(fd, self.held.pop(fd))


FaultyLoop(int(sys.argv[1])).run()
"""
FAULTS = {
    "lost": "return",
    "doubled": "super()._send(fd, data)",
    "reordered": "self.held[fd] = data; self.seen[fd] += 1; return",
    "of another channel": """data = data.replace(b'"n":102', b'"n":103')""",
}


class FaultyPeer(type(peers("send-loop")[0])):
    """The send loop with a fault in the 15th event of each client."""

    def __init__(self, fault: str) -> None:
        self._program = FAULTY_LOOP % FAULTS[fault]

    def start(self) -> ServerProcess:
        port = free_port()
        command = [sys.executable, "-c", self._program, str(port)]
        return ServerProcess("faulty", lambda _: command, port=port)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_server_is_found(fault: str, capsys):
    """By the clients, in a real measurement; the round counts nowhere."""
    plan = dataclasses.replace(TINY, patience=1.0, fanout_seconds=0.5)  # for more than 15 events
    results = measure(plan, only=["fanout-5-1"], peers=[FaultyPeer(fault)])
    (scenario,) = results.scenarios
    (turn,) = scenario.rounds
    assert f"events {fault}: 5, at 5 of 5 clients" in turn.faults
    assert scenario.of("send-loop", "rate") == []
    assert set(find_faults(results).values()) == {"send-loop"}


class BrokenPeer(type(peers("send-loop")[0])):
    """A server that does not start."""

    def start(self):
        raise OSError("no such server")


def test_contender_that_fails_does_not_end_the_run(capsys):
    broken = BrokenPeer()
    broken.name = "broken"
    broken.version = lambda: "1"
    results = measure(TINY, only=["publish-1"], peers=(broken, *peers("send-loop")))
    (scenario,) = results.scenarios
    assert [turn.contender for turn in scenario.rounds] == ["send-loop"]
    assert scenario.skipped == {"broken": "failed: no such server"}
    assert len(results.failures) == 1
    assert list(find_faults(results).values()) == ["broken"]
