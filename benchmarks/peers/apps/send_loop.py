"""The smallest send loop: ``send_loop.py PORT``. A POST to a path is sent to all who GET this path.

One thread, one epoll object, no parser and no log.
"""

from __future__ import annotations

import select
import socket
import sys
from collections import defaultdict

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n:\n\n"
DONE = b"HTTP/1.1 204 No Content\r\n\r\n"
BACKLOG = 1 << 20  # bytes that may wait for a client before it is disconnected


class Loop:
    """All connections, by file descriptor."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        self._poll = select.epoll()
        self._poll.register(self._listener, select.EPOLLIN)
        self._socks: dict[int, socket.socket] = {}
        self._requests: dict[int, bytes] = {}  # what has arrived of each publish request
        self._watchers: defaultdict[bytes, dict[int, socket.socket]] = defaultdict(dict)
        self._paths: dict[int, bytes] = {}
        self._waiting: dict[int, bytes] = {}  # what the kernel did not take, for each slow client

    def run(self) -> None:
        """Serve until the process ends."""
        listener = self._listener.fileno()
        while True:
            for fd, event in self._poll.poll(-1, 4096):
                if fd == listener:
                    self._accept()
                elif event & select.EPOLLOUT:
                    self._send(fd, self._waiting.pop(fd))
                    if fd in self._socks and fd not in self._waiting:
                        self._poll.modify(fd, select.EPOLLIN)
                elif fd in self._socks:
                    self._read(fd)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socks[sock.fileno()] = sock
            self._poll.register(sock, select.EPOLLIN)

    def _read(self, fd: int) -> None:
        try:
            data = self._socks[fd].recv(65536)
        except OSError:
            data = b""
        if not data:
            self._close(fd)
        elif data.startswith(b"GET "):
            path = self._paths[fd] = data.split(b" ", 2)[1]
            self._watchers[path][fd] = self._socks[fd]
            self._send(fd, HEAD)
        else:
            data = self._requests.get(fd, b"") + data
            head, _, body = data.partition(b"\r\n\r\n")
            if len(body) < int(head.rpartition(b"Content-Length: ")[2] or 1):
                self._requests[fd] = data
                return
            self._requests.pop(fd, None)
            frame = b"data: %b\n\n" % body
            for client in list(self._watchers[head.split(b" ", 2)[1]]):
                self._send(client, frame)
            self._socks[fd].send(DONE)

    def _send(self, fd: int, data: bytes) -> None:
        if fd in self._waiting:
            self._waiting[fd] += data
            if len(self._waiting[fd]) > BACKLOG:
                self._close(fd)
            return
        try:
            sent = self._socks[fd].send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(fd)
            return
        if sent < len(data):
            self._waiting[fd] = data[sent:]
            self._poll.modify(fd, select.EPOLLIN | select.EPOLLOUT)

    def _close(self, fd: int) -> None:
        self._watchers[self._paths.pop(fd, b"")].pop(fd, None)
        self._waiting.pop(fd, None)
        self._requests.pop(fd, None)
        self._socks.pop(fd).close()


if __name__ == "__main__":
    Loop(int(sys.argv[1])).run()
