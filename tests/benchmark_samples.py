"""A made-up run of each benchmark, as large and as uneven as real ones, for tests of their reports."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from benchmarks.results import Contender, Decision, Figure, Machine, Results, Round, Scenario

__all__ = ["make_peers", "make_transports"]

MACHINE = Machine(
    cpu="Example Processor 3000 @ 2.50GHz", cores=2, memory=7.8, system="Linux-6.1-x86_64", load=0.07
)
PEERS = [
    Contender(name="loop", title="smallest send loop", version="3.11", language="Python", is_limit=True,
              note="It only writes to sockets: what one thread of Python can do at most."),
    Contender(name="sseserve", title="sseserve", version="0.1.0", language="Python", settings="port = 0"),
    Contender(name="nchan", title="nchan in nginx", version="1.3.6", language="C",
              settings="worker_processes 1;\nnchan_shared_memory_size 256M;", source="https://nchan.io/"),
    Contender(name="sse-starlette", title="sse-starlette on uvicorn, uvloop and httptools", version="2.1",
              language="Python", source="https://github.com/sysid/sse-starlette"),
    Contender(name="quart", title="Quart-Trio generators on Hypercorn", version="0.12", language="Python"),
    Contender(name="better-sse", title="better-sse on Node", version="0.14", language="JavaScript"),
    Contender(name="mercure", title="Mercure", version="1.0-alpha.3", language="Go"),
    Contender(name="centrifugo", title="Centrifugo", version="6.2", language="Go",
              settings='{"log_level": "error"}', source="https://centrifugal.dev/docs/server/infra_tuning"),
    Contender(name="other", title="Another server", note="It can be downloaded."),
]  # fmt: skip
RATE = Figure(key="rate", label="deliveries per second", unit="deliveries/s", better="more")
QUANTILES = [
    Figure(key=key, label=f"delay, {key}", unit="ms", better="less", plot="quantiles")
    for key in ("p50", "p90", "p99", "max")
]


def _scenario(
    rng: random.Random,
    name: str,
    title: str,
    question: str,
    figures: list[Figure],
    medians: Mapping[str, tuple[float, ...]],
    rounds: int = 5,
    **fields: Any,
) -> Scenario:
    """Return a scenario with rounds near the medians, which are given for each figure of a contender."""
    turns = [
        Round(
            contender=contender,
            number=number,
            values={
                figure.key: value * rng.uniform(0.93, 1.07)
                for figure, value in zip(figures, values, strict=False)
            },
            load=rng.uniform(0.3, 0.85),
            server_cpu=rng.uniform(0.8, 1.0),
        )
        for number in range(1, rounds + 1)
        for contender, values in medians.items()
    ]
    group = name.partition("-")[0]
    return Scenario(
        name=name, group=group, title=title, question=question, figures=figures, rounds=turns, **fields
    )


def make_peers() -> Results:
    """Return a run of eight servers in sixteen scenarios, with faults, gaps and busy load generators."""
    rng = random.Random(1)
    names = [each.name for each in PEERS]

    def each(*values: float) -> dict[str, tuple[float, ...]]:
        return {name: (value,) for name, value in zip(names, values, strict=False) if value}

    scenarios = []
    for clients, values in (
        (1, (21e3, 9.1e3, 19e3, 5.2e3, 1.9e3, 8.8e3, 5.9e3, 16.6e3)),
        (100, (310e3, 290e3, 120e3, 42e3, 21e3, 160e3, 90e3, 210e3)),
        (1000, (1.4e6, 1.16e6, 255e3, 48e3, 24e3, 330e3, 140e3, 650e3)),
        (10000, (1.3e6, 1.02e6, 240e3, 31e3, 0, 300e3, 120e3, 560e3)),
    ):
        scenarios.append(
            _scenario(
                rng, f"fanout-{clients}", f"One session, {clients:,} watchers",
                "How many events a second reach the watchers of one session while a client publishes as fast "
                "as it is answered?",
                [RATE], each(*values), parameters={"watchers": clients, "publishers": 1, "payload": "150 B"},
                skipped={} if clients < 10000 else {"quart": "It answers only 2,300 of 10,000 streams."},
            )
        )  # fmt: skip
    for round_ in scenarios[2].rounds:
        if round_.contender in ("loop", "sseserve") and round_.number != 2:
            round_.load = 0.97
    for publishers, values in (
        (1, (0, 9e3, 18e3, 5.1e3, 1.9e3, 9.2e3, 5.9e3, 16.6e3)),
        (8, (0, 9.2e3, 22e3, 5.4e3, 2e3, 9.5e3, 6.9e3, 21.5e3)),
    ):
        scenarios.append(
            _scenario(
                rng, f"many-{publishers}", f"1,000 sessions with one watcher each, {publishers} publishers",
                "How many events a second arrive when everybody watches work of their own?",
                [RATE], each(*values), parameters={"sessions": 1000, "publishers": publishers},
            )
        )  # fmt: skip
    for rate, watchers in ((10, 1000), (50, 1000), (100, 1000), (5, 10000)):
        delays = {
            "sseserve": (7.6, 11.0, 14.5, 21.0),
            "nchan": (7.7, 11.5, 16.0, 44.0),
            "sse-starlette": (31.0, 48.0, 62.0, 80.0),
            "better-sse": (9.0, 13.0, 18.0, 30.0),
            "mercure": (12.0, 22.0, 41.0, 90.0),
            "centrifugo": (4.0, 7.0, 13.0, 25.0),
        }
        if rate == 100:
            delays["quart"] = (900.0, 2000.0, 2600.0, 2900.0)
        scenario = _scenario(
            rng, f"paced-{rate}-{watchers}", f"{rate} events a second to {watchers:,} watchers",
            "How old is an event when a watcher has read it, counted from when it should have been sent?",
            QUANTILES, delays, 3, headline="p99",
        )  # fmt: skip
        scenarios.append(scenario)
    for turn in scenarios[-1].rounds:
        if turn.contender == "sse-starlette":
            turn.faults = ["watcher 812: event 17 is missing", "3 watchers were disconnected"]
        if turn.contender == "mercure" and turn.number == 2:
            turn.faults = ["watcher 9: event 4 came twice"]
    requests = Figure(key="rate", label="publish requests per second", unit="requests/s", better="more")
    streams = Figure(key="rate", label="new streams per second", unit="streams/s", better="more")
    memory = [
        Figure(key="user", label="user space", unit="KB", better="less", plot="stack"),
        Figure(key="kernel", label="kernel", unit="KB", better="less", plot="stack"),
        Figure(key="user+kernel", label="sum", unit="KB", better="less", plot="none"),
    ]
    held = {
        "sseserve": (6.2, 4.1), "nchan": (9.9, 4.1), "sse-starlette": (28.0, 4.2),
        "better-sse": (17.0, 4.1), "mercure": (39.0, 4.1), "centrifugo": (38.0, 4.1),
    }  # fmt: skip
    storm = [
        Figure(key="seconds", label="until all have everything", unit="s", better="less"),
        Figure(key="missed", label="events missed", unit="events", better="less"),
        Figure(
            key="reset", label="streams told to begin anew", unit="streams", better="neither", shown=False
        ),
    ]
    cpu = Figure(key="cpu", label="CPU time per million deliveries", unit="CPU s", better="less")
    scenarios += [
        _scenario(rng, "publish-1", "Publish requests, 1 connection", "How fast are publishers answered?",
                  [requests], each(0, 9.9e3, 20e3, 5.6e3, 2.1e3, 9.9e3, 6.2e3, 17e3)),
        _scenario(rng, "publish-16", "Publish requests, 16 connections", "How fast are publishers answered?",
                  [requests], each(0, 11e3, 28e3, 5.8e3, 2.2e3, 10.5e3, 9.4e3, 29e3)),
        _scenario(rng, "accept", "New streams", "How fast can watchers connect?",
                  [streams], each(0, 7.9e3, 18e3, 2.1e3, 900, 5.1e3, 5.5e3, 4e3),
                  notes=["At nchan's speed the load generator is nearly the limit."]),
        _scenario(rng, "storm", "10,000 reconnect at once and want 100 events each",
                  "How long until all have what they missed?", storm,
                  {"sseserve": (4.1, 0.0, 0.0), "nchan": (3.2, 0.0, 0.0), "mercure": (19.0, 0.0, 0.0)}, 3,
                  skipped={"sse-starlette": "It keeps no log.", "better-sse": "It keeps no log by default."}),
        _scenario(rng, "idle", "Memory of an idle stream", "What does it cost to keep a stream open?",
                  memory, held, 3, headline="user+kernel"),
        _scenario(rng, "cpu", "CPU time", "What does a million deliveries cost?", [cpu],
                  each(0.7, 0.9, 3.9, 21, 42, 3, 7.1, 1.5)),
    ]  # fmt: skip
    for scenario in scenarios:
        scenario.skipped["other"] = "not on PATH"
    return Results(
        command="peers", title="sseserve and other servers of Server-Sent Events",
        question="How fast is sseserve beside what one uses today?", started="2026-11-22T03:10:00Z",
        seconds=3120.0, subject="sseserve", machine=MACHINE,
        versions={"python": "3.11.7", "nchan": "1.3.6", "node": "22.1"}, contenders=PEERS,
        scenarios=scenarios,
        failures=["paced-5-10000: sse-starlette lost events in all rounds"],
    )  # fmt: skip


def make_transports() -> Results:
    """Return a run of five transports in twelve scenarios, with a decision table."""
    rng = random.Random(2)
    contenders = [
        Contender(name="sse", title="SSE"),
        Contender(name="ws", title="WebSocket"),
        Contender(name="h2", title="SSE over HTTP/2"),
        Contender(name="longpoll", title="long-poll"),
        Contender(name="poll", title="polling every 2 seconds"),
    ]
    delays = {"sse": 1.0, "ws": 1.02, "h2": 1.4, "longpoll": 1.9, "poll": 950.0}
    scenarios = []
    for network, base in (
        ("clean loopback", 0.4), ("50 ms delay", 51.0), ("1 % loss", 9.0), ("1 Mbit/s", 4.0),
        ("behind nginx, default configuration", 70.0), ("behind nginx, our configuration", 0.8),
    ):  # fmt: skip
        times = {
            name: tuple(
                base * share + (factor if factor > 9 else base * (factor - 1)) for share in (1, 1.6, 3, 5)
            )
            for name, factor in delays.items()
        }
        scenarios.append(
            _scenario(rng, f"delay-{len(scenarios)}", f"Delay: {network}", "How old is an event on arrival?",
                      QUANTILES, times, 3, headline="p99")
        )  # fmt: skip
    tables = (
        ("bytes-event", "Bytes per event", "bytes on the wire", "B", (210.0, 170.0, 190.0, 640.0, 1400.0)),
        (
            "bytes-idle",
            "Bytes per idle minute",
            "bytes on the wire",
            "B",
            (12.0, 18.0, 30.0, 1400.0, 19000.0),
        ),
        ("first", "Time to the first event", "time", "ms", (2.1, 3.3, 4.2, 2.2, 2.2)),
        ("recover", "Back after a cut", "time", "ms", (1010.0, 1020.0, 1012.0, 300.0, 1100.0)),
        (
            "missed",
            "Missed during a cut, without a cursor",
            "events",
            "events",
            (24.0, 24.0, 24.0, 25.0, 0.0),
        ),
        ("memory", "Memory", "resident memory per client", "KB", (6.2, 15.1, 29.0, 9.0, 1.0)),
    )
    for name, title, label, unit, values in tables:
        figure = Figure(key="value", label=label, unit=unit, better="less")
        medians = {each.name: (value,) for each, value in zip(contenders, values, strict=True)}
        scenarios.append(_scenario(rng, name, title, f"{title}?", [figure], medians, 3))
    return Results(
        command="transports", title="Ways to bring progress to a browser", question="SSE or WebSocket?",
        started="2026-11-22T04:00:00Z", seconds=900.0, quick=True, subject="sse", machine=MACHINE,
        versions={"python": "3.11.7"}, contenders=contenders, scenarios=scenarios,
        decisions=[
            Decision(work="Progress of a job in a browser", choice="SSE",
                     because="reconnects by itself; 210 B per event, WebSocket 170 B"),
            Decision(work="Clients that also send often", choice="WebSocket", because="one connection"),
            Decision(work="A proxy that buffers", choice="longpoll", because="the only one below 1 s there"),
        ],
    )  # fmt: skip
