"""How much is measured: a full run, a quick one, and those of tests."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QUICK", "Plan"]


@dataclass(frozen=True)
class Plan:
    """The parameters of a run: times in seconds, rates in events per second, sizes in bytes.

    ``rounds`` are those of the stages that have no number of their own; a stage with 0 is run only if it is
    named. ``variant_rounds`` are those of variants of other contenders.
    """

    size: int = 150  # of a payload
    rounds: int = 2
    variant_rounds: int = 1
    patience: float = 6.0  # if no event arrives for so long, the missing events are lost
    fanout_clients: tuple[int, ...] = (1, 100, 1000)
    fanout_publishers: int = 8  # the second number, with the most clients
    fanout_seconds: float = 1.5
    many_rounds: int = 3
    many_channels: int = 1000
    many_publishers: tuple[int, ...] = (1, 8, 32)
    many_seconds: float = 1.5
    paced_clients: int = 1000
    paced_rates: tuple[float, ...] = (10.0, 50.0, 100.0)
    paced_seconds: float = 2.0
    paced_events: int = 30  # at least, if that takes longer
    publish_connections: tuple[int, ...] = (1, 16)
    publish_seconds: float = 1.0
    streams: int = 10_000
    streams_rate: float = 5.0
    streams_seconds: float = 4.0
    storm_events: int = 100
    stalled_rounds: int = 1
    stalled_share: float = 0.1
    stalled_rate: float = 50.0
    stalled_size: int = 1000
    stalled_seconds: float = 8.0
    payload_rounds: int = 1
    payload_sizes: tuple[int, ...] = (64, 1024, 16_384)
    payload_seconds: float = 1.5
    payload_bytes: int = (
        960 * 1024
    )  # of all events of a round: what a server can keep for a client that is slow


QUICK = Plan(
    rounds=1,
    variant_rounds=0,
    fanout_clients=(500,),
    fanout_seconds=0.5,
    many_rounds=1,
    many_channels=300,
    many_publishers=(1, 8),
    many_seconds=0.5,
    paced_clients=300,
    paced_rates=(50.0,),
    paced_seconds=0.5,
    paced_events=0,
    publish_seconds=0.3,
    streams=500,
    streams_seconds=1.0,
    stalled_rounds=0,
    stalled_seconds=3.0,
    payload_rounds=0,
    payload_sizes=(64, 16_384),
    payload_seconds=0.5,
)
