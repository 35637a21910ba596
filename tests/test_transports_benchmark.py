"""``python -m benchmarks transports``: its clients over real sockets, what they count, and a small run."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import pytest
from processes import run_server

from benchmarks.report.progress import Progress
from benchmarks.results import Results
from benchmarks.transports import clients, cuts, protocols
from benchmarks.transports.bed import TRANSPORTS, Plan, find_faults
from benchmarks.transports.clients import Address, Clients
from benchmarks.transports.command import GROUPS, run
from benchmarks.transports.publisher import publish
from benchmarks.transports.watcher import Recorder, Watcher, quantiles

WITH_CURSOR = [name for name in TRANSPORTS if name != "polling"]
WATCHERS = 3


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with run_server(retry_ms=1, drain=1) as url:
        yield Address("127.0.0.1", urlsplit(url).port)


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch):
    monkeypatch.setattr(protocols, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(clients, "RECONNECT", 0.02)


class Session:
    """A session whose clients are cut between its events 5 and 6, and come back when there are 10."""

    def __init__(self, address: Address, name: str) -> None:
        self.address, self.name = address, name
        httpx.post(f"http://{address.host}:{address.port}/api/sessions", json={"session_id": name})
        self.publish(0)

    def publish(self, first: int, count: int = 1) -> None:
        where = {"host": self.address.host, "port": self.address.port, "session": self.name}
        publish(**where, first=first, count=count, interval=0)

    def watch(self, transport: str, *, keeps_cursor: bool) -> dict:
        with closing(Clients()) as clients:
            opened = clients.open(
                transport=transport,
                address=self.address,
                session=self.name,
                watchers=WATCHERS,
                keeps_cursor=keeps_cursor,
            )
            assert len(opened["first"]) == WATCHERS
            self.publish(1, 5)
            clients.watch(until=5)
            clients.cut()
            self.publish(6, 5)
            return clients.watch(until=10)


@pytest.mark.parametrize("transport", WITH_CURSOR)
def test_with_a_cursor_each_event_arrives_once_and_in_order(address, transport):
    """Through a cut, during which events are published."""
    seen = Session(address, f"cursor-{transport}").watch(transport, keeps_cursor=True)
    assert find_faults(transport, seen) == []
    assert seen["received"] == 10 * WATCHERS
    assert [[number for number, _ in arrivals] for arrivals in seen["arrivals"]] == [
        list(range(11))
    ] * WATCHERS
    assert seen["cuts"] == (1 if transport == "sse-h2" else WATCHERS)
    assert seen["told"] == ["ok"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_a_cursor_the_missed_events_are_counted(address, transport):
    """After the cut a client begins with the state at that time, which is event 10."""
    seen = Session(address, f"none-{transport}").watch(transport, keeps_cursor=False)
    for arrivals, missed in zip(seen["arrivals"], seen["missed"], strict=True):
        numbers = [number for number, _ in arrivals]
        assert not {6, 7, 8, 9} & set(numbers)
        assert numbers[-1] == 10
        assert missed == 11 - len(numbers)
        assert missed == 4 or transport == "polling"
    assert seen["doubled"] == [0] * WATCHERS
    assert bool(find_faults(transport, seen)) == (transport != "polling")


def test_a_refusal_is_returned(address):
    """A session that does not exist."""
    with closing(Clients()) as clients:
        answer = clients.open(transport="websocket", address=address, session="nobody", watchers=1)
    assert answer == {"refused": "404"}


def test_watcher_counts_what_is_missing_doubled_and_reordered():
    """What comes late was not lost; a snapshot may be known; what is skipped ages until the next."""
    recorder = Recorder(interval=100)
    watcher = Watcher(recorder)
    for number in (0, 1, 1, 4, 3):
        watcher.take(f"a-{number}", b'{"data":{"n":%d,"t":%d}}' % (number, 100 * number), 1000)
    watcher.take("a-4", b'{"data":{"n":4,"t":400}}', 1000, snapshot=True)
    watcher.take("a-0", b'{"status":"created"}', 1000)
    assert (watcher.last, watcher.missing, watcher.doubled, watcher.reordered) == (4, {2}, 1, 1)
    assert sorted(recorder.ages) == [600, 700, 800, 900]
    assert recorder.received == 2


def test_quantiles():
    assert quantiles([n * 1_000_000 for n in range(100)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 99}
    assert quantiles([]) == {}


def test_a_small_run(monkeypatch, tmp_path):
    """Every scenario has every transport, or says why not; nothing failed; the results can be read back."""
    monkeypatch.setattr(cuts, "BEFORE", 0.2)
    monkeypatch.setattr(cuts, "AFTER", 0.2)
    plan = Plan(
        rounds=1,
        seconds=0.3,
        loads=((WATCHERS, 10),),
        idle_clients=10,
        idle_seconds=0.2,
        opens=1,
        offline=0.3,
        firsts=((False, True),),
        sites=("default",),
        conditions=("delay",),
        settle=0.1,
        transports=("sse", "websocket"),
    )
    lines = io.StringIO()
    steps = sum(group.steps(plan) for group in GROUPS.values())
    results = run(plan, list(GROUPS), Progress(steps, lines))
    assert results.failures == []
    assert [scenario.name for scenario in results.scenarios] == [
        f"latency-{WATCHERS}-10",
        "memory",
        "wire-update",
        "wire-idle",
        "proxy-idle",
        "first-near-tls",
        "cut-reset",
        "cut-silence",
        "proxy-default",
        "network-delay",
    ]
    for scenario in results.scenarios:
        for transport in plan.transports:
            turns = [turn for turn in scenario.rounds if turn.contender == transport]
            assert turns or scenario.skipped[transport]
            for turn in turns:
                assert turn.faults == []
                assert turn.values.keys() <= {figure.key for figure in scenario.figures}
    (refused,) = [turn for turn in results.scenarios[8].rounds if turn.contender == "websocket"]
    assert refused.values == {"served": 0}  # nginx does not pass upgrades on by default
    assert f"[{steps}/{steps}, " in lines.getvalue()
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
