"""Scenarios: how late events are on loopback, and how much memory an idle client takes."""

from __future__ import annotations

from collections.abc import Iterator

from ..report.progress import Progress
from ..results import Figure, Round, Scenario
from .bed import Bed, Delivery, Plan, describe

__all__ = ["DELIVERY", "latency_steps", "measure_latency", "measure_memory", "memory_steps"]

LATENCIES = [
    Figure(key=key, label=f"latency, {label}", unit="ms", better="less", plot="quantiles")
    for key, label in (("p50", "median"), ("p90", "90 %"), ("p99", "99 %"), ("max", "maximum"))
]
DELIVERY = [
    *LATENCIES,
    Figure(key="cpu", label="server CPU per 1,000 deliveries", unit="ms", better="less"),
    Figure(key="bytes", label="bytes per delivery", unit="B", better="less"),
    Figure(key="skipped", label="updates never seen", unit="%", better="less", plot="none"),
]


def latency_steps(plan: Plan) -> int:
    """Return the number of steps."""
    return len(plan.loads) * plan.rounds * len(plan.transports)


def measure_latency(plan: Plan, progress: Progress) -> Iterator[Scenario]:
    """Publish at several rates to several numbers of clients of one session."""
    for watchers, rate in plan.loads:
        events, clients = "event" if rate == 1 else "events", "client" if watchers == 1 else "clients"
        scenario = Scenario(
            name=f"latency-{watchers}-{rate:g}",
            group="latency",
            title=f"Latency: {watchers:,} {clients}, {rate:g} {events} per second",
            question="How old is an update when a client has read it, and what does that cost?",
            parameters={"clients": watchers, "events per second": rate, "network": "loopback"},
            figures=DELIVERY,
            notes=[
                "From the time when it was to be published; if it is skipped, until a newer one is seen.",
                "The CPU includes that of the publish requests; a skipped update counts as a delivery.",
                "Bytes are payload of TCP in both directions, with the headers of a browser's requests.",
            ],
        )
        with Bed() as bed:
            for number in range(1, plan.rounds + 1):
                for transport in plan.transports:
                    seconds = max(plan.seconds, 3 / rate)
                    progress.start(f"{scenario.title}: {transport}, round {number} of {plan.rounds}")
                    delivery = Delivery(bed, transport, watchers=watchers, rate=rate, seconds=seconds)
                    turn = delivery.round(number)
                    scenario.rounds.append(turn)
                    progress.finish(f"{scenario.name} {describe(turn)}")
        yield scenario


def memory_steps(plan: Plan) -> int:
    """Return the number of steps."""
    return len(plan.transports)


def measure_memory(plan: Plan, progress: Progress) -> Iterator[Scenario]:
    """Open idle clients on a new server, and compare its memory."""
    scenario = Scenario(
        name="memory",
        group="memory",
        title=f"Memory of the server for each of {plan.idle_clients:,} idle clients",
        question="What does a client cost that waits for something to happen?",
        parameters={"clients": plan.idle_clients},
        figures=[Figure(key="memory", label="resident memory per client", unit="KB", better="less")],
        notes=[
            "Resident memory of the process, before and after the clients have come, without the kernel's.",
            "Clients of polling keep their connection between two polls, as browsers do.",
        ],
    )
    for transport in plan.transports:
        progress.start(f"{scenario.title}: {transport}")
        with Bed() as bed:
            session = bed.new_session()
            bed.open(transport, session, 20)  # what is allocated once
            bed.clients.call("close")
            before = bed.server.stable_rss()
            bed.open(transport, session, plan.idle_clients)
            seen = bed.clients.call("watch", until=0, seconds=plan.settle)
            memory = (bed.server.rss() - before) / 1024 / plan.idle_clients
        scenario.rounds.append(
            Round(contender=transport, number=1, values={"memory": memory}, load=seen["load"])
        )
        progress.finish(f"memory {transport}: {memory:.1f} KB per client")
    yield scenario
