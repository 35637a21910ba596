"""Publish statuses from synchronous workers, such as Celery's, without ever stopping their work.

``StatusPublisher`` has the interface of the coaching assistant's class of that name, and publishes over HTTP.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from .backoff import Backoff
from .errors import ClientError, ConnectionLost, translate_httpx_errors
from .messages import PublishResult
from .publish_request import PublishRequest, build_request, decode_response
from .retry import RetryPolicy

__all__ = ["StatusPublisher"]

log = logging.getLogger(__name__)


class StatusPublisher:
    """Publishes the status of transcriptions to one server::

        publisher = StatusPublisher("http://127.0.0.1:8000")
        publisher.publish_status_update(session_id, {"status": "processing", "progress": 10})

    Each update is applied exactly once, however often it has to be sent. One that cannot be published is
    logged and otherwise ignored, so that it does not stop the work. A call returns within
    ``timeout`` + ``retry_timeout`` seconds. Safe to use from several threads, and in processes forked
    after its creation.

    Args:
        base_url: the server's URL, ``http://`` or ``https://``.
        headers: sent with every request.
        retry_timeout: seconds to keep retrying an update after its first failure.
        timeout: seconds that one attempt may take.
        backoff: the delays between attempts.
        raise_errors: raise errors instead of logging them; see ``publish_status_update``.
        sleep: waits between attempts; its argument is in seconds.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        # Timeouts
        retry_timeout: float = 5.0,
        timeout: float = 5.0,
        backoff: Backoff | None = None,
        # Failures
        raise_errors: bool = False,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._sessions_url = f"{base_url.rstrip('/')}/api/v1/sessions"
        self._headers = dict(headers or {})
        self._retry_timeout = retry_timeout
        self._timeout = timeout
        self._backoff = backoff or Backoff(initial=0.25, maximum=2.0)
        self._raise_errors = raise_errors
        self._sleep = sleep
        # By process id: connections that a forked process inherits belong to its parent. There is no lock,
        # which a fork would copy while another thread holds it.
        self._clients: dict[int, httpx.Client] = {}

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
        """Close the connections; the next update opens new ones."""
        if (client := self._clients.pop(os.getpid(), None)) is not None:
            client.close()

    def publish_status_update(self, session_id: str, status_data: Mapping[str, Any]) -> PublishResult | None:
        """Publish one status update.

        Args:
            session_id: the session; any type whose ``str`` is its id.
            status_data: ``status``, ``progress`` (percent, 0 to 100), ``message``, and any further members,
                which the clients receive unchanged.

        Returns:
            The result, whose ``control`` is what the watchers request of the worker; None if the update
            could not be published.

        Raises:
            ClientError: ``CannotConnect``, ``RequestRejected`` or ``InvalidResponse``.
            TypeError, ValueError, RecursionError: JSON cannot represent the data.
            RuntimeError: another thread has closed the publisher, or no thread can be started.

        All of them only with ``raise_errors``.
        """
        try:
            return self._publish(str(session_id), status_data)
        except (ClientError, TypeError, ValueError, RuntimeError) as error:
            if self._raise_errors:
                raise
            log.warning("cannot publish the status of session %s: %s", session_id, error)
            return None

    def _publish(self, session_id: str, status_data: Mapping[str, Any]) -> PublishResult:
        request = build_request(self._sessions_url, session_id, "status")
        body = msgspec.json.encode(dict(status_data))
        policy = RetryPolicy(request.url, self._retry_timeout, self._backoff)
        deadline = time.monotonic() + self._timeout + self._retry_timeout
        while True:
            try:
                return self._attempt(request, body, min(self._timeout, deadline - time.monotonic()))
            except ClientError as error:
                delay = policy.next_delay(error, time.monotonic())
            self._sleep(delay)

    def _attempt(self, request: PublishRequest, body: bytes, timeout: float) -> PublishResult:
        """Send the request and wait for its response for ``timeout`` seconds in all.

        httpx limits each phase and each read, but not their sum nor the name resolution. So a thread sends
        the request, and is left to itself when the time is over; the next phase that fails ends it.
        """
        client = self._client()
        future: Future[httpx.Response] = Future()

        def send() -> None:
            try:
                with translate_httpx_errors():
                    future.set_result(client.post(request.url, headers=request.headers, content=body))
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                future.set_exception(error)

        threading.Thread(target=send, name="sseserve status publisher", daemon=True).start()
        try:
            response = future.result(timeout)
        except TimeoutError:
            raise ConnectionLost("timed out waiting for data from the server") from None
        return decode_response(request.url, response)

    def _client(self) -> httpx.Client:
        pid = os.getpid()
        if (client := self._clients.get(pid)) is None:
            created = httpx.Client(headers=self._headers, timeout=self._timeout)
            client = self._clients.setdefault(pid, created)  # atomic: all threads get the same one
            if client is not created:
                created.close()
        return client
