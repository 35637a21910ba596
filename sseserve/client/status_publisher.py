"""Publish statuses from synchronous workers, such as Celery's, without ever stopping their work.

``StatusPublisher`` has the interface of the coaching assistant's class of that name, and publishes over HTTP
or through Redis.
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

from ..backoff import Backoff
from .errors import ClientError, ConnectionLost
from .messages import PublishResult
from .retry import RetryPolicy
from .status_targets import HTTPTarget, RedisClient, RedisTarget, Send
from .token import Token

__all__ = ["StatusPublisher"]

log = logging.getLogger(__name__)


class StatusPublisher:
    """Publishes the status of transcriptions to one server, or to all that read a Redis::

        publisher = StatusPublisher("http://127.0.0.1:8000")
        publisher = StatusPublisher("redis://127.0.0.1:6379/0")
        publisher = StatusPublisher(redis.Redis())
        publisher.publish_status_update(session_id, {"status": "processing", "progress": 10})

    Each update is applied exactly once, however often it has to be sent. One that cannot be published is
    logged and otherwise ignored, so that it does not stop the work. A call returns within
    ``timeout`` + ``retry_timeout`` seconds. Safe to use from several threads, and in processes forked
    after its creation.

    Through Redis there is no result, and only the server's log says that it has refused an update. One that
    nobody receives is sent again, as if Redis were away.

    Args:
        server: its URL, ``http://`` or ``https://``; or that of a Redis, ``redis://``, ``rediss://`` or
            ``unix://``, for which redis-py must be installed; or a synchronous client of redis-py, whose own
            timeouts and retries are part of ``timeout``.
        headers: sent with every request over HTTP.
        token: a bearer token for HTTP, or a function that returns one that is valid now, which is called for
            every attempt, in a thread.
        ca: path of the certificates (PEM) that https servers must be signed by; None: those of the variable
            ``SSL_CERT_FILE``, else those that the system trusts.
        retry_timeout: seconds to keep retrying an update after its first failure.
        timeout: seconds that one attempt may take.
        backoff: the delays between attempts.
        raise_errors: raise errors instead of logging them; see ``publish_status_update``.
        sleep: waits between attempts; its argument is in seconds.

    Raises:
        ValueError: ``token`` cannot be a token, or is for a Redis, whose password is in its URL; or ``ca``
            cannot be used, or is for a Redis, whose URL names it.
    """

    def __init__(
        self,
        server: str | RedisClient,
        *,
        headers: Mapping[str, str] | None = None,
        token: Token | None = None,
        ca: str | os.PathLike[str] | None = None,
        # Timeouts
        retry_timeout: float = 5.0,
        timeout: float = 5.0,
        backoff: Backoff | None = None,
        # Failures
        raise_errors: bool = False,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._target: HTTPTarget | RedisTarget
        if isinstance(server, str) and not server.startswith(("redis://", "rediss://", "unix://")):
            self._target = HTTPTarget(server, headers or {}, token, ca, timeout)
        else:
            if token is not None:
                raise ValueError("a token is for a server; the password of a Redis is in its URL")
            if ca is not None:
                raise ValueError("ca is for a server; that of a Redis is in its URL: ?ssl_ca_certs=FILE")
            self._target = RedisTarget(server, timeout)
        self._retry_timeout = retry_timeout
        self._timeout = timeout
        self._backoff = backoff or Backoff(initial=0.25, maximum=2.0)
        self._raise_errors = raise_errors
        self._sleep = sleep

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
        """Close the connections, but not a Redis client that was given; the next update opens new ones."""
        self._target.close()

    def publish_status_update(self, session_id: str, status_data: Mapping[str, Any]) -> PublishResult | None:
        """Publish one status update.

        Args:
            session_id: the session; any type whose ``str`` is its id.
            status_data: ``status``, ``progress`` (percent, 0 to 100), ``message``, and any further members,
                which the clients receive unchanged.

        Returns:
            The result, whose ``control`` is what the watchers request of the worker; None if the update
            could not be published, and always through Redis.

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

    def _publish(self, session_id: str, status_data: Mapping[str, Any]) -> PublishResult | None:
        address, send = self._target.prepare(session_id, dict(status_data))
        policy = RetryPolicy(address, self._retry_timeout, self._backoff)
        deadline = time.monotonic() + self._timeout + self._retry_timeout
        while True:
            try:
                return _attempt(send, min(self._timeout, deadline - time.monotonic()))
            except ClientError as error:
                delay = policy.next_delay(error, time.monotonic())
            self._sleep(delay)


def _attempt(send: Send, timeout: float) -> PublishResult | None:
    """Send an update and wait for its response for ``timeout`` seconds in all.

    Clients limit each phase and each read, but not their sum nor the name resolution. So a thread sends it,
    and is left to itself when the time is over; the next phase that fails ends it.
    """
    future: Future[PublishResult | None] = Future()

    def call() -> None:
        try:
            future.set_result(send())
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            future.set_exception(error)

    threading.Thread(target=call, name="sseserve status publisher", daemon=True).start()
    try:
        return future.result(timeout)
    except TimeoutError:
        raise ConnectionLost("timed out waiting for data from the server") from None
