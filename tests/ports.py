"""TCP ports for the programs that tests start."""

from __future__ import annotations

import socket

__all__ = ["free_port"]


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that only a program which is told its number can use.

    A socket stays bound to it until this process ends. So the kernel gives it to no outgoing connection, and
    to nobody who asks for any free port, before the program binds it. The program can, as both sockets have
    ``SO_REUSEADDR`` and this one does not listen (socket(7)). Until then connections are refused.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port: int = held.getsockname()[1]
    held.detach()  # its descriptor stays open
    return port
