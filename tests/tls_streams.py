"""Both ends of a TLS connection: the server's as a transport, the client's as a stream of Trio."""

from __future__ import annotations

import _ssl
import ctypes
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import trio
from certificates import Authority

from sseserve.live.tls import TlsBuffers, TlsTransport
from sseserve.live.transport import Transport

__all__ = ["ClientStream", "client_context", "request_key_update", "server_context", "tls_pair"]

ClientStream = trio.SSLStream[trio.SocketStream]


@cache
def _authority() -> Authority:
    return Authority()


@cache
def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with TemporaryDirectory() as folder:
        context.load_cert_chain(*_authority().issue().write(Path(folder)))
    return context


@cache
def client_context() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=_authority().pem.decode())


@asynccontextmanager
async def tls_pair(
    buffer: int = 1, *, buffers: TlsBuffers | None = None
) -> AsyncIterator[tuple[TlsTransport, ClientStream]]:
    """Yield two ends of a socket pair after the handshake; close them.

    Args:
        buffer: of each end for what is sent, in bytes; the kernel takes its minimum at least.
        buffers: the server's.
    """
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    ours.setblocking(False)
    transport = TlsTransport(Transport(ours), server_context(), buffers or TlsBuffers.create())
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    client = trio.SSLStream(stream, client_context(), server_hostname="localhost", https_compatible=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.do_handshake, b"")
        nursery.start_soon(client.do_handshake)
    try:
        yield transport, client
    finally:
        transport.close_socket()
        await trio.aclose_forcefully(stream)


def request_key_update(client: ClientStream) -> None:
    """Let the next write of a client begin with a key update that is to be answered (SSL_key_update(3)).

    Python does not offer it; in its object the pointer to OpenSSL's own follows that to the socket.
    """
    update = ctypes.CDLL(_ssl.__file__).SSL_key_update
    update.argtypes = [ctypes.c_void_p, ctypes.c_int]
    behind_socket = object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
    connection = ctypes.c_void_p.from_address(id(client._ssl_object._sslobj) + behind_socket)
    assert update(connection, 1) == 1
