"""Run redis-server and Sentinel as processes, each with its files in a folder of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ports import free_port
from programs import require_program

__all__ = ["RedisCluster", "RedisSentinel", "RedisServer"]

TIMEOUT = 20.0  # seconds; far more than anything here takes


class RedisServer:
    """A redis-server on a port of its own. Calls block; ``start`` returns when it responds.

    Args:
        folder: has its files, which a restart finds again; it is created.
        options: lines of redis.conf by their first word, with ``_`` for ``-``. Nothing is saved by default.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port: int = options.pop("port", 0) or free_port()
        self.options = {"save": '""', "appendonly": "no", "appendfsync": "always", **options}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, with what it has saved."""
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, **self.options}
        lines = "".join(f"{name.replace('_', '-')} {value}\n" for name, value in options.items())
        (self.folder / "redis.conf").write_text(lines)
        with (self.folder / "redis.log").open("ab") as output:
            self._process = subprocess.Popen(
                [*self._program(), self.folder / "redis.conf"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.wait_until(lambda: self.command("PING") == b"+PONG\r\n", "redis-server to respond")

    def _program(self) -> list[str]:
        return [require_program("redis-server")]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until a condition holds."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "redis.log").read_text()
            assert time.monotonic() < deadline, f"timed out after {TIMEOUT:g} s: {what}"
            time.sleep(0.005)

    def command(self, *words: object) -> bytes:
        """Send one command; return the first piece of the response as it is, empty if it does not respond."""
        encoded = [str(word).encode() for word in words]
        data = b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in encoded)
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as connection:
            connection.sendall(data)
            return connection.recv(65536)
        return b""

    def flush(self) -> None:
        """Delete everything that it holds."""
        assert self.command("FLUSHALL") == b"+OK\r\n"

    def kill(self) -> None:
        """End it as a crash does; what it has not saved is gone."""
        if self._process is not None:
            self.resume()
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it as an administrator does."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(TIMEOUT)
        self._process = None

    def pause(self) -> None:
        """Let it hang, with its connections open, until ``resume``."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)  # it has stopped

    def resume(self) -> None:
        """End a ``pause``."""
        os.kill(self.pid, signal.SIGCONT)


class RedisSentinel(RedisServer):
    """A Sentinel that monitors a primary as "main", and decides alone when it is down."""

    def __init__(self, folder: Path, primary: RedisServer) -> None:
        options = {
            "sentinel monitor main": f"127.0.0.1 {primary.port} 1",
            "sentinel down-after-milliseconds main": 300,
            "sentinel failover-timeout main": 2000,
        }
        super().__init__(folder, **options)
        del self.options["save"], self.options["appendonly"]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0?sentinel=main"

    def _program(self) -> list[str]:
        return [require_program("redis-sentinel")]


class RedisCluster:
    """A Cluster of three primaries, each with a third of the slots."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.nodes = [
            RedisServer(
                folder / str(number),
                cluster_enabled="yes",
                cluster_port=free_port(),
                cluster_node_timeout=1000,
                **options,
            )
            for number in range(3)
        ]

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def __enter__(self) -> Self:
        for number, node in enumerate(self.nodes):
            node.start()
            node.command("CLUSTER", "ADDSLOTSRANGE", number * 5461, (number + 1) * 5461 + (number == 2) - 1)
            ports = node.port, node.options["cluster_port"]
            assert self.nodes[0].command("CLUSTER", "MEET", "127.0.0.1", *ports) == b"+OK\r\n"
        for node in self.nodes:
            node.wait_until(lambda node=node: self._is_complete(node), "the nodes to know each other")
        return self

    def _is_complete(self, node: RedisServer) -> bool:
        info = node.command("CLUSTER", "INFO")
        return b"cluster_state:ok" in info and b"cluster_size:3" in info

    def __exit__(self, *_error: object) -> None:
        for node in self.nodes:
            node.kill()

    def flush(self) -> None:
        """Delete everything that it holds."""
        for node in self.nodes:
            node.flush()
