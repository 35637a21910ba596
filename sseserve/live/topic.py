"""The live side of one session: who subscribes, and the events that wait for fan-out."""

from __future__ import annotations

import math

import trio

from ..dialects import Encoding
from ..model import Event, Session
from .bundle import Subscription
from .subscriber import Subscriber
from .throttle import Throttle

__all__ = ["Group", "Member", "Topic"]

Member = Subscriber | Subscription  # what is on a topic: one client, or a client's bundle


class Group:
    """The subscribers of a topic that share an encoding, and so the same bytes."""

    __slots__ = ("members", "throttle")

    def __init__(self) -> None:
        self.members: dict[Member, None] = {}
        self.throttle: Throttle | None = None  # where the dialect has one


class Topic:
    """The live side of one session. ``position`` is the last ``seq`` whose fan-out has begun."""

    __slots__ = (
        "backlog",
        "epoch",
        "groups",
        "has_pump",
        "has_session",
        "is_closed",
        "is_superseded",
        "is_waking",
        "last_event_at",
        "position",
        "publishers",
        "receive",
        "send",
        "session_id",
        "subscriber_count",
        "waiters",
        "wakes_again",
    )

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.epoch: str | None = None  # of its log, once it is known
        self.position = 0
        self.backlog = 0  # events in the channel
        self.has_pump = False
        self.has_session = False  # whether there is a session: some dialects' streams wait for one
        self.is_closed = False  # its session was deleted; a new one of the same id has a topic of its own
        self.is_superseded = False  # what follows in the log does not continue what was delivered here
        self.subscriber_count = 0
        self.groups: dict[Encoding, Group] = {}
        self.last_event_at = trio.current_time()
        self.waiters: set[trio.Event] = set()  # are set when something is published
        self.is_waking = False  # a task wakes those, as they are many
        self.wakes_again = False  # something has been published meanwhile
        self.publishers = trio.lowlevel.ParkingLot()  # wait until the backlog is smaller
        # Unbounded, as an event that is in the log must not be refused here; ``Broker.wait_for_capacity``
        # slows publishers down.
        self.send, self.receive = trio.open_memory_channel[tuple[Session, Event]](math.inf)

    def __repr__(self) -> str:
        return (
            f"<Topic {self.session_id!r} at {self.position}, {self.backlog} waiting, "
            f"{self.subscriber_count} subscribers>"
        )

    @property
    def is_idle(self) -> bool:
        """Whether nobody needs it."""
        return not (self.groups or self.has_pump or self.waiters or self.publishers)

    @property
    def members(self) -> list[Member]:
        """All subscribers of this moment, live or not."""
        return [member for group in self.groups.values() for member in group.members]

    def notify(self) -> None:
        """Wake the tasks that wait for something to be published."""
        for waiter in self.waiters:
            waiter.set()
