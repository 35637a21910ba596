"""The scenarios: what each asks, with which figures, and in which stage it is measured."""

from __future__ import annotations

from ..results import Figure, Scenario
from .plan import Plan
from .stages import (
    STORM_CONCURRENCY,
    Stage,
    run_fanout,
    run_many,
    run_paced,
    run_payload,
    run_publish,
    run_stalled,
    run_storm,
    run_streams,
)

__all__ = ["GROUPS", "STAGES"]

GROUPS = ("many", "fanout", "paced", "publish", "accept", "idle", "storm", "stalled", "payload")

_RATE = Figure(key="rate", label="deliveries per second", unit="deliveries/s", better="more")
_CPU = Figure(
    key="cpu", label="CPU seconds of the server per million deliveries", unit="CPU s", better="less"
)
_P50, _P90, _P99, _MAX = (
    Figure(
        key=key, label=f"age of an event at the client, {label}", unit="ms", better="less", plot="quantiles"
    )
    for key, label in (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("max", "maximum"))
)
_REACHED = Figure(
    key="publishes",
    label="events per second that were published",
    unit="events/s",
    better="more",
    plot="none",
)


_CLOSED_LOOP = (
    "Each publisher waits for the response before it publishes again. Time runs from the first publish until "
    "the last client has the last event."
)
_AGE = (
    "The age counts from the time when the event was to be published, also if the publisher had to wait for "
    "an earlier response."
)
_USER_MEMORY = (
    "Of the processes: resident memory after minus before, divided by the streams; of several processes the "
    "proportional share. nginx allocates the slots of its connections when it starts: they are not counted."
)
_KERNEL_MEMORY = (
    "Of the kernel: growth of its objects (Slab in /proc/meminfo) and of TCP's buffers (/proc/net/sockstat) "
    "on the whole machine. So it has the clients' sockets, too, which are the same for all servers."
)
_STALLED = (
    "Stalled clients have the segment size of Ethernet and a small receive buffer: over plain loopback the "
    "kernel buffers more than a megabyte for each of them before any stalls."
)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _many(plan: Plan) -> list[Scenario]:
    return [
        Scenario(
            name=f"many-{publishers}",
            group="many",
            title=f"{plan.many_channels:,} sessions with one client each, {_count(publishers, 'publisher')}",
            question="How many progress updates can be passed on when everybody watches work of their own?",
            figures=[_RATE, _CPU],
            parameters={
                "sessions": plan.many_channels,
                "clients": plan.many_channels,
                "publishers": publishers,
                "payload": f"{plan.size} B",
            },
            notes=[_CLOSED_LOOP],
        )
        for publishers in plan.many_publishers
    ]


def _fanout_scenario(clients: int, publishers: int, plan: Plan) -> Scenario:
    return Scenario(
        name=f"fanout-{clients}-{publishers}",
        group="fanout",
        title=f"One session with {_count(clients, 'client')}, {_count(publishers, 'publisher')}",
        question="How many events can be delivered when all watch the same work?",
        figures=[_RATE, _CPU],
        parameters={"clients": clients, "publishers": publishers, "payload": f"{plan.size} B"},
        notes=[_CLOSED_LOOP],
    )


def _fanout(plan: Plan) -> list[Scenario]:
    most = max(plan.fanout_clients)
    pairs = [(clients, 1) for clients in plan.fanout_clients] + [(most, plan.fanout_publishers)]
    return [_fanout_scenario(clients, publishers, plan) for clients, publishers in pairs]


def _paced_scenario(name: str, rate: float, clients: int, plan: Plan) -> Scenario:
    return Scenario(
        name=name,
        group="paced",
        title=f"{rate:g} events/s to {_count(clients, 'client')}",
        question="How old is an event when a client has read it, at a rate that leaves the server time?",
        figures=[_P50, _P90, _P99, _MAX, _REACHED, _CPU],
        headline="p99",
        parameters={"clients": clients, "rate": f"{rate:g} events/s", "payload": f"{plan.size} B"},
        notes=[_AGE],
    )


def _paced(plan: Plan) -> list[Scenario]:
    return [_paced_scenario(f"paced-{rate:g}", rate, plan.paced_clients, plan) for rate in plan.paced_rates]


def _publish(plan: Plan) -> list[Scenario]:
    figures = [
        Figure(key="rate", label="events published per second", unit="events/s", better="more"),
        Figure(key="cpu", label="CPU seconds of the server per million events", unit="CPU s", better="less"),
    ]
    scenarios = [
        Scenario(
            name=f"publish-{connections}",
            group="publish",
            title=f"Publishing from {_count(connections, 'connection')}, nobody watches",
            question="How fast does the server take events?",
            figures=figures,
            parameters={"publishers": connections, "payload": f"{plan.size} B"},
        )
        for connections in plan.publish_connections
    ]
    lines = Scenario(
        name="publish-lines",
        group="publish",
        title="Publishing 100 events in each request, nobody watches",
        question="How fast does the server take events that come together?",
        figures=figures,
        parameters={"publishers": 1, "events in a request": 100, "payload": f"{plan.size} B"},
    )
    return [*scenarios, lines]


def _streams(plan: Plan) -> list[Scenario]:
    accept = Scenario(
        name="accept",
        group="accept",
        title="New streams per second",
        question="How fast do clients get their streams?",
        figures=[
            Figure(key="rate", label="new streams per second", unit="streams/s", better="more"),
            Figure(key="seconds", label="until all are open", unit="s", better="less", shown=False),
        ],
        parameters={"streams": plan.streams, "at the same time": 64},
        notes=["A stream counts once the head of the response and the first bytes of the body have arrived."],
    )
    idle = Scenario(
        name="idle",
        group="idle",
        title=f"Memory of an idle stream, of {plan.streams:,}",
        question="How much memory does a client cost that waits for something to happen?",
        figures=[
            Figure(key="user", label="of the server's processes", unit="KB", better="less", plot="stack"),
            Figure(
                key="kernel", label="of the kernel, for both ends", unit="KB", better="less", plot="stack"
            ),
            Figure(key="user+kernel", label="of both together", unit="KB", better="less", plot="none"),
        ],
        headline="user+kernel",
        parameters={"streams": plan.streams},
        notes=[_USER_MEMORY, _KERNEL_MEMORY],
    )
    paced = _paced_scenario(
        f"paced-{plan.streams_rate:g}-{plan.streams}", plan.streams_rate, plan.streams, plan
    )
    return [accept, idle, paced, _fanout_scenario(plan.streams, 1, plan)]


def _storm(plan: Plan) -> list[Scenario]:
    return [
        Scenario(
            name="storm",
            group="storm",
            title=f"{plan.streams:,} clients come back, each has missed {_count(plan.storm_events, 'event')}",
            question="How soon is all well again after a deployment, or when a network is back?",
            figures=[
                Figure(key="seconds", label="until all clients have everything", unit="s", better="less"),
                Figure(key="rate", label="clients per second", unit="clients/s", better="more"),
                Figure(key="p50", label="wait of a client, p50", unit="s", better="less", plot="none"),
                Figure(key="p99", label="wait of a client, p99", unit="s", better="less", plot="none"),
            ],
            parameters={
                "clients": plan.streams,
                "at the same time": STORM_CONCURRENCY,
                "events to replay": plan.storm_events,
                "payload": f"{plan.size} B",
            },
            notes=["Each client sends the Last-Event-ID of the event before those that it has missed."],
        )
    ]


def _stalled(plan: Plan) -> list[Scenario]:
    stalled = round(plan.paced_clients * plan.stalled_share)
    return [
        Scenario(
            name="stalled",
            group="stalled",
            title=(
                f"{plan.stalled_rate:g} events/s to {_count(plan.paced_clients, 'client')}, "
                f"beside {stalled} that do not read"
            ),
            question="What do clients on a bad network do to the others, and to the server's memory?",
            figures=[
                _P50,
                _P99,
                _MAX,
                Figure(key="alone", label="p99 without them", unit="ms", better="less", plot="none"),
                Figure(key="growth", label="peak growth of the server's memory", unit="MB", better="less"),
                Figure(
                    key="cut",
                    label="stalled clients disconnected",
                    unit="clients",
                    better="neither",
                    plot="none",
                ),
                _REACHED,
            ],
            headline="p99",
            parameters={
                "clients": plan.paced_clients,
                "stalled": stalled,
                "rate": f"{plan.stalled_rate:g} events/s",
                "payload": f"{plan.stalled_size} B",
            },
            notes=[_STALLED],
        )
    ]


def _payload(plan: Plan) -> list[Scenario]:
    return [
        Scenario(
            name=f"payload-{size}",
            group="payload",
            title=f"Payloads of {size:,} bytes to {_count(plan.paced_clients, 'client')}",
            question="What does the size of an event change?",
            figures=[
                _RATE,
                Figure(key="bandwidth", label="payload delivered", unit="MB/s", better="more", plot="none"),
                _CPU,
            ],
            parameters={
                "clients": plan.paced_clients,
                "publishers": 1,
                "payload": f"{size} B",
                "events": f"at most {plan.payload_bytes // size:,}",
            },
            notes=["No more is published than a server can keep for a client that reads slowly."],
        )
        for size in plan.payload_sizes
    ]


STAGES = (
    Stage(
        name="many",
        run=run_many,
        scenarios=_many,
        rounds=lambda plan: plan.many_rounds,
        seconds=lambda plan: 1.5 + len(plan.many_publishers) * (plan.many_seconds + 0.7),
        channels=lambda plan: [f"bench-{number}" for number in range(plan.many_channels)],
    ),
    Stage(
        name="fanout",
        run=run_fanout,
        scenarios=_fanout,
        rounds=lambda plan: plan.rounds,
        seconds=lambda plan: 1.5 + (len(plan.fanout_clients) + 1) * (plan.fanout_seconds + 0.7),
    ),
    Stage(
        name="paced",
        run=run_paced,
        scenarios=_paced,
        rounds=lambda plan: plan.rounds,
        seconds=lambda plan: 1.5 + len(plan.paced_rates) * (plan.paced_seconds + 0.7),
    ),
    Stage(
        name="publish",
        run=run_publish,
        scenarios=_publish,
        rounds=lambda plan: plan.rounds,
        seconds=lambda plan: 1 + 2.5 * plan.publish_seconds,
    ),
    Stage(
        name="streams",
        run=run_streams,
        scenarios=_streams,
        rounds=lambda plan: plan.rounds,
        seconds=lambda plan: 3 + plan.streams / 1500 + plan.streams_seconds + plan.fanout_seconds,
    ),
    Stage(
        name="storm",
        run=run_storm,
        scenarios=_storm,
        unsupported=lambda peer: peer.no_replay,
        rounds=lambda plan: plan.rounds,
        seconds=lambda plan: 2 + plan.streams / 2000,
    ),
    Stage(
        name="stalled",
        run=run_stalled,
        scenarios=_stalled,
        rounds=lambda plan: plan.stalled_rounds,
        seconds=lambda plan: 4 + 1.5 * plan.stalled_seconds,
    ),
    Stage(
        name="payload",
        run=run_payload,
        scenarios=_payload,
        rounds=lambda plan: plan.payload_rounds,
        seconds=lambda plan: 1.5 + len(plan.payload_sizes) * (plan.payload_seconds + 0.7),
    ),
)
