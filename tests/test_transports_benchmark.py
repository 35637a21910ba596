"""``python -m benchmarks transports``: its clients over real sockets, what they count, and a small run."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import pytest
import wsproto.utilities
from processes import run_server

from benchmarks.report.progress import Progress
from benchmarks.results import Figure, Results, Round, Scenario, describe_machine
from benchmarks.transports import clients, command, cuts, protocols
from benchmarks.transports.bed import CONTENDERS, TRANSPORTS, Plan, find_faults
from benchmarks.transports.clients import Clients
from benchmarks.transports.command import GROUPS, run
from benchmarks.transports.connection import Address
from benchmarks.transports.cuts import recovery_times
from benchmarks.transports.decisions import decide
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


def test_a_peer_may_close_a_connection_that_something_is_to_be_sent_on():
    """The close has been read, and the answer to what came before it is sent: the connection is lost."""
    with closing(Clients()) as clients, socket.create_server(("127.0.0.1", 0)) as listener:
        where = Address("127.0.0.1", listener.getsockname()[1])
        options = {"address": where, "session": "s", "watchers": 1, "waits": False}
        clients.open(transport="websocket", **options)
        peer, _ = listener.accept()
        request = peer.recv(10_000)
        key = request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0].decode()
        accepted = wsproto.utilities.generate_accept_token(key.encode()).decode()
        upgrade = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accepted}"
        ping = b"\x89\x00"
        peer.sendall(f"HTTP/1.1 101 Switching Protocols\r\n{upgrade}\r\n\r\n".encode() + ping)
        peer.shutdown(socket.SHUT_WR)
        seen = clients.watch(seconds=0.2)
        peer.close()
    assert seen["cuts"] >= 1


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


@pytest.mark.parametrize(
    ("group", "transports", "names"),
    [
        ("latency", ("sse-h2",), [f"latency-{WATCHERS}-10"]),
        ("memory", ("sse",), ["memory"]),
        ("wire", ("sse", "long-poll"), ["wire-update", "wire-idle", "proxy-idle"]),
        ("first", ("sse-h2",), ["first-near-tls"]),
        ("cuts", ("websocket",), ["cut-reset", "cut-silence"]),
        ("proxy", ("sse", "websocket"), ["proxy-default"]),
        ("network", ("long-poll",), ["network-delay"]),
    ],
)
def test_a_small_run(monkeypatch, tmp_path, group, transports, names):
    """Each scenario has each transport, or says why not; nothing failed; the results can be read back."""
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
        transports=transports,
    )
    lines = io.StringIO()
    steps = GROUPS[group].steps(plan)
    results = run(plan, [group], Progress(steps, lines))
    assert results.failures == []
    assert [scenario.name for scenario in results.scenarios] == names
    for scenario in results.scenarios:
        for transport in transports:
            turns = [turn for turn in scenario.rounds if turn.contender == transport]
            assert turns or scenario.skipped[transport]
            for turn in turns:
                assert turn.faults == []
                assert turn.values.keys() <= {figure.key for figure in scenario.figures}
                if group == "proxy" and transport == "websocket":
                    assert turn.values == {"served": 0}  # nginx does not pass upgrades on by default
    assert f"[{steps}/{steps}, " in lines.getvalue()
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


def test_recovery_counts_from_when_the_network_is_back():
    """Until a client has what was published by then; one that was never cut took no time; one may never."""
    second = 1_000_000_000
    arrivals = [
        [(1, 2 * second), (4, 7 * second), (5, 8 * second)],
        [(4, 4 * second)],
        [(3, 9 * second)],
    ]
    # Number 1 was published at 1 s, and then one each second: number 4 at 4 s.
    times = recovery_times(arrivals, back=int(4.5 * second), start=second, interval=1.0)
    assert times == [2500, 0]


def results_of(**figures: dict[str, float]) -> Results:
    """A run with scenarios of one figure each, named as ``SCENARIO__FIGURE`` with ``_`` for ``-``."""
    scenarios = []
    for name, values in figures.items():
        scenario, _, key = name.partition("__")
        rounds = [
            Round(contender=transport.replace("_", "-"), number=1, values={key: value})
            for transport, value in values.items()
        ]
        figure = Figure(key=key, label=key, unit="", better="less")
        title = scenario.replace("_", "-")
        scenarios.append(
            Scenario(name=title, group="", title="", question="", figures=[figure], rounds=rounds)
        )
    return Results(
        command="transports",
        title="",
        question="",
        started="",
        machine=describe_machine(),
        contenders=CONTENDERS,
        scenarios=scenarios,
    )


@pytest.mark.parametrize(
    ("values", "choice"),
    [
        ({"sse": 6.0, "websocket": 20.0, "sse_h2": 28.0}, "SSE"),
        ({"sse": 20.0, "websocket": 6.0, "sse_h2": 28.0}, "WebSocket"),
        ({"sse": 6.5, "websocket": 6.0, "long_poll": 6.0}, "SSE"),  # no difference worth a choice
        ({"sse": 6.7, "websocket": 6.1, "long_poll": 6.0}, "WebSocket"),
    ],
)
def test_decisions_follow_the_figures(values, choice):
    """And they say them; work of which nothing was measured is not in the table."""
    (row,) = decide(results_of(memory__memory=values))
    assert row.choice == choice
    assert all(f"{value:.1f} KB" in row.because for value in values.values())


def test_a_transport_that_misses_updates_is_not_chosen():
    figures = {"sse": 500.0, "websocket": 100.0}
    run = results_of(cut_reset__median=figures)
    kept = {"sse": 0.0, "websocket": 0.5}
    for turn in run.scenarios[0].rounds:
        turn.values["kept"] = kept[turn.contender]
    (row,) = decide(run)
    assert row.choice == "SSE"


def test_decisions_of_a_run_without_figures():
    assert decide(results_of()) == []


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, 0), ({"faults": ["1 events missed at 1 of 3 clients"]}, 1), ({"failures": ["wire: no"]}, 1)],
)
def test_exit_status(monkeypatch, tmp_path, capsys, change, status):
    """1 if an update was missed that was promised, or a scenario failed; reports are written all the same."""
    results = results_of(memory__memory={"sse": 6.0})
    results.scenarios[0].rounds[0].faults = change.get("faults", [])
    results.failures = change.get("failures", [])
    monkeypatch.setattr(command, "run", lambda *_args, **_options: results)
    monkeypatch.setattr("sys.argv", ["transports", "--quick", "--output", str(tmp_path)])
    assert command.main() == status
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html", "report.md"}
    shown = capsys.readouterr().err
    assert all(fault in shown for fault in change.get("faults", []))
