"""Statuses from a push subscription of Google Cloud Pub/Sub."""

from __future__ import annotations

import logging

from ..dialects import PushDelivery
from ..engines import Repeated
from ..errors import InsufficientStorage, PayloadTooLarge, SseserveError, Unavailable
from ..http.messages import Request, Response, json_response, read_body, request_line
from ..http.publishing import Publishing
from ..http.routing import Match
from ..http.schemas import PubsubAccepted
from ..jsontext import decode
from ..metrics import Counters
from ..model import Receipt
from ..progress.tracker import IdempotencyKey, Tracker
from .dispatch import Handler

__all__ = ["PubsubHandlers"]

log = logging.getLogger(__name__)


class PubsubHandlers:
    """The handler of push deliveries.

    Args:
        tracker: knows which deliveries were applied.
        publishing: applies them.
        counters: counts the invalid ones.
        max_body: limit of a delivery, in bytes.
    """

    def __init__(
        self, tracker: Tracker, publishing: Publishing, counters: Counters, *, max_body: int
    ) -> None:
        self._tracker = tracker
        self._publishing = publishing
        self._counters = counters
        self._max_body = max_body

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {"pubsub": self.receive}

    async def receive(self, request: Request, match: Match) -> Response:
        """Apply a status update.

        Any response that is not a success makes Pub/Sub deliver the message again, so what is wrong with
        its content is acknowledged, and nothing else: a body that stops arriving may be whole next time.
        """
        try:
            body = await read_body(request, self._max_body)
        except PayloadTooLarge as error:
            return self._drop(request, error)
        try:
            receipt = await self._apply(body, match)
        except (Unavailable, InsufficientStorage):
            raise
        except SseserveError as error:
            return self._drop(request, error)
        return json_response(200, PubsubAccepted(receipt.id))

    def _measure(self, delivery: PushDelivery) -> None:
        """Note how long a message took from its publisher to the log."""
        if (published_at := delivery.published_at) is not None:
            self._counters.pubsub_messages += 1
            # Its clock is another one, and may be ahead.
            self._counters.pubsub_latency += max(0.0, self._tracker.clock() - published_at)

    def _drop(self, request: Request, error: SseserveError) -> Response:
        self._counters.invalid_messages += 1
        log.warning(request_line(request, "an invalid Pub/Sub message is dropped", error=str(error)))
        return Response(204)

    async def _apply(self, body: bytes, match: Match) -> Receipt:
        assert match.route.body is not None
        delivery: PushDelivery = decode(body, match.route.body)
        (session_id, update, raw), key = delivery.publication(), delivery.key
        if key is None:
            receipt = await self._publishing.publish(session_id, update, raw)
        elif (known := await self._tracker.engine.receipt(session_id, key)) is not None:
            return known
        else:
            try:
                receipt = await self._publishing.publish(session_id, update, raw, IdempotencyKey(key))
            except Repeated as repeated:
                return repeated.receipt
        self._measure(delivery)
        return receipt
