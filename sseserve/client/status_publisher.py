"""Statuses from workers that are not asynchronous, such as Celery's: one call, which never harms the work.

``StatusPublisher`` is the coaching assistant's, over HTTP: the same call with the same arguments.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
import msgspec

from .backoff import Backoff
from .errors import BadAnswer, CannotConnect, ClientError, ConnectionLost, Refused, refusal, translated
from .messages import Receipt

__all__ = ["StatusPublisher"]

log = logging.getLogger(__name__)

_receipt = msgspec.json.Decoder(Receipt)


class StatusPublisher:
    """Publishes the status of transcriptions to one server::

        publisher = StatusPublisher("http://127.0.0.1:8000")
        publisher.publish_status_update(session_id, {"status": "processing", "progress": 10})

    Each update is applied once, however often it has to be sent. One that could not be published is logged
    and passed over, for it must not end the work that it speaks of. A call returns within about
    ``patience`` + ``timeout`` seconds. It may be used by several threads, and in processes that were forked
    after it was made.

    Args:
        base_url: where the server is.
        headers: to send with every request.
        patience: how long an update is tried again after its first failure, in seconds.
        timeout: how long one attempt may wait for its answer, in seconds.
        backoff: how long to wait between attempts.
        raise_errors: raise ``CannotConnect`` and ``Refused`` (``SessionEnded`` among them) instead of
            logging them, and what JSON says of a status that it cannot hold.
        sleep: waits between attempts; takes seconds.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        # Times
        patience: float = 5.0,
        timeout: float = 5.0,
        backoff: Backoff | None = None,
        # Failures
        raise_errors: bool = False,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._base = base_url.rstrip("/")
        self._headers = dict(headers or {})
        self._patience = patience
        self._timeout = timeout
        self._backoff = backoff or Backoff(first=0.25, most=2.0)
        self._raise_errors = raise_errors
        self._sleep = sleep
        self._http: httpx.Client | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections; the next update opens new ones."""
        if self._http is not None and self._pid == os.getpid():
            self._http.close()
        self._http = None

    def publish_status_update(self, session_id: str, status_data: Mapping[str, Any]) -> Receipt | None:
        """Publish ``status``, ``progress`` (percent), ``message`` and whatever else clients shall get.

        Returns what the watchers ask of the worker, or None if the update could not be published.
        """
        try:
            return self._publish(str(session_id), status_data)
        except (ClientError, TypeError, ValueError, RecursionError) as error:
            if self._raise_errors:
                raise
            log.warning("cannot publish a status of session %s: %s", session_id, error)
            return None

    def _publish(self, session_id: str, status_data: Mapping[str, Any]) -> Receipt:
        url = f"{self._base}/api/v1/sessions/{quote(session_id, safe='')}/status"
        body = msgspec.json.encode(dict(status_data))
        headers = {"Content-Type": "application/json", "Idempotency-Key": secrets.token_hex(16)}
        failures, waited, began = 0, 0.0, math.inf
        while True:
            try:
                return self._attempt(url, headers, body)
            except ConnectionLost as error:
                lost = error
            except Refused as error:
                # The attempt before, which we have given up, is still under way over there.
                if error.code != "conflict":
                    raise
                lost = ConnectionLost(error.message)
            now = time.monotonic()
            began = min(began, now)
            delay = self._backoff.delay(failures, lost.retry_after)
            waited += delay
            if max(waited, now - began + delay) >= self._patience:
                raise CannotConnect(f"cannot publish to {url}: {lost}") from lost
            failures += 1
            self._sleep(delay)

    def _attempt(self, url: str, headers: dict[str, str], body: bytes) -> Receipt:
        with translated():
            answer = self._client().post(url, headers=headers, content=body)
        if not answer.is_success:
            raise refusal(answer.status_code, answer.headers, answer.content)
        try:
            return _receipt.decode(answer.content)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise BadAnswer(f"{url} did not answer with a receipt: {error}") from error

    def _client(self) -> httpx.Client:
        # A connection that a forked process inherits is its parent's.
        if self._http is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._http = httpx.Client(headers=self._headers, timeout=self._timeout)
        return self._http
