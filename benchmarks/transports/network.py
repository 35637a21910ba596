"""A network of the benchmark's own: two network namespaces, and a link between them that can be made worse.

The link is a pair of TUN devices and a process that forwards IP packets from one to the other. It counts
them, and delays them, loses them or limits their rate; where the kernel has netem, that does so instead. The
namespaces have no names and belong to the process: when it ends, however it does, the kernel removes them.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import re
import select
import shutil
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from ..load.process import BenchmarkError, WorkerProcess

__all__ = ["CLEAN", "SERVER", "Conditions", "Network", "client_address", "missing", "relay_main"]

SERVER = "10.77.0.1"
DEVICE = "bench0"
MTU = 1500
QUEUE = 1000  # packets that may wait in each direction, as in netem
CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21
CLIENTS = 8  # addresses of clients, so that what each group of them sends can be counted
NAMESPACE = "/proc/thread-self/ns/net"


class Conditions(msgspec.Struct, frozen=True):
    """What a link does to packets in each direction.

    Args:
        delay: seconds.
        loss: the part of the packets that is lost.
        rate: bits per second; 0: no limit.
        is_down: all packets are lost.
    """

    delay: float = 0.0
    loss: float = 0.0
    rate: float = 0.0
    is_down: bool = False

    def netem(self) -> list[str]:
        """Return the arguments of tc(8)'s netem."""
        arguments = ["netem", "limit", str(QUEUE)]
        if self.delay:
            arguments += ["delay", f"{self.delay * 1000:g}ms"]
        if self.loss or self.is_down:
            arguments += ["loss", "100%" if self.is_down else f"{self.loss * 100:g}%"]
        if self.rate:
            arguments += ["rate", f"{self.rate:.0f}bit"]
        return arguments


CLEAN = Conditions()


def client_address(number: int) -> str:
    """Return one of the addresses of clients, from 0 on."""
    return f"10.77.1.{number + 1}"


def missing() -> str | None:
    """Return what is missing for a network of one's own; None: nothing."""
    status = Path("/proc/self/status").read_text()
    capabilities = int(re.findall(r"^CapEff:\s+(\w+)", status, re.MULTILINE)[0], 16)
    if ~capabilities & (1 << CAP_NET_ADMIN | 1 << CAP_SYS_ADMIN):
        return "needs root, for network namespaces"
    if shutil.which("ip") is None:
        return "needs ip(8), of the package iproute2"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    return None


class Network:
    """The namespaces ``server`` and ``client`` with a link between them, in a context.

    Args:
        netem: use it if the kernel has it. Then packets are delayed and lost before the link counts them.
    """

    def __init__(self, *, netem: bool = True) -> None:
        self._wants_netem = netem

    def __enter__(self) -> Network:
        self._relay = WorkerProcess(relay_main)
        try:
            self._paths, self.has_netem = self._relay.call("open", netem=self._wants_netem)
        except BaseException:
            self._relay.__exit__(BenchmarkError, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._relay.__exit__(kind, error, trace)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Let sockets and processes that this thread makes in the block be in a namespace."""
        with _keep_namespace():
            fd = os.open(self._paths[name], os.O_RDONLY)
            try:
                _call("setns", fd, CLONE_NEWNET)
            finally:
                os.close(fd)
            yield

    def change(self, conditions: Conditions) -> None:
        """Apply conditions from now on, to both directions."""
        self._relay.call("change", conditions=conditions)

    def take_traffic(self) -> dict[str, dict[str, int]]:
        """Return the ``packets`` of IP and their ``bytes`` by client address, both directions together.

        They are counted from the last call on.
        """
        result: dict[str, dict[str, int]] = self._relay.call("take_traffic")
        return result


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@contextmanager
def _keep_namespace() -> Iterator[None]:
    """Return to the namespace of now at the end of the block."""
    fd = os.open(NAMESPACE, os.O_RDONLY)
    try:
        yield
    finally:
        _call("setns", fd, CLONE_NEWNET)
        os.close(fd)


class _Relay:
    """The process that makes the namespaces, and forwards the packets."""

    def __init__(self) -> None:
        self._conditions = CLEAN
        self._random = random.Random(1)
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()
        self._queued: Counter[int] = Counter()  # packets for each device
        self._free: dict[int, float] = {}  # when each has sent what it is sending
        self._packets: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._namespaces: dict[str, int] = {}
        self._devices: dict[str, int] = {}
        self._has_netem = False

    def open(self, *, netem: bool) -> tuple[dict[str, str], bool]:
        """Make all; return the paths of the namespaces, and whether netem is used."""
        addresses = {"server": [SERVER], "client": [client_address(number) for number in range(CLIENTS)]}
        for name, own in addresses.items():
            with _keep_namespace():
                _call("unshare", CLONE_NEWNET)
                self._namespaces[name] = os.open(NAMESPACE, os.O_RDONLY)
                device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
                self._devices[name] = device
                _run("ip", "link", "set", "lo", "up")
                for address in own:
                    _run("ip", "address", "add", f"{address}/16", "dev", DEVICE)
                _run("ip", "link", "set", DEVICE, "mtu", str(MTU), "txqueuelen", str(QUEUE), "up")
                self._has_netem = netem and shutil.which("tc") is not None and _run_netem(CLEAN)
        self._others = dict(zip(self._devices.values(), reversed(self._devices.values()), strict=True))
        self._client = self._devices["client"]
        paths = {name: f"/proc/{os.getpid()}/fd/{fd}" for name, fd in self._namespaces.items()}
        return paths, self._has_netem

    def change(self, *, conditions: Conditions) -> None:
        self._conditions = conditions
        if self._has_netem:
            self._conditions = CLEAN
            for fd in self._namespaces.values():
                with _keep_namespace():
                    _call("setns", fd, CLONE_NEWNET)
                    if not _run_netem(conditions):
                        raise BenchmarkError(f"tc: netem refuses {' '.join(conditions.netem())}")

    def take_traffic(self) -> dict[str, dict[str, int]]:
        traffic = {
            address: {"packets": self._packets[address], "bytes": self._bytes[address]}
            for address in self._packets
        }
        self._packets.clear()
        self._bytes.clear()
        return traffic

    def serve(self, pipe: Connection) -> None:
        """Forward packets, and run commands from the pipe until it is closed."""
        commands: dict[str, Callable[..., Any]] = {
            "open": self.open,
            "change": self.change,
            "take_traffic": self.take_traffic,
        }
        while True:
            timeout = max(self._waiting[0][0] - time.monotonic(), 0) if self._waiting else None
            # Unlike epoll it waits for less than a millisecond, too.
            ready, _, _ = select.select([pipe.fileno(), *self._devices.values()], [], [], timeout)
            self._deliver()
            for source in ready:
                if source != pipe.fileno():
                    self._read(source)
                    continue
                try:
                    name, arguments = pipe.recv()
                except EOFError:
                    return
                try:
                    pipe.send((True, commands[name](**arguments)))
                except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
                    pipe.send((False, f"{type(error).__name__}: {error}"))

    def _read(self, source: int) -> None:
        """Take all packets that a device has."""
        target, conditions = self._others[source], self._conditions
        while True:
            try:
                packet = os.read(source, 65536)
            except BlockingIOError:
                return
            if packet[0] >> 4 != 4:
                continue  # the kernel looks for IPv6 routers
            address = socket.inet_ntoa(packet[12:16] if source == self._client else packet[16:20])
            self._packets[address] += 1
            self._bytes[address] += len(packet)
            if conditions.is_down or self._queued[target] == QUEUE:
                continue
            if conditions.loss and self._random.random() < conditions.loss:
                continue
            due = time.monotonic()
            if conditions.rate:
                due = max(due, self._free.get(target, 0.0)) + len(packet) * 8 / conditions.rate
                self._free[target] = due
            self._queued[target] += 1
            heapq.heappush(self._waiting, (due + conditions.delay, next(self._order), target, packet))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(self._waiting)
            self._queued[target] -= 1
            os.write(target, packet)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=10)


def _run_netem(conditions: Conditions) -> bool:
    command = ["tc", "qdisc", "replace", "dev", DEVICE, "root", *conditions.netem()]
    return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0


def relay_main(pipe: Connection) -> None:
    """Run the process of the link until the pipe is closed."""
    try:
        _Relay().serve(pipe)
    except KeyboardInterrupt:
        return
