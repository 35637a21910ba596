"""One HTTP/2 stream as what carries an event stream: written without waiting, as a socket is."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from h2.errors import ErrorCodes
from h2.stream import H2Stream

from ..http.messages import Response
from ..live.push_subscriber import Source
from .http2_output import Outgoing, Output

__all__ = ["EventStreamTransport"]


class EventStreamTransport(Outgoing):
    """What a ``Transport`` is, for the response of one request.

    What ``try_send`` accepts is encoded or written as a whole, so there is no tail. ``scope`` is cancelled
    when the client resets the stream.

    Args:
        number: of the stream.
        stream: of h2, which has its window.
        output: of its connection.
    """

    __slots__ = ("_output", "_task", "_waits", "scope", "sent")

    immediate = True
    pending = False
    tail = None

    def __init__(self, number: int, stream: H2Stream, output: Output) -> None:
        super().__init__(number, stream)
        self._output = output
        self.scope = trio.CancelScope()
        self.sent = 0  # bytes that were pulled, or passed to ``try_send`` and ``send_all`` and taken
        self._waits = True
        self._task: trio.lowlevel.Task | None = None  # that waits in ``wait_disconnected``

    def __repr__(self) -> str:
        return f"<EventStreamTransport {self.number} open={self.is_open} waiting={len(self.buffer)}>"

    def send_head(self, status: int, fields: Sequence[tuple[str, str]]) -> None:
        """Send the head of the response, before the next data or as soon as other tasks run."""
        head = [(b":status", b"%d" % status)]
        head += [(name.lower().encode(), value.encode("latin-1")) for name, value in fields]
        self._output.send_head(self.number, head)

    async def send_response(self, response: Response, date: str) -> None:
        """Send a whole response but for its end."""
        fields = (*response.headers, ("Date", date))
        if response.body is not None and response.status != 204:
            fields += (("Content-Length", str(len(response.body))),)
        self.send_head(response.status, fields)
        if response.body:
            await self.send_all(response.body)

    def try_send(self, data: bytes) -> bool:
        """Send as ``Transport.try_send`` does; also False if the windows do not allow all of it."""
        if taken := self._output.try_send(self, data):
            self.sent += len(data)
        return taken

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything, and wait until all of it is encoded. A cancelled call leaves the stream unusable.

        Raises:
            trio.BrokenResourceError: the client has reset the stream, or has disconnected.
        """
        self._output.queue(self.number, bytes(data))
        while self.buffer and self.is_open:
            await self.changed()
        if not self.is_open:
            raise trio.BrokenResourceError("the stream has ended")
        self.sent += len(data)

    def pull_from(self, source: Source) -> bool:
        """Have the connection's writer take what waits at a source; False: the stream is closed."""
        if self.is_open:
            self._output.pull(self, source)
        return self.is_open

    async def wait_disconnected(self) -> bool:
        """Wait until ``scope`` is cancelled; returns False when ``stop_waiting`` is called, be it before."""
        if self._waits:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        return False

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def stop_waiting(self) -> None:
        """Have ``wait_disconnected`` return, now or as soon as it is called."""
        self._waits = False
        if (task := self._task) is not None:
            self._task = None
            trio.lowlevel.reschedule(task)

    def close(self) -> None:
        """Note that nothing more can be sent."""
        super().close()
        self.scope.cancel()

    def end(self, *, complete: bool) -> None:
        """End the response; reset it if it is not complete, so that the client can tell."""
        if complete and self.is_open:
            self.ends = True
        self._output.forget(self.number, ErrorCodes.CANCEL)
