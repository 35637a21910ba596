"""An issuer's public keys, fetched from its URL (RFC 7517, section 5).

Guarantees:

- There is one fetch at a time, and none within ``MIN_INTERVAL`` of the one before, however many tokens name
  keys that are not known, and also if it has failed.
- A request waits ``PATIENCE`` at most, and only for a key that is not known.
- A fetch that fails changes nothing: the keys stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import httpx
import trio

from ..errors import ConfigError, Unavailable
from ..http.origins import is_loopback
from .keys import Key, read_jwks

__all__ = ["RemoteKeys"]

log = logging.getLogger(__name__)

MAX_SIZE = 256 * 1024  # bytes of a response
TIMEOUT = 10.0  # seconds for a fetch
PATIENCE = 5.0  # seconds that a request waits for one
MIN_INTERVAL = 10.0  # seconds from the end of a fetch to the next one
MAX_AGE = 600.0  # seconds after which the keys are fetched again
RETRY = 30.0  # seconds, after a failure


class RemoteKeys:
    """The keys of one URL; ``run`` fetches them.

    Args:
        url: with ``https``, or ``http`` to the loopback interface.
        name: what its setting is called, for errors.
        max_age: seconds after which the keys are fetched again.

    Raises:
        ConfigError: it is another URL.
    """

    def __init__(self, url: str, name: str, *, max_age: float = MAX_AGE) -> None:
        try:
            parts = urlsplit(url)
            is_safe = parts.scheme == "https" or (
                parts.scheme == "http" and is_loopback(parts.hostname or "")
            )
            is_valid = is_safe and bool(parts.hostname) and not parts.username and parts.port != 0
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ConfigError(
                f"{name} must be an https URL without credentials, or an http URL of the loopback interface: "
                "who could change the keys on their way could sign tokens"
            )
        self.url = self.identity = url
        self._shown = url.partition("?")[0]  # what follows may be a secret
        self.on_change: Callable[[], None] = lambda: None
        self._max_age = max_age
        self._keys: list[Key] | None = None  # None: they were never fetched
        self._is_fetching = False
        self._next_fetch = -1.0  # not before this time, by Trio's clock
        self._wanted = trio.Event()
        self._fetched = trio.Event()

    async def find(self, key_id: str | None) -> Sequence[Key]:
        """Return the keys that a token may be signed with, whose header has this ``kid``.

        A token without one can be verified only by a set with a single key.

        Raises:
            Unavailable: the keys could not be fetched yet.
        """
        found = self._matching(key_id)
        is_known = bool(found) or (key_id is None and self._keys is not None)
        if not is_known and (self._is_fetching or trio.current_time() >= self._next_fetch):
            self._wanted.set()
            with trio.move_on_after(PATIENCE):
                await self._fetched.wait()
            found = self._matching(key_id)
        if self._keys is None:
            raise Unavailable("the keys that tokens are verified with cannot be fetched; see the server log")
        return found

    def _matching(self, key_id: str | None) -> Sequence[Key]:
        keys = self._keys or []
        if key_id is None:
            return keys if len(keys) == 1 else ()
        return [key for key in keys if key.key_id == key_id]

    async def run(self) -> None:
        """Fetch the keys at once, when a request wants them, and when they are old; for ever."""
        client = httpx.AsyncClient(
            timeout=TIMEOUT,
            limits=httpx.Limits(max_keepalive_connections=0),
            follow_redirects=False,
            trust_env=self.url.startswith("https:"),  # no proxy is on the loopback interface
        )
        async with client:
            while True:
                self._is_fetching = True
                has_succeeded = await self._fetch(client)
                self._is_fetching = False
                self._next_fetch = trio.current_time() + MIN_INTERVAL
                self._fetched.set()
                self._wanted, self._fetched = trio.Event(), trio.Event()
                with trio.move_on_after(self._max_age if has_succeeded else RETRY):
                    await self._wanted.wait()

    async def _fetch(self, client: httpx.AsyncClient) -> bool:
        try:
            with trio.fail_after(TIMEOUT):
                keys = read_jwks(await self._download(client))
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, trio.TooSlowError) as error:
            kept = "" if self._keys is None else "; the keys that are known stay in use"
            reason = str(error) or type(error).__name__
            log.error("cannot fetch the keys of tokens from %s: %s%s", self._shown, reason, kept)
            return False
        if not keys:
            log.error("no key of %s can verify tokens, so all are refused", self._shown)
        if keys != self._keys:
            self._keys = keys
            self.on_change()
        return True

    async def _download(self, client: httpx.AsyncClient) -> bytes:
        """Return the body, as it is: a small one that is compressed may become a large one."""
        headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
        body = bytearray()
        async with client.stream("GET", self.url, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"the response is {response.status_code}")
            with trio.CancelScope() as scope:
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > MAX_SIZE:
                        # Raised where httpcore reads; raised here, its generators would not be closed.
                        scope.cancel()
            if len(body) > MAX_SIZE:
                raise ValueError(f"the response is larger than {MAX_SIZE} bytes")
        return bytes(body)
