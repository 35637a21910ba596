"""Where ``StatusPublisher`` sends: a server over HTTP, or the Redis that servers read.

``prepare`` of a target encodes an update and returns the function that sends it, which may be called several
times, in any thread; the server records the update once.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import httpx
import msgspec

from ..extras import required_by
from .errors import ConnectionLost, RequestRejected, describe_cause, translate_httpx_errors
from .messages import PublishResult
from .publish_request import build_request, decode_response
from .tls import trusted_authorities
from .token import Bearer, Token

__all__ = ["HTTPTarget", "RedisClient", "RedisTarget", "Send"]

Send = Callable[[], PublishResult | None]


class RedisClient(Protocol):
    """What is used of a client of redis-py, or of one with its interface."""

    def publish(self, channel: str, message: bytes, /) -> Any:
        """Publish a message; return how many have received it."""


class HTTPTarget:
    """A server.

    Args:
        base_url: its URL.
        headers: sent with every request.
        token, ca: as for ``StatusPublisher``.
        timeout: seconds that each phase of a request may take.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        token: Token | None,
        ca: str | os.PathLike[str] | None,
        timeout: float,
    ) -> None:
        self._hooks = {} if token is None else {"request": [Bearer(token, base_url).add_to]}
        self._sessions_url = f"{base_url.rstrip('/')}/api/v1/sessions"
        self._headers = dict(headers)
        self._authorities = trusted_authorities(ca)
        self._timeout = timeout
        # By process id: connections that a forked process inherits belong to its parent. There is no lock,
        # which a fork would copy while another thread holds it.
        self._clients: dict[int, httpx.Client] = {}

    def prepare(self, session_id: str, status_data: Mapping[str, Any]) -> tuple[str, Send]:
        """Return the URL of an update, and what sends it there."""
        request = build_request(self._sessions_url, session_id, "status")
        body = msgspec.json.encode(dict(status_data))

        def send() -> PublishResult:
            with translate_httpx_errors():
                response = self.client().post(request.url, headers=request.headers, content=body)
            return decode_response(request.url, response)

        return request.url, send

    def client(self) -> httpx.Client:
        """Return the connections of this process."""
        pid = os.getpid()
        if (client := self._clients.get(pid)) is None:
            created = httpx.Client(
                headers=self._headers,
                timeout=self._timeout,
                event_hooks=self._hooks,
                verify=self._authorities,
            )
            client = self._clients.setdefault(pid, created)  # atomic: all threads get the same one
            if client is not created:
                created.close()
        return client

    def close(self) -> None:
        """Close the connections of this process."""
        if (client := self._clients.pop(os.getpid(), None)) is not None:
            client.close()


class RedisTarget:
    """The channel ``transcription:status:{id}`` of a Redis.

    Args:
        redis: its URL, or a client.
        timeout: seconds that one step of the client made for a URL may take.

    Raises:
        MissingExtra: redis-py is not installed, which is needed for a URL.
        TypeError: the client is one for asyncio, or none.
    """

    def __init__(self, redis: str | RedisClient, timeout: float) -> None:
        self._own = _connect(redis, timeout) if isinstance(redis, str) else None
        self._redis: Any = self._own or redis
        if not callable(getattr(self._redis, "publish", None)):
            raise TypeError(f"StatusPublisher needs a URL or a client of redis-py, not {redis!r}")
        if inspect.iscoroutinefunction(getattr(redis, "execute_command", None)):
            raise TypeError("StatusPublisher is for synchronous programs: give it a redis.Redis")

    def prepare(self, session_id: str, status_data: Mapping[str, Any]) -> tuple[str, Send]:
        """Return the channel of an update, and what publishes it there.

        Its time makes the message unlike all others: sent again, it is still the same to a server.
        """
        channel = f"transcription:status:{session_id}"
        members = {
            "session_id": session_id,
            "status": status_data.get("status"),
            "progress": status_data.get("progress"),
            "message": status_data.get("message"),
            "timestamp": datetime.now(UTC).isoformat(),
        }
        message = msgspec.json.encode({**members, **status_data})

        def send() -> None:
            try:
                receivers = self._redis.publish(channel, message)
            except Exception as error:
                raise _translate(error) from error
            # In a Cluster only those on one of its nodes are counted.
            if receivers == 0 and not hasattr(self._redis, "nodes_manager"):
                raise ConnectionLost("no server has subscribed to it")

        return channel, send

    def close(self) -> None:
        """Close the connections, unless the client is the caller's."""
        if self._own is not None:
            self._own.close()


def _connect(url: str, timeout: float) -> Any:
    """Make a client, which connects when it is used. Redis-py's own connections are safe in forks."""
    with required_by("StatusPublisher over Redis", "redis-publisher"):
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    return redis.Redis.from_url(
        url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
    )


def _translate(error: Exception) -> Exception:
    """Return what an error of redis-py is here. Other clients have errors of the same names."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "AuthenticationError" in names or ("ResponseError" in names and "BusyLoadingError" not in names):
        return RequestRejected(f"Redis refuses it: {error}", status=0)
    if names & {"ConnectionError", "TimeoutError", "OSError", "BusyLoadingError", "ReadOnlyError"}:
        return ConnectionLost(describe_cause(error))
    return error
