"""What hostile clients cost the others: the latency of an honest watcher beside each kind, memory and files.

    python -m benchmarks hostile [--seconds 5] [--only NAME]

For each kind of hostile client there is a new server, one watcher, and a publisher of 50 events per second.
Their latency is measured alone, then beside the hostile clients, which are another process. They are on
loopback, where limits by address and rates do not apply (``limit_loopback``): what is measured holds without.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import hpack

from ..load.process import BenchmarkError, WorkerProcess, raise_file_limit, serve_commands
from ..servers import Server

RATE = 50.0  # events per second of the honest publisher
HOST = b" HTTP/1.1\r\nHost: 127.0.0.1\r\n"
STREAM = b"GET /api/sessions/bench/status/stream" + HOST + b"\r\n"
PUBLISH = (
    b"POST /api/sessions/bench/events"
    + HOST
    + b"Content-Type: application/json\r\nContent-Length: 24\r\n\r\n"
)
EVENT = b'{"type":"x","data":"yyy"}'[:24]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets


# The honest watcher and publisher


def measure(*, port: int, seconds: float) -> dict[str, float]:
    """Publish on a schedule, and return the latencies until the watcher has each event, in milliseconds."""
    watcher = socket.create_connection(("127.0.0.1", port))
    watcher.sendall(STREAM)
    publisher = socket.create_connection(("127.0.0.1", port))
    latencies: list[float] = []
    start = time.perf_counter()
    for number in range(round(seconds * RATE)):
        time.sleep(max(0.0, start + number / RATE - time.perf_counter()))  # until the event is due
        body = b'{"type":"tick","data":"n%09d"}' % number
        head = b"POST /api/sessions/bench/events" + HOST + b"Content-Length: %d\r\n\r\n" % len(body)
        sent = time.perf_counter()
        publisher.sendall(head + body)
        _read_until(watcher, b"n%09d" % number)
        latencies.append((time.perf_counter() - sent) * 1000)
        _read_until(publisher, b"control")
    watcher.close()
    publisher.close()
    latencies.sort()
    return {"p50": latencies[len(latencies) // 2], "p99": latencies[int(len(latencies) * 0.99)]}


def _read_until(sock: socket.socket, mark: bytes) -> None:
    sock.settimeout(20)
    tail = b""
    while mark not in tail:
        data = sock.recv(65536)
        if not data:
            raise BenchmarkError("the server closed an honest client's connection")
        tail = tail[-64:] + data


# The hostile clients: each yields after every thing that it does, and is driven until the time is over


def connect(port: int, data: bytes = b"", *, buffer: int | None = None) -> socket.socket:
    sock = socket.socket()
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
    # Each source address has a range of ports of its own.
    sock.bind((f"127.0.0.{random.randint(2, 9)}", 0))
    sock.connect(("127.0.0.1", port))
    if data:
        sock.sendall(data)
    return sock


def hold(port: int, number: int, data: bytes = b"", trickle: bytes = b"", **options: int) -> Iterator[None]:
    """Open connections, send the same on each, and then a byte of ``trickle`` on each, again and again."""
    socks = []
    for _ in range(number):
        socks.append(connect(port, data, **options))
        yield
    while True:
        for sock in socks:
            if trickle:
                with suppress(OSError):
                    sock.send(trickle)
            yield
        time.sleep(0.5)  # between two bytes of each slow client


def resets(port: int) -> Iterator[None]:
    """Reset connections at random bytes of requests and responses."""
    while True:
        for request in (STREAM, PUBLISH + EVENT, b"GET /api/sessions" + HOST + b"\r\n"):
            sock = connect(port, request[: random.randint(0, len(request))])
            if random.random() < 0.5:
                sock.settimeout(0.005)
                with suppress(OSError):
                    sock.recv(random.randint(1, 300))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()
            yield


def publishers(port: int) -> Iterator[None]:
    """Publish without reading a response."""
    socks = [connect(port, buffer=4096) for _ in range(50)]
    body = b'{"type":"x","data":1}'
    request = b"POST /api/sessions/other/events" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for sock in socks:
        sock.setblocking(False)
    while True:
        for sock in socks:
            with suppress(OSError):
                sock.send(request * 20)
            yield
        time.sleep(0.02)  # until the server may have read more: the connections are full


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack("!I", len(payload))[1:] + bytes((kind, flags)) + struct.pack("!I", stream) + payload


def head(method: str, path: str) -> bytes:
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    fields = [(":method", method), (":scheme", "http"), (":authority", "127.0.0.1"), (":path", path)]
    return encoder.encode(fields)


def flood(port: int, first: bytes, make: Callable[[int], bytes]) -> Iterator[None]:
    """Send frames until the connection ends, and begin again."""
    while True:
        sock = connect(port, PREFACE + frame(4) + first)
        sock.settimeout(1)
        number = 1
        try:
            while True:
                sock.sendall(b"".join(make(number + 2 * at) for at in range(100)))
                number += 200
                yield
                if select.select([sock], [], [], 0)[0] and b"\0\0\x08\x07" in sock.recv(65536):
                    break
        except OSError:
            pass
        sock.close()


STREAM_FIELDS = head("GET", "/api/sessions/other/status/stream")
POST_FIELDS = head("POST", "/api/sessions/other/progress")
NO_WINDOW = frame(4, 0, 0, struct.pack("!HI", 4, 0))
KINDS: dict[str, Callable[[int], Iterator[None]]] = {
    "5,000 silent connections": lambda port: hold(port, 5000),
    "1,000 slow heads": lambda port: hold(port, 1000, b"GET /", b"x"),
    "1,000 slow bodies": lambda port: hold(port, 1000, PUBLISH, b" "),
    "500 slow readers": lambda port: hold(port, 500, STREAM, buffer=2048),
    "resets at random bytes": resets,
    "50 publishers that do not read": publishers,
    "HTTP/2: rapid reset": lambda port: flood(
        port, b"", lambda n: frame(1, 5, n, STREAM_FIELDS) + frame(3, 0, n, struct.pack("!I", 8))
    ),
    "HTTP/2: settings": lambda port: flood(port, b"", lambda _: frame(4)),
    "HTTP/2: pings": lambda port: flood(port, b"", lambda _: frame(6, 0, 0, bytes(8))),
    "HTTP/2: CONTINUATION": lambda port: flood(port, frame(1, 0, 1), lambda _: frame(9, 0, 1, b"\0")),
    "HTTP/2: empty data": lambda port: flood(port, frame(1, 4, 1, POST_FIELDS), lambda _: frame(0, 0, 1)),
    "HTTP/2: closed windows": lambda port: hold(
        port,
        50,
        PREFACE + NO_WINDOW + b"".join(frame(1, 5, n, STREAM_FIELDS) for n in range(1, 200, 2)),
    ),
    "HTTP/2: half-sent bodies": lambda port: hold(
        port,
        50,
        PREFACE
        + frame(4)
        + b"".join(frame(1, 4, n, POST_FIELDS) + frame(0, 0, n, bytes(600)) for n in range(1, 200, 2)),
    ),
}


def attack(pipe: Connection, *, kind: str, port: int) -> int:
    """Be hostile until something comes through the pipe; returns how many things were done."""
    actions, count = KINDS[kind](port), 0
    while not pipe.poll():
        next(actions)
        count += 1
    pipe.recv()
    return count


def main_of_worker(pipe: Connection) -> None:
    serve_commands(pipe, {"measure": measure, "attack": partial(attack, pipe)})


# The controller


def state(server: Server) -> tuple[float, int, int]:
    """Return the server's memory in MB, its open files and its connections."""
    _, body = server.request("GET", "/health")
    files = len(os.listdir(f"/proc/{server.pid}/fd"))
    return server.rss() / 2**20, files, json.loads(body)["connections"] - 1


def run(kind: str, seconds: float) -> dict[str, Any]:
    """Measure one kind of hostile client."""
    raise_file_limit()
    with (
        Server(max_streams_per_user=100_000) as server,
        WorkerProcess(main_of_worker) as honest,
    ):
        server.create_sessions(["other"])
        honest.call("measure", port=server.port, seconds=1.0)  # warm-up
        alone = honest.call("measure", port=server.port, seconds=seconds)
        before = state(server)
        cpu = server.cpu_seconds()
        with WorkerProcess(main_of_worker) as hostile:
            hostile.start("attack", kind=kind, port=server.port)
            time.sleep(2)  # while the hostile clients connect
            beside = honest.call("measure", port=server.port, seconds=seconds, timeout=300.0)
            during = state(server)
            hostile.pipe.send("stop")
            actions = hostile.result()
        cpu = server.cpu_seconds() - cpu
        # The process has ended, and its connections with it.
        deadline = time.monotonic() + 30
        while (after := state(server))[2] > 0 and time.monotonic() < deadline:
            time.sleep(0.1)  # between two looks
        log = [line for line in server.log().splitlines() if "ERROR" in line or "Traceback" in line]
    return {
        "kind": kind,
        "actions": actions,
        "alone": alone,
        "beside": beside,
        "states": (before, during, after),
        "cpu": cpu,
        "log": log,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--only", help="the kinds whose names contain this")
    arguments = parser.parse_args()
    print(
        f"{'hostile clients':31} {'actions':>8} {'p50/p99 alone':>14} {'beside':>14} {'ratio':>10}  ", end=""
    )
    print(f"{'memory MB':>17} {'files':>15} {'connections':>14}  {'CPU':>5}")
    failed = False
    for kind in KINDS:
        if arguments.only and arguments.only not in kind:
            continue
        result = run(kind, arguments.seconds)
        columns = list(zip(*result["states"], strict=True))
        memory, files, connections = ("/".join(f"{value:.0f}" for value in column) for column in columns)
        alone, beside = result["alone"], result["beside"]
        latencies = [f"{figures['p50']:.2f}/{figures['p99']:.2f} ms" for figures in (alone, beside)]
        ratio = "/".join(f"{beside[name] / alone[name]:.1f}" for name in ("p50", "p99"))
        print(
            f"{kind:31} {result['actions']:8,} {latencies[0]:>14} {latencies[1]:>14} {ratio:>10}  "
            f"{memory:>17} {files:>15} {connections:>14}  {result['cpu']:4.1f}s",
            flush=True,
        )
        for line in result["log"]:
            print(f"    {line}")
        failed = failed or bool(result["log"]) or columns[2][2] > 0
    print("before/during/after; CPU: of the server, while they were there")
    return 1 if failed else 0
