"""A server that speaks TLS itself: certificates, handshakes, and what clients get."""

from __future__ import annotations

import json
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from certificates import Authority
from raw_client import RawConnection, RawWebSocket, connect, request_bytes
from tls_streams import request_key_update

import sseserve
from sseserve.client import CannotConnect, Publisher, StatusPublisher, watch
from sseserve.errors import ConfigError
from sseserve.server.tls import CHECK, Certificates, open_certificates


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def ca(authority, tmp_path) -> Path:
    """The file that clients trust."""
    return authority.write(tmp_path)


@pytest.fixture
def files(authority, tmp_path) -> tuple[Path, Path]:
    return authority.issue().write(tmp_path)


def serve(files: tuple[Path, Path], **settings: Any) -> sseserve.serve:
    return sseserve.serve(port=0, tls_cert=str(files[0]), tls_key=str(files[1]), **settings)


async def connect_tls(
    port: int, ca: Path, *, alpn: str = "http/1.1", version: ssl.TLSVersion | None = None
) -> RawConnection:
    """Connect, and agree on keys."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols([alpn])
    if version is not None:
        context.minimum_version = context.maximum_version = version
    stream = await trio.open_ssl_over_tcp_stream(
        "127.0.0.1", port, ssl_context=context, https_compatible=True
    )
    await stream.do_handshake()
    assert stream.selected_alpn_protocol() == alpn
    return RawConnection(stream)


async def serial_of(port: int, ca: Path) -> int:
    """The serial number of the certificate that a new connection gets."""
    connection = await connect_tls(port, ca)
    async with connection.stream:
        return int(connection.stream.getpeercert()["serialNumber"], 16)


# What clients get


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda v: v.name)
async def test_requests_and_streams(files, ca, version):
    """Requests one after another, then a stream to its end, on one connection."""
    async with serve(files) as server:
        assert server.url == f"https://127.0.0.1:{server.port}"
        connection = await connect_tls(server.port, ca, version=version)
        async with connection.stream:
            assert (await connection.request("GET", "/health")).status == 200
            body = json.dumps({"data": {"text": "x" * 100_000}}).encode()
            target = "/api/sessions/s/progress"
            assert (await connection.request("POST", target, body)).status == 202
            await connection.watch("s")
            first = await connection.event()
            assert json.loads(first.data)["data"]["text"] == "x" * 100_000
            await server.tracker.update("s", status="done")
            assert [event.event for event in await connection.events()] == ["complete"]
            assert connection.ended == "eof"
            assert connection.chunks.complete


async def test_websocket(files, ca):
    async with serve(files) as server:
        await server.tracker.update("s", progress=1)
        connection = await connect_tls(server.port, ca)
        async with connection.stream:
            websocket = await RawWebSocket.open(connection, "s")
            await websocket.send(9, b"ping")
            assert (await websocket.message())["event"] == "progress"
            await server.tracker.update("s", status="done")
            frames = [await websocket.frame(), await websocket.frame()]
            assert [opcode for opcode, _ in frames] == [10, 1]
            assert await websocket.message() == (1000, "ended")


@pytest.mark.parametrize("transport", ["sse", "ws", "poll"])
async def test_client(files, ca, transport):
    """All of its transports, and both publishers, with a certificate of an authority of one's own."""
    async with serve(files) as server:
        async with Publisher(server.url, ca=ca) as publisher:
            await publisher.progress("s", progress=10)
        async with watch(server.url, "s", transport=transport, ca=ca) as messages:
            with StatusPublisher(server.url, ca=ca, raise_errors=True) as publisher:
                send = partial(publisher.publish_status_update, "s", {"status": "completed"})
                async for message in messages:
                    if message.event == "progress":
                        await trio.to_thread.run_sync(send)
        assert message.event == "complete"


@pytest.mark.parametrize("transport", ["sse", "ws", "poll"])
async def test_client_that_does_not_trust_the_certificate(files, transport):
    async with serve(files) as server:
        async with watch(server.url, "s", transport=transport, retry_timeout=0) as messages:
            with pytest.raises(
                CannotConnect, match=r"certificate is not trusted: unable to get local issuer .*--ca"
            ):
                await anext(messages)
        while server.app.counters.connections:
            await trio.lowlevel.checkpoint()


async def test_key_update_on_an_idle_stream(files, ca):
    """It is answered by a client that only watches, and both go on with other keys (RFC 8446, 4.6.3)."""
    async with serve(files) as server:
        await server.tracker.update("s", progress=1)
        connection = await connect_tls(server.port, ca)
        async with connection.stream:
            await connection.watch("s")
            await connection.event()
            for percent in (2, 3):
                request_key_update(connection.stream)
                await connection.send(b" ")
                await server.tracker.update("s", progress=percent)
                assert json.loads((await connection.event()).data)["progress"] == percent


async def test_session_is_resumed(files, ca):
    """With a ticket of the first connection the second needs no signature."""

    def reconnect(port: int) -> bool:
        context, session = ssl.create_default_context(cafile=ca), None
        for _ in range(2):
            with (
                socket.create_connection(("127.0.0.1", port)) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as client,
            ):
                client.sendall(request_bytes("GET", "/health", headers=[("Connection", "close")]))
                while client.recv(4096):
                    pass
                session = client.session
                is_reused = client.session_reused
        return is_reused

    async with serve(files) as server:
        assert await trio.to_thread.run_sync(reconnect, server.port)


async def test_page_of_the_same_host_on_the_default_port(files, ca):
    """An ``Origin`` and a ``Host`` without a port are both about port 443."""
    async with serve(files, allowed_hosts=["sse.example"]) as server:
        connection = await connect_tls(server.port, ca)
        async with connection.stream:
            for host in ("sse.example", "sse.example:443"):
                for origin, status in (
                    ("https://sse.example", 202),
                    ("https://sse.example:8443", 403),
                    ("https://other.example", 403),
                ):
                    headers = [("Host", host), ("Origin", origin)]
                    body = b'{"progress": 1}'
                    response = await connection.request("POST", "/api/sessions/s/progress", body, headers)
                    assert response.status == status, (host, origin)


# Handshakes


async def test_plain_http(files):
    """Whoever forgets the s is told."""
    async with serve(files) as server:
        connection = await connect(server.port)
        async with connection.stream:
            response = await connection.request("GET", "/")
            assert response.status == 400
            assert "https://" in response.error["message"]
            assert response.headers["connection"] == "close"
            assert "date" in response.headers


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x2e\x01\x03\x01" + bytes(100),
        bytes(1000),
        b"\x16\x03\x01\x00\x04abcd",
        b"\x16\x03\x01\xff\xff" + b"a" * 70000,
    ],
    ids=["SSL 2", "zeros", "no ClientHello", "too large"],
)
async def test_garbage(files, ca, data, caplog):
    """It ends its own connection only, and is no error of the server."""
    async with serve(files) as server:
        good = await connect_tls(server.port, ca)
        bad = await connect(server.port)
        async with good.stream, bad.stream:
            await bad.send(data)
            await bad.read_to_end()
            assert (await good.request("GET", "/health")).status == 200
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_old_version(files, ca):
    """TLS 1.1 is refused, by a client that would speak it."""
    context = ssl.create_default_context(cafile=ca)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with serve(files) as server:
        stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", server.port, ssl_context=context)
        with pytest.raises(trio.BrokenResourceError) as error:
            await stream.do_handshake()
        assert "PROTOCOL_VERSION" in str(error.value.__cause__).upper().replace(" ", "_")
        await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("data", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["nothing", "a part"])
async def test_stalled_handshake(files, data):
    """It may take as long as the head of a request."""
    async with serve(files, request_timeout=0.2) as server:
        connection = await connect(server.port)
        async with connection.stream:
            await connection.send(data)
            assert await connection.read_to_end() == b""


@pytest.mark.parametrize("state", ["nothing sent", "idle", "idle after a request"])
async def test_drain_does_not_wait_for_idle_connections(files, ca, state, caplog):
    """Nor for those that have not begun their handshake."""
    caplog.set_level(logging.INFO)
    async with serve(files, drain=600) as server:
        connection = await (connect(server.port) if state == "nothing sent" else connect_tls(server.port, ca))
        if state == "idle after a request":
            assert (await connection.request("GET", "/health")).status == 200
        while server.app.idle.waiting != 1:
            await trio.lowlevel.checkpoint()
    assert await connection.read_to_end() == b""
    assert "at the deadline" not in caplog.text
    await trio.aclose_forcefully(connection.stream)


async def test_drain_with_a_stream(files, ca):
    """Its client is asked to reconnect, and the end is complete."""
    async with serve(files) as server:
        await server.tracker.update("s", progress=1)
        connection = await connect_tls(server.port, ca)
        await connection.watch("s")
        await connection.event()
        server.stop()
        assert await connection.events() == []
        await connection.stream.aclose()
    assert connection.decoder.retry
    assert connection.chunks.complete


async def test_too_many_connections(files, ca):
    """One more is closed, as nothing can be said before the handshake."""
    async with serve(files, max_connections=1) as server:
        first = await connect_tls(server.port, ca)
        second = await connect(server.port)
        async with first.stream, second.stream:
            assert await second.read_to_end() == b""
            assert (await first.request("GET", "/health")).status == 200


async def test_proxy_protocol(files, ca):
    """Its header comes before the handshake, in the same packet or not."""
    async with serve(files, trusted_proxies=["127.0.0.1"], proxy_header="proxy-protocol") as server:
        context = ssl.create_default_context(cafile=ca)
        for is_joined in (False, True):
            plain = (await connect(server.port)).stream
            header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 443\r\n"
            if is_joined:
                stream = trio.SSLStream(_Prefixed(plain, header), context, server_hostname="localhost")
            else:
                await plain.send_all(header)
                stream = trio.SSLStream(plain, context, server_hostname="localhost")
            connection = RawConnection(stream)
            assert (await connection.request("GET", "/health")).status == 200
            await trio.aclose_forcefully(stream)


class _Prefixed(trio.abc.Stream):
    """Sends something before the first write."""

    def __init__(self, stream: trio.abc.Stream, prefix: bytes) -> None:
        self._stream = stream
        self._prefix = prefix

    async def send_all(self, data: Any) -> None:
        prefix, self._prefix = self._prefix, b""
        await self._stream.send_all(prefix + bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> Any:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


# Certificates


def write_each(folder: Path, certificate: bytes | None, key: bytes | None) -> tuple[str, str]:
    for name, data in (("c.pem", certificate), ("k.pem", key)):
        if data is not None:
            (folder / name).write_bytes(data)
    return str(folder / "c.pem"), str(folder / "k.pem")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda one, two: (None, one.key), r"cannot read tls_cert = '.*c.pem': No such file"),
        (lambda one, two: (one.chain, None), r"cannot read tls_key = '.*k.pem': No such file"),
        (lambda one, two: (b"hello", one.key), "tls_cert = .* has no certificate in PEM"),
        (lambda one, two: (one.chain, one.chain), "tls_key = .* has no private key in PEM"),
        (lambda one, two: (one.chain, two.key), "k.pem' is not the key of the first certificate in"),
        (
            lambda one, two: (one.chain, one.encrypted_key),
            "is encrypted; write it without a password .*: openssl pkey -in",
        ),
        (lambda one, two: (one.chain[:300], one.key), "cannot be used"),
    ],
)
def test_files_that_cannot_be_used(authority, tmp_path, make: Callable, message: str):
    paths = write_each(tmp_path, *make(authority.issue(), authority.issue()))
    with pytest.raises(ConfigError, match=message):
        Certificates(*paths)


@pytest.mark.parametrize("missing", ["tls_cert", "tls_key"])
async def test_both_settings_are_needed(files, missing):
    paths = {"tls_cert": str(files[0]), "tls_key": str(files[1])}
    del paths[missing]
    with pytest.raises(ConfigError, match=f"needs {missing}"):
        async with sseserve.serve(port=0, **paths):
            pass
    assert open_certificates(None, None) is None


async def test_new_certificate(authority, files, ca, tmp_path, caplog):
    """New connections get it; a stream that is open goes on. Until both files fit, the old one stays."""
    caplog.set_level(logging.INFO)
    async with serve(files) as server:
        certificates = server.app.certificates
        await server.tracker.update("s", progress=1)
        connection = await connect_tls(server.port, ca)
        await connection.watch("s")
        await connection.event()
        old = await serial_of(server.port, ca)
        new = authority.issue()
        files[0].write_bytes(new.chain)
        certificates.check()
        certificates.check()
        assert await serial_of(server.port, ca) == old
        with pytest.raises(ConfigError, match="is not the key"):
            certificates.reload()
        assert await serial_of(server.port, ca) == old
        files[1].write_bytes(new.key)
        certificates.check()
        assert await serial_of(server.port, ca) == new.serial != old
        # Replaced as a whole, as tools for certificates do.
        last = authority.issue()
        for path, replacement in zip(files, last.write(tmp_path, "next"), strict=True):
            replacement.rename(path)
        assert certificates.reload()
        assert not certificates.reload()
        assert await serial_of(server.port, ca) == last.serial
        files[1].unlink()
        certificates.check()
        assert await serial_of(server.port, ca) == last.serial
        await server.tracker.update("s", progress=2)
        assert json.loads((await connection.event()).data)["progress"] == 2
        await connection.stream.aclose()
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "is not the key of the first certificate" in errors[0]
    assert "cannot read tls_key" in errors[1]
    assert caplog.text.count("loaded the new certificate") == 1


async def test_files_are_checked_every_few_seconds(authority, files, autojump_clock, nursery):
    certificates = Certificates(*map(str, files))
    context = certificates._context
    nursery.start_soon(certificates.run)
    await trio.sleep(2 * CHECK + 1)
    assert certificates._context is context
    authority.issue().write(files[0].parent)
    await trio.sleep(CHECK)
    assert certificates._context is not context
