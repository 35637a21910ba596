"""Typed events from inside this process, in the words of an interaction."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import trio

from .dialects import Publication
from .dialects.interaction import InteractionBody
from .errors import Invalid
from .live.broker import Broker
from .model import Receipt
from .progress.tracker import Tracker

__all__ = ["Events"]

log = logging.getLogger(__name__)


class Events:
    """Publishes as ``POST /api/interaction/events/{id}`` does: ``await events.publish(id, type, data)``."""

    def __init__(self, tracker: Tracker, broker: Broker) -> None:
        self._tracker = tracker
        self._broker = broker

    async def publish(
        self,
        session_id: str,
        type: str,  # noqa: A002 - the event stream's own word
        data: Any = None,
        *,
        retry: int | None = None,
    ) -> Receipt:
        """Publish an event; with nobody listening it is kept for those who come, and logged.

        ``processing`` is progress, its ``progress`` a fraction. ``retry`` is in milliseconds.

        Raises:
            SessionEnded: the session has its terminal event.
            Invalid: the type or the data cannot be one.
        """
        if not self._broker.watched(session_id):
            log.info("no active listeners for session %s", session_id)
        try:
            raw = msgspec.Raw(msgspec.json.encode(data))
        except (TypeError, ValueError, RecursionError) as error:
            raise Invalid(f"the data cannot be written as JSON: {error}") from None
        # A caller in this process may have nothing else to wait for.
        await trio.lowlevel.checkpoint()
        publication = Publication(session_id, b"", self._tracker.clock())
        change = InteractionBody(type, raw, retry).change(publication)
        receipt = await self._tracker.apply(session_id, change)
        await self._broker.room(session_id)
        return receipt
