"""How many large responses are sent at once to the clients of one address.

A client that asks for many and reads none would have all of them kept for it, until its sends time out.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import trio

from ..http.messages import Request, Response

__all__ = ["AT_ONCE", "LARGE", "Turn", "Turns"]

LARGE = 32 * 1024  # bytes
AT_ONCE = 32


class Turn:
    """That of one response; ``end`` it when the response has been sent, however that ends."""

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: trio.Semaphore | None = None

    def begin(self, slots: trio.Semaphore) -> None:
        """Note that a slot was taken."""
        self._slots = slots

    def end(self) -> None:
        """Give the slot back, if one was taken."""
        if self._slots is not None:
            self._slots.release()
            self._slots = None


class Turns:
    """Those of all addresses.

    Args:
        limited: returns by which name an address is counted; None: it is not limited.
    """

    def __init__(self, limited: Callable[[str], str | None]) -> None:
        self._limited = limited
        self._slots: WeakValueDictionary[str, trio.Semaphore] = WeakValueDictionary()

    def slots(self, request: Request, response: Response) -> trio.Semaphore | None:
        """Return of what a response needs one while it is sent; None: it may be sent at once."""
        if request.method != "GET" or len(response.body or b"") <= LARGE:
            return None  # nothing but a GET has responses of any size
        if (address := self._limited(request.peer)) is None:
            return None
        return self._slots.setdefault(address, trio.Semaphore(AT_ONCE))
