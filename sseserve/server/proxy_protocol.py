"""The header of the PROXY protocol, with which a trusted proxy begins each of its connections."""

from __future__ import annotations

import logging

import trio

from ..http.proxies import parse_proxy_header
from ..live.transport import Transport
from .drain import IdleConnections

__all__ = ["read_proxy_header"]

log = logging.getLogger(__name__)

READ = 64 * 1024


async def read_proxy_header(
    transport: Transport, idle: IdleConnections, *, timeout: float, is_late: bool
) -> bool:
    """Read the header, and set the transport's client by it.

    Args:
        transport: the connection.
        idle: closes it when the server stops.
        timeout: how long the header may take, in seconds.
        is_late: the server was stopping already when it accepted the connection.

    Returns:
        Whether there was a header; else the connection is to be closed.
    """
    received = b""
    with trio.move_on_after(timeout) as scope:
        while True:
            with idle.add(scope, transport, has_begun=bool(received) or is_late):
                data = await transport.receive_some(READ)
            if not data:
                return False
            received += data
            try:
                header = parse_proxy_header(received)
            except ValueError as error:
                log.warning("a connection of the proxy %s is closed: %s", transport.peer, error)
                return False
            if header is not None:
                break
    if scope.cancelled_caught:
        return False
    assert header is not None
    transport.client = header.client
    transport.push_back(received[header.size :])
    return True
