"""HTTP/1.1 as it is on the wire: when each part of a response arrives, and how it ends.

A client library hides what is to be measured here: interim responses, the time of each chunk, whether a
response was completed or cut.
"""

from __future__ import annotations

import secrets
import ssl
import zlib

import h11
import msgspec
import trio

from ..errors import CannotConnect, describe_cause
from ..tls import trusted_authorities
from .records import End, Headers, Response, Seen, Target

__all__ = ["BROKEN", "MAX_SIZE", "SLACK", "Connection", "decompressor", "parse_seen", "request"]

READ = 65536
CONNECT_TIMEOUT = 10.0  # seconds
SLACK = 5.0  # seconds that an answer may take
MAX_SIZE = 1 << 20  # bytes of a response that are read

# What ends a measurement, whatever a server or a proxy does.
BROKEN = (OSError, trio.BrokenResourceError, h11.ProtocolError, CannotConnect, zlib.error)


class Connection:
    """One connection to the server, for one request at a time.

    Args:
        stream: over TCP or TLS.
        target: the server.
    """

    def __init__(self, stream: trio.abc.Stream, target: Target) -> None:
        self.stream = stream
        self._target = target
        self._h11 = h11.Connection(h11.CLIENT)
        self._id = ""
        self.end: End = "timeout"

    @classmethod
    async def open(cls, target: Target, *, offer_http2: bool = False) -> Connection:
        """Connect. With ``offer_http2`` its certificate is not verified: nothing is to be sent.

        Raises:
            CannotConnect: it cannot be reached.
            ssl.SSLCertVerificationError: its certificate is not valid.
        """
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                stream: trio.abc.Stream = await trio.open_tcp_stream(target.name, target.port)
                if target.scheme == "https":
                    stream = await _begin_tls(stream, target, offer_http2=offer_http2)
        except trio.TooSlowError:
            raise CannotConnect(
                f"cannot connect to {target.host}: no answer within {CONNECT_TIMEOUT:g} s"
            ) from None
        except (OSError, trio.BrokenResourceError) as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise error.__cause__ from None
            raise CannotConnect(f"cannot connect to {target.host}: {describe_cause(error)}") from error
        return cls(stream, target)

    async def send_request(self, method: str, path: str, headers: Headers, *, body: bool = False) -> None:
        """Send the head of a request, and its end unless a body follows.

        Raises:
            OSError, trio.BrokenResourceError: the connection was closed.
        """
        self._id = secrets.token_hex(8)
        fields = [("Host", self._target.host), ("X-Request-ID", self._id), *headers]
        data = self._send(h11.Request(method=method, target=self._target.path + path, headers=fields))
        if not body:
            data += self._send(h11.EndOfMessage())
        await self.stream.send_all(data)

    async def send_body(self, data: bytes, *, end: bool = False) -> None:
        """Send a part of a body; ``end``: it is the last one."""
        sent = self._send(h11.Data(data=data)) if data else b""
        if end:
            sent += self._send(h11.EndOfMessage())
        if sent:
            await self.stream.send_all(sent)

    def _send(self, event: h11.Event) -> bytes:
        return self._h11.send(event) or b""

    async def response(self) -> Response:
        """Read the head of the response.

        Raises:
            OSError, trio.BrokenResourceError: the connection was closed before it.
            h11.RemoteProtocolError: it is not HTTP.
        """
        interim: list[int] = []
        while True:
            event = await self._next()
            if isinstance(event, h11.InformationalResponse) and event.status_code != 101:
                interim.append(event.status_code)
            elif isinstance(event, h11.Response | h11.InformationalResponse):
                headers = [(name.decode(), value.decode("latin-1")) for name, value in event.headers]
                version = event.http_version.decode()
                return Response(event.status_code, version, headers, interim, self._id)
            else:
                raise h11.RemoteProtocolError("the connection was closed before the response")

    async def wait_interim(self) -> int | None:
        """Wait for an interim response; None: a final one came first, which cannot be read any more."""
        event = await self._next()
        return event.status_code if isinstance(event, h11.InformationalResponse) else None

    async def receive(self) -> bytes:
        """Return the next part of the response's body; empty after the last one, as ``end`` then says."""
        while self.end == "timeout":
            try:
                event = await self._next()
            except (h11.RemoteProtocolError, OSError, trio.BrokenResourceError):
                self.end = "cut"
                break
            if isinstance(event, h11.Data):
                if event.data:
                    return bytes(event.data)
            else:
                self.end = "complete" if isinstance(event, h11.EndOfMessage) else "cut"
        return b""

    async def read(self) -> bytes:
        """Return the rest of the response's body, or the first ``MAX_SIZE`` bytes of it."""
        data = b""
        while len(data) < MAX_SIZE and (part := await self.receive()):
            data += part
        return data

    async def _next(self) -> object:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._h11.receive_data(bytes(await self.stream.receive_some(READ)))
        return event

    def next_request(self) -> None:
        """Begin another request on this connection, after a complete response.

        Raises:
            h11.ProtocolError: the connection ends with that response.
        """
        self._h11.start_next_cycle()
        self.end = "timeout"

    @property
    def trailing(self) -> bytes:
        """What has arrived behind a response that switches protocols."""
        return self._h11.trailing_data[0]

    async def aclose(self) -> None:
        """Close it, without waiting."""
        await trio.aclose_forcefully(self.stream)


async def _begin_tls(
    stream: trio.abc.Stream, target: Target, *, offer_http2: bool
) -> trio.SSLStream[trio.abc.Stream]:
    if offer_http2:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2", "http/1.1"])
    else:
        context = trusted_authorities(target.ca)
    secured = trio.SSLStream(stream, context, server_hostname=target.name, https_compatible=True)
    try:
        await secured.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return secured


def decompressor(coding: str | None) -> zlib._Decompress | None:
    """Return what decompresses a content coding; None: it is none, or one that zlib does not know."""
    if coding in ("gzip", "x-gzip"):
        return zlib.decompressobj(zlib.MAX_WBITS | 16)
    return zlib.decompressobj() if coding == "deflate" else None


async def request(
    target: Target, path: str, headers: Headers, *, method: str = "GET", wait: float = 0.0
) -> tuple[Response, bytes]:
    """Send a request on a new connection, and read its response, which may take ``wait`` seconds longer.

    Raises:
        CannotConnect: there was none.
        ssl.SSLCertVerificationError: the certificate is not valid.
    """
    connection = await Connection.open(target)
    try:
        with trio.fail_after(wait + SLACK):
            await connection.send_request(method, path, headers)
            return await connection.response(), await connection.read()
    except trio.TooSlowError:
        raise CannotConnect(f"{target.host} has not answered within {wait + SLACK:g} s") from None
    except (OSError, trio.BrokenResourceError, h11.ProtocolError) as error:
        raise CannotConnect(f"{target.host} does not answer in HTTP: {error or 'it has closed'}") from error
    finally:
        await connection.aclose()


def parse_seen(body: bytes) -> Seen | None:
    """Read what the server has received; None: it does not say that."""
    try:
        return msgspec.json.decode(body, type=Seen)
    except msgspec.DecodeError:
        return None
