"""Several processes on one port: a parent starts workers, replaces those that end, and ends them together.

The parent serves nothing and runs no event loop. A worker is a fork of it, so it needs no imports to start.

1. A worker that ends is replaced: at once, or, if it has not served for a minute, after a delay that doubles
   each time. If the very first one cannot start, the parent raises why.
2. What waits to be accepted by a worker that is killed is accepted by the one that replaces it at once.
3. On SIGTERM and SIGINT all workers drain. The parent returns when they have ended, and kills those that take
   a second longer than the drain may. What happens on SIGHUP is the caller's decision.
4. No worker outlives the parent, however that ends: only the parent has its end of each worker's pair of
   sockets, and a worker drains when that is closed.
5. A worker whose event loop hangs is killed and replaced, if the service manager watches the service: its
   watchdog is the workers'.
6. What the parent tells the workers reaches each of them once, also one that is starting.
7. The parent reaps every child, also those that it inherits as process 1 of a container.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import msgspec

from ..errors import ConfigError

__all__ = ["Worker", "Workers", "check_shared"]

log = logging.getLogger(__name__)

FIRST_DELAY = 1.0  # seconds before a worker that ends again is replaced
LONGEST_DELAY = 30.0
STABLE = 60.0  # seconds; a worker that has served for so long is replaced at once
GRACE = 1.0  # seconds that a worker may take longer than the drain

READ = 65536
MAX_MESSAGE = 1024 * 1024  # bytes of a message to the workers; the kernel limits them to less


class _Report(msgspec.Struct, array_like=True):
    """What a worker tells the parent: that it is alive and serves, or why its settings are refused.

    ``done`` is how many of the parent's messages it has done.
    """

    refused: str | None = None
    done: int = 0


class Worker:
    """A worker's connection to its parent.

    Args:
        number: of this worker, from 1 on.
        listeners: where its connections come from.
        link: the worker's end of its pair of sockets. It ends when the worker must drain.
        watchdog: within how many seconds the worker must report again; None: it need not.
    """

    def __init__(
        self,
        number: int,
        listeners: Sequence[socket.socket],
        link: socket.socket,
        watchdog: float | None = None,
    ) -> None:
        self.number = number
        self.listeners = listeners
        self.link = link
        self.watchdog = watchdog
        self._done = 0

    def receive(self) -> bytes:
        """Return a message of the parent, which must be there; empty: the worker must drain."""
        return self.link.recv(MAX_MESSAGE)

    def report_done(self) -> None:
        """Tell the parent that what it wanted in a message is done."""
        self._done += 1
        self.report()

    def report(self, refused: str | None = None) -> None:
        """Tell the parent that this worker is alive and serves, or why it cannot."""
        # The parent has ended, or has begun to; or it does not read, so that it has enough to read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
            self.link.send(msgspec.json.encode(_Report(refused, self._done)), socket.MSG_DONTWAIT)

    def accept_signals(self) -> None:
        """Let SIGTERM through, which is blocked until the worker can handle it."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


class _Slot:
    """The place of one worker: its present process, if it has one, and when to start the next."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid: int | None = None
        # The parent has them too, so that they outlive the process.
        self.listeners: Sequence[socket.socket] = ()
        self.link: socket.socket | None = None  # the parent's end
        self.serving_since: float | None = None
        self.reported_at = 0.0  # when it was alive
        self.told = 0  # messages
        self.done = 0  # of them
        self.refused: str | None = None  # why the process cannot start
        self.due = 0.0  # by the monotonic clock
        self.delay = 0.0  # seconds before the next replacement

    def close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()
        self.listeners = ()

    def close_link(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None
        self.told = self.done = 0


def check_shared(engine_url: str, workers: int) -> None:
    """Raise ConfigError if several processes cannot share this engine."""
    reasons = {
        "memory": "with memory: each process would have logs of its own",
        "sqlite": "with sqlite: one process owns the file",
    }
    if (reason := reasons.get(engine_url.partition(":")[0])) is not None:
        raise ConfigError(f"{workers} workers need a Redis (--engine redis://HOST:PORT/DB): {reason}")


@contextmanager
def _receive_signals() -> Iterator[tuple[socket.socket, set[signal.Signals]]]:
    """Yield a socket that gets the number of each signal as a byte, and the signals that are handled."""
    wakeups, sender = socket.socketpair()
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
    with wakeups, sender:
        for end in (wakeups, sender):
            end.setblocking(False)
        previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        # Without a handler in Python, nothing would be written.
        previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
        try:
            yield wakeups, numbers
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)


class Workers:
    """The workers of this process, which is their parent.

    Args:
        count: how many.
        main: serves in a worker's process, and reports when it does. It handles SIGTERM and the link.
        listen: opens the listening sockets of one worker.
        drain: how long ``main`` may take to end, in seconds.
        on_serving: is called once all workers serve.
        on_stopping: is called when they are about to be told to drain.
        on_hangup: is called on SIGHUP, with these workers; by default they are stopped.
        on_told: is called when all have done what they were told.
        on_alive: is called twice in ``watchdog`` seconds.
        watchdog: a worker that has not reported for so many seconds is killed; None: it need not.
    """

    def __init__(
        self,
        count: int,
        main: Callable[[Worker], None],
        *,
        listen: Callable[[], Sequence[socket.socket]],
        drain: float,
        on_serving: Callable[[], None],
        on_stopping: Callable[[], None] = lambda: None,
        on_hangup: Callable[[Workers], None] = lambda workers: workers.stop("SIGHUP"),
        on_told: Callable[[], None] = lambda: None,
        on_alive: Callable[[], None] = lambda: None,
        watchdog: float | None = None,
    ) -> None:
        self._main = main
        self._listen = listen
        self._drain = drain
        self._on_serving = on_serving
        self._on_stopping = on_stopping
        self._on_hangup = on_hangup
        self._on_told = on_told
        self._on_alive = on_alive
        self._watchdog = watchdog
        self._alive_at = time.monotonic()  # when ``on_alive`` is to be called
        self._slots = [_Slot(number) for number in range(1, count + 1)]
        # The first worker starts alone, so that what is wrong with the settings is reported once.
        self._started = self._slots[:1]
        self._announced = False
        self._waits_for_done = False
        self._is_stopping = False
        self._kill_at: float | None = None  # the workers that are left then

    def run(self) -> None:
        """Run them until SIGTERM or SIGINT, or ``stop``; return when all have ended.

        Raises:
            ConfigError: the first worker has raised it.
            ChildProcessError: the first worker has ended before it served.
        """
        with _receive_signals() as (self._wakeups, self._signals):
            self._run()

    def tell(self, message: bytes) -> None:
        """Tell all workers something; ``on_told`` is called when they have done it, or have ended."""
        self._waits_for_done = True
        for slot in self._slots:
            if slot.link is None:
                continue
            try:
                slot.link.send(message)
                slot.told += 1
            except OSError as error:
                if error.errno != errno.EPIPE:  # it has ended
                    log.error("worker %d cannot be told: %s", slot.number, error.strerror)

    def _run(self) -> None:
        try:
            while not self._is_stopping or any(slot.pid is not None for slot in self._slots):
                now = time.monotonic()
                if not self._is_stopping:
                    for slot in self._started:
                        if slot.pid is None and slot.due <= now:
                            self._fork(slot)
                elif self._kill_at is not None and now >= self._kill_at:
                    self._kill()
                self._watch(now)
                self._wait(self._next_deadline())
                self._read_reports()
                self._reap()
        finally:
            for slot in self._slots:
                slot.close_link()

    def _next_deadline(self) -> float | None:
        deadlines = [] if self._watchdog is None else [self._alive_at]
        if not self._is_stopping:
            deadlines += [slot.due for slot in self._started if slot.pid is None]
        elif self._kill_at is not None:
            deadlines.append(self._kill_at)
        return min(deadlines, default=None)

    def _watch(self, now: float) -> None:
        """Say that the parent is alive, and kill the workers that do not."""
        if self._watchdog is None or now < self._alive_at:
            return
        self._on_alive()
        self._alive_at = now + self._watchdog / 2
        self._read_reports()  # this process may have been suspended
        for slot in self._slots:
            is_silent = slot.serving_since is not None and slot.reported_at < now - self._watchdog
            if slot.pid is not None and is_silent and not self._is_stopping:
                log.error(
                    "worker %d (process %d) has not responded for %g s; killing it",
                    slot.number,
                    slot.pid,
                    self._watchdog,
                )
                os.kill(slot.pid, signal.SIGKILL)

    def _wait(self, deadline: float | None) -> None:
        """Wait until there is something to do, at most until ``deadline``; take signals."""
        timeout = None if deadline is None else max(deadline - time.monotonic(), 0)
        links = [slot.link for slot in self._slots if slot.link is not None]
        watched = [self._wakeups, *links]
        readable = select.select(watched, (), (), timeout)[0]
        if self._wakeups not in readable:
            return
        for number in self._wakeups.recv(READ):
            if number == signal.SIGHUP and not self._is_stopping:
                self._on_hangup(self)
            elif number != signal.SIGCHLD:
                self.stop(signal.Signals(number).name)

    def stop(self, name: str) -> None:
        """Have all workers drain, because of a signal of that name."""
        if self._is_stopping:
            log.info("got %s; the workers are already stopping", name)
            return
        log.info("got %s; stopping the workers", name)
        self._is_stopping = True
        self._waits_for_done = False
        self._on_stopping()
        self._kill_at = time.monotonic() + self._drain + GRACE
        for slot in self._slots:
            slot.close_listeners()  # now each worker's are its own, and closed when it closes them
            slot.close_link()

    def _kill(self) -> None:
        """Kill the workers that are left."""
        for slot in self._slots:
            if slot.pid is not None:
                log.error("worker %d (process %d) did not end in time; killing it", slot.number, slot.pid)
                os.kill(slot.pid, signal.SIGKILL)
        self._kill_at = None

    def _fork(self, slot: _Slot) -> None:
        # A signal that came between the fork and the worker's own handlers would be told to the parent.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        link: socket.socket | None = None
        try:
            slot.listeners = slot.listeners or self._listen()
            slot.link, link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            slot.link.setblocking(False)
            if (pid := os.fork()) == 0:
                self._run_worker(slot, link, previous)
        except OSError as error:
            slot.close_link()
            self._plan_replacement(slot, f"cannot be forked: {error.strerror}")
            return
        finally:
            if link is not None:
                link.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        slot.pid, slot.refused = pid, None
        log.debug("worker %d is process %d", slot.number, pid)

    def _run_worker(self, slot: _Slot, link: socket.socket, mask: set[int | signal.Signals]) -> NoReturn:
        """Run ``main`` in the new process, and end it: the frames below are the parent's."""
        status = 1
        try:
            self._wakeups.close()
            for other in self._slots:
                other.close_link()
                if other is not slot:
                    other.close_listeners()
            signal.set_wakeup_fd(-1)
            for inherited in self._signals:
                # A terminal sends SIGINT and SIGHUP to all processes; what follows is the parent's decision.
                ignored = inherited in (signal.SIGINT, signal.SIGHUP)
                signal.signal(inherited, signal.SIG_IGN if ignored else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask | {signal.SIGTERM})
            worker = Worker(slot.number, slot.listeners, link, self._watchdog)
            try:
                self._main(worker)
                status = 0
            except ConfigError as error:
                worker.report(str(error))
        except BaseException:
            log.exception("worker %d has failed", slot.number)
        finally:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status)

    def _read_reports(self) -> None:
        for slot in self._slots:
            while (report := self._read_report(slot)) is not None:
                slot.reported_at = time.monotonic()
                slot.refused, slot.done = report.refused, report.done
                if report.refused is None and slot.serving_since is None:
                    slot.serving_since = slot.reported_at
                    self._started = self._slots
        if not self._announced and all(slot.serving_since is not None for slot in self._slots):
            self._announced = True
            self._on_serving()
        if self._waits_for_done and all(slot.done >= slot.told for slot in self._slots):
            self._waits_for_done = False
            self._on_told()

    def _read_report(self, slot: _Slot) -> _Report | None:
        """Return what a worker has reported; None: nothing more, for now or for ever."""
        if slot.link is None:
            return None
        try:
            data = slot.link.recv(READ)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            data = b""
        if not data:
            slot.close_link()  # the process has ended, or is about to
            return None
        return msgspec.json.decode(data, type=_Report)

    def _reap(self) -> None:
        """Take the exit status of all children that have ended, and plan who replaces them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:  # there are no children
                return
            if not pid:
                return
            self._read_reports()  # what it has reported before its end
            for slot in self._slots:
                if slot.pid == pid:
                    slot.pid = None
                    slot.close_link()
                    if not self._is_stopping:
                        self._plan_replacement(slot, _describe(os.waitstatus_to_exitcode(status)), pid)

    def _plan_replacement(self, slot: _Slot, how: str, pid: int | None = None) -> None:
        """Set when the next process of a worker starts; raise what ended the very first one."""
        if self._started is not self._slots:
            if slot.refused is not None:
                raise ConfigError(slot.refused)
            raise ChildProcessError(f"the first worker {how}, before it served")
        now = time.monotonic()
        if slot.serving_since is not None and now - slot.serving_since > STABLE:
            slot.delay = 0.0
        log.error(
            "worker %d%s %s%s; it is replaced %s",
            slot.number,
            "" if pid is None else f" (process {pid})",
            how,
            "" if slot.refused is None else f": {slot.refused}",
            f"in {slot.delay:g} s" if slot.delay else "at once",
        )
        if slot.delay:
            slot.close_listeners()  # the others are to take the connections meanwhile
        slot.serving_since = None
        slot.due = now + slot.delay
        slot.delay = min(max(2 * slot.delay, FIRST_DELAY), LONGEST_DELAY)


def _describe(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
