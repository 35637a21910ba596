"""Up to where the sessions have been delivered, and what continues there. Pure, but for the event of Trio."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import trio

from ...model import Event, Session
from ..base import Page

__all__ = ["Delivery", "Place", "Reading"]


class Reading(msgspec.Struct):
    """A page, and the nonces of its events, of the last event of the log and of the event before the page."""

    page: Page
    nonces: list[str]
    nonce: str
    nonce_before: str  # empty if it is not kept


class Delivery:
    """An append that is to be delivered. ``content`` returns None if it has to be read."""

    __slots__ = ("after", "content", "epoch", "first", "is_own", "last", "nonce", "replaces")

    def __init__(
        self,
        epoch: str,
        first: int,
        last: int,
        replaces: str,
        nonce: str,
        after: tuple[int, str],
        content: Callable[[], tuple[Session, Sequence[Event]] | None],
        *,
        is_own: bool,
    ) -> None:
        self.epoch = epoch
        self.first = first
        self.last = last
        self.replaces = replaces
        self.nonce = nonce
        self.after = after  # seq and nonce
        self.content = content
        self.is_own = is_own


class Place:
    """Up to which event a session has been delivered. ``epoch`` is None if there was no log."""

    __slots__ = (
        "epoch",
        "held",
        "is_catching_up",
        "is_followed",
        "is_known",
        "must_read",
        "nonce",
        "ready",
        "seq",
        "unfollowed_at",
    )

    def __init__(self) -> None:
        self.epoch: str | None = None
        self.seq = 0
        self.nonce = ""
        self.is_known = False
        self.is_followed = False
        self.unfollowed_at = 0.0
        self.ready = trio.Event()  # its channel is subscribed to, and the place is known
        self.is_catching_up = False
        self.must_read = False
        self.held: list[Delivery] = []

    def move(self, epoch: str | None, seq: int, nonce: str) -> None:
        """Take note that everything up to an event has been delivered."""
        self.epoch, self.seq, self.nonce, self.is_known = epoch, seq, nonce, True

    def is_past(self, delivery: Delivery) -> bool:
        """Return whether an append has been delivered already."""
        return delivery.epoch == self.epoch and delivery.last <= self.seq

    def is_before(self, delivery: Delivery) -> bool:
        """Return whether an append continues here."""
        if self.epoch is None:
            return delivery.first == 1 and not delivery.replaces
        before = self.seq, self.nonce
        return (delivery.replaces or delivery.epoch) == self.epoch and delivery.after == before
