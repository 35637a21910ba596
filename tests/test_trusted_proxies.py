"""Whose requests a trusted proxy forwards: X-Forwarded-For, Forwarded, and the PROXY protocol."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address
from typing import Any

import httpx
import pytest
import trio
from harness import HTTP2Client
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve
from hypothesis import example, given
from hypothesis import strategies as st
from raw_client import HANDSHAKE, RawConnection, connect, request_bytes

import sseserve
from sseserve.errors import ConfigError
from sseserve.http.auth import Grant
from sseserve.http.messages import Request
from sseserve.http.proxies import TrustedProxies, parse_proxy_header
from sseserve.live.transport import Transport
from sseserve.server.drain import IdleConnections
from sseserve.server.proxy_protocol import read_proxy_header

CLIENT, OTHER = "203.0.113.7", "198.51.100.9"
PROXY, INNER = "10.0.0.1", "10.0.0.2"
V6 = "2001:db8::7"


def client_of(
    value: str | None, header: Any = "x-forwarded-for", *, peer: str = PROXY, more: str = ""
) -> str:
    """Return whose request it is that ``peer`` has sent with a header, and perhaps another line of it."""
    lines = [(header.encode(), text.encode("latin-1")) for text in (value, more) if text]
    request = Request.create("GET", "/", lines, peer=peer)
    return TrustedProxies(["10.0.0.0/8", "2001:db8:ff::/48"], header).resolve(request).peer


@pytest.mark.parametrize(
    ("value", "client"),
    [
        (CLIENT, CLIENT),
        (f" {CLIENT}\t", CLIENT),
        (V6, V6),
        ("2001:DB8:0::7", V6),
        (f"[{V6}]", V6),
        (f"[{V6}]:4711", V6),
        (f"{CLIENT}:4711", CLIENT),
        (f"::ffff:{CLIENT}", CLIENT),
        # Only the last that is not a proxy counts: a client may write what it likes before it.
        (f"{OTHER}, {CLIENT}", CLIENT),
        (f"{CLIENT}, {INNER}", CLIENT),
        (f"{OTHER},{CLIENT},2001:db8:ff::1,{INNER}", CLIENT),
        (f"::ffff:{INNER}", INNER),
        (f"{INNER}, 10.9.9.9", INNER),
        # What cannot be read ends there.
        (f"unknown, {INNER}", INNER),
        (f"{CLIENT}, nonsense", PROXY),
        (f"{CLIENT},", PROXY),
        ("", PROXY),
        (",", PROXY),
        ("nonsense", PROXY),
        ("1.2.3", PROXY),
        ("01.2.3.4", PROXY),
        ("1.2.3.4.5", PROXY),
        (f"{CLIENT}:", PROXY),
        (f"{CLIENT}:123456", PROXY),
        (f"{V6}]", PROXY),
        (f"[{CLIENT}]", PROXY),
        ("fe80::1%eth0", PROXY),
        ("1.2.3.4/8", PROXY),
        (f"{OTHER} {CLIENT}", PROXY),
        ("\xb9.2.3.4", PROXY),
        (f"{CLIENT}:\xb9", PROXY),
        ("\0", PROXY),
        ("," * 10_000, PROXY),
        ("10.0.0.9," * 1000 + INNER, "10.0.0.9"),
    ],
)
def test_x_forwarded_for(value, client):
    assert client_of(value) == client


@pytest.mark.parametrize(
    ("value", "client"),
    [
        (f"for={CLIENT}", CLIENT),
        (f"For={CLIENT};proto=https;by={INNER}", CLIENT),
        (f'proto=https; for="{CLIENT}:4711"', CLIENT),
        (f'for="[{V6}]"', V6),
        (f'for="[{V6}]:4711"', V6),
        (f'for="[{V6}]:4711";host="a,b;c=\\"d\\\\"', V6),
        (f'for="\\{CLIENT}"', CLIENT),
        (f"for={OTHER}, for={CLIENT}", CLIENT),
        (f'for={CLIENT} , for={INNER}, for="[2001:db8:ff::1]:80"', CLIENT),
        # A quote that a client has opened does not hide what the proxies add.
        (f'for="{OTHER}, for={CLIENT}', CLIENT),
        (f'for={OTHER};x="\\", for={CLIENT}', CLIENT),
        (f'for="{OTHER}, for={CLIENT}, for="{INNER}"', CLIENT),
        # Obfuscated, unknown and malformed: the last valid hop.
        ("for=unknown", PROXY),
        ("for=_hidden", PROXY),
        ('for="_hidden:_port"', PROXY),
        (f"for={CLIENT}, for=_hidden", PROXY),
        (f"for=_hidden, for={INNER}", INNER),
        (f"for={V6}", PROXY),
        (f"for=[{V6}]", PROXY),
        (f'for="{V6}"', PROXY),
        (f'for="{CLIENT}', PROXY),
        (f'for={CLIENT}"', PROXY),
        (f"for={CLIENT};for={OTHER}", PROXY),
        (f"for = {CLIENT}", PROXY),
        (f"by={CLIENT}", PROXY),
        ("for=", PROXY),
        (CLIENT, PROXY),
        ('"' * 10_001, PROXY),
        ('\\"' * 10_000, PROXY),
        ('"' + '\\"' * 10_000, PROXY),
        ("for=," * 5000, PROXY),
    ],
)
def test_forwarded(value, client):
    assert client_of(value, "forwarded") == client


def test_only_a_trusted_proxy_is_believed():
    for peer in (CLIENT, "11.0.0.1", "", "testclient"):
        assert client_of(OTHER, peer=peer) == peer
    assert client_of(CLIENT, peer="2001:db8:ff::5") == CLIENT
    assert client_of(CLIENT, peer=f"::ffff:{PROXY}") == CLIENT


def test_lines_of_a_header_are_one_list():
    assert client_of(OTHER, more=f"{CLIENT}, {INNER}") == CLIENT
    assert client_of(f"for={OTHER}", "forwarded", more=f"for={CLIENT}") == CLIENT


def test_only_the_configured_header_counts():
    assert client_of(None) == PROXY
    request = Request.create("GET", "/", [(b"forwarded", b"for=" + CLIENT.encode())], peer=PROXY)
    for header in ("x-forwarded-for", "proxy-protocol"):
        assert TrustedProxies([PROXY], header).resolve(request).peer == PROXY
    assert TrustedProxies().resolve(request).peer == PROXY


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6).filter(lambda ip: ip.ipv4_mapped is None))


@given(st.text(st.characters(codec="latin-1")), addresses, st.booleans())
@example('x="', ip_address(CLIENT), True)
@example('x="\\', ip_address(CLIENT), True)
def test_what_a_client_writes_changes_nothing(forged, address, is_forwarded):
    """Whatever stands before what the proxy has added, the client is the one that it names."""
    header = "forwarded" if is_forwarded else "x-forwarded-for"
    node = f'for="[{address}]:80"' if address.version == 6 else f"for={address}"
    added = node if is_forwarded else str(address)
    network = f"{PROXY}/32"
    request = Request.create(
        "GET", "/", [(header.encode(), f"{forged}, {added}".encode("latin-1"))], peer=PROXY
    )
    assert TrustedProxies([network], header).resolve(request).peer == str(address) or str(address) == PROXY


@given(st.text(st.characters(codec="latin-1")))
def test_any_value_names_an_address(value):
    """Never an error, and never what is not an address."""
    for header in ("x-forwarded-for", "forwarded"):
        assert str(ip_address(client_of(value, header))) != ""


@pytest.mark.parametrize("networks", ["10.0.0.1/8", "10.0.0", "proxy.example", "", "10.0.0.0/33", "::1/127"])
def test_invalid_networks(networks):
    with pytest.raises(ConfigError, match="trusted_proxies"):
        TrustedProxies([networks])
    with pytest.raises(ConfigError, match=r"(?i)trusted_proxies .* addresses or networks"):
        sseserve.config.load(environ={"SSESERVE_TRUSTED_PROXIES": f"192.0.2.1, {networks or 'x'}"})


def test_the_proxy_protocol_needs_proxies():
    with pytest.raises(ConfigError, match="needs trusted_proxies"):
        TrustedProxies([], "proxy-protocol")


# The PROXY protocol, as bytes

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v1(text: str) -> bytes:
    return f"PROXY {text}\r\n".encode()


def v2(
    address: str = CLIENT,
    port: int = 4711,
    *,
    command: int = 0x21,
    family: int | None = None,
    more: bytes = b"",
) -> bytes:
    """Encode a header of version 2; ``more`` are its TLVs."""
    packed = ip_address(address).packed
    if family is None:
        family = 0x11 if len(packed) == 4 else 0x21
    body = packed + b"\x7f\0\0\1".rjust(len(packed), b"\0") + struct.pack("!HH", port, 443) + more
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


HEADERS = {
    "v1": (v1(f"TCP4 {CLIENT} 10.0.0.1 4711 443"), (CLIENT, 4711)),
    "v1 of IPv6": (v1(f"TCP6 {V6} ::1 0 65535"), (V6, 0)),
    "v1 in its longest form": (v1("TCP6 " + " ".join(["ffff:" * 7 + "ffff"] * 2) + " 65535 65535"), None),
    "v1 unknown": (v1("UNKNOWN"), None),
    "v1 unknown with more": (v1("UNKNOWN " + "f" * 80), None),
    "v2": (v2(), (CLIENT, 4711)),
    "v2 of IPv6": (v2(V6), (V6, 4711)),
    "v2 with TLVs": (v2(more=b"\x01\0\x02h2" + b"\xee\xff\xff"), (CLIENT, 4711)),
    "v2 local": (v2(command=0x20), None),
    "v2 local without addresses": (SIGNATURE + b"\x20\0\0\0", None),
    "v2 unspecified": (v2(family=0), None),
    "v2 of a unix socket": (SIGNATURE + b"\x21\x31\0\xd8" + b"\0" * 216, None),
}
HEADERS["v1 in its longest form"] = (HEADERS["v1 in its longest form"][0], (":".join(["ffff"] * 8), 65535))

MALFORMED = {
    "nothing of it": b"GET / HTTP/1.1\r\n\r\n",
    "another case": b"proxy TCP4 1.2.3.4 1.2.3.4 1 1\r\n",
    "v1 too long": b"PROXY UNKNOWN " + b"x" * 94,
    "v1 too long, with its end": v1("UNKNOWN " + "f" * 100),
    "v1 without its end": b"PROXY TCP4 " + b"1" * 200,
    "v1 without addresses": v1("TCP4"),
    "v1 of an unknown family": v1("TCP5 1.2.3.4 1.2.3.4 1 1"),
    "v1 of UNKNOWN and a byte": v1("UNKNOWNX"),
    "v1 of both families": v1(f"TCP4 {V6} ::1 1 1"),
    "v1 of both families, too": v1("TCP6 1.2.3.4 1.2.3.4 1 1"),
    "v1 without a destination": v1("TCP4 1.2.3.4 1 1"),
    "v1 with two spaces": v1("TCP4  1.2.3.4 1.2.3.4 1 1"),
    "v1 with a tab": v1("TCP4\t1.2.3.4 1.2.3.4 1 1"),
    "v1 with a large port": v1("TCP4 1.2.3.4 1.2.3.4 65536 1"),
    "v1 with a long port": v1("TCP4 1.2.3.4 1.2.3.4 01 1"),
    "v1 with a negative port": v1("TCP4 1.2.3.4 1.2.3.4 -1 1"),
    "v1 with a bad address": v1("TCP4 1.2.3.256 1.2.3.4 1 1"),
    "v1 with a zero in front": v1("TCP4 01.2.3.4 1.2.3.4 1 1"),
    "v1 with a line feed": b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\nX\r\n",
    "v2 of another version": v2(command=0x11),
    "v2 of another command": v2(command=0x22),
    "v2 of UDP": v2(family=0x12),
    "v2 of UDP over IPv6": v2(V6, family=0x22),
    "v2 of another family": v2(family=0x41),
    "v2 of another protocol": v2(family=0x13),
    "v2 with too little": SIGNATURE + b"\x21\x11\0\x0b" + b"\0" * 11,
    "v2 with the size of IPv4 for IPv6": SIGNATURE + b"\x21\x21\0\x0c" + b"\0" * 12,
    "v2 too large": SIGNATURE + b"\x21\x11\xff\xff" + b"\0" * 12,
    "v2 local too large": SIGNATURE + b"\x20\0\xff\xff",
    "half of the signature": SIGNATURE[:6] + b"GET / ",
}


@pytest.mark.parametrize("name", HEADERS)
def test_proxy_headers(name):
    """Read as soon as they are complete, and no byte before or beyond."""
    data, client = HEADERS[name]
    for size in range(len(data)):
        assert parse_proxy_header(data[:size]) is None
    for following in (b"", b"G", b"PRI * HTTP/2.0\r\n", data, b"\r\n"):
        header = parse_proxy_header(data + following)
        assert header is not None
        assert (header.size, header.client) == (len(data), client)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_proxy_headers(name):
    with pytest.raises(ValueError, match=r"."):
        parse_proxy_header(MALFORMED[name])


@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=300).map(lambda data: b"PROXY " + data),
        st.text("PROXYTCUNKW 0123456789.:abf\r\n", max_size=120).map(lambda text: b"PROXY " + text.encode()),
        st.binary(max_size=300).map(lambda data: SIGNATURE + data),
        st.tuples(st.sampled_from(sorted(HEADERS)), st.integers(0, 60), st.binary(max_size=3)).map(
            lambda change: (data := HEADERS[change[0]][0])[: change[1]] + change[2] + data[change[1] + 1 :]
        ),
    )
)
def test_any_bytes_are_a_header_or_an_error(data):
    """One after another they say what all of them say, and an address is one."""
    try:
        header = parse_proxy_header(data)
    except ValueError:
        header = None
    else:
        if header is None:
            assert len(data) < 16 + 4096
            return
        assert header.size <= len(data)
        if header.client is not None:
            assert str(ip_address(header.client[0])) == header.client[0]
            assert 0 <= header.client[1] <= 65535
    for size in range(len(data)):
        try:
            earlier = parse_proxy_header(data[:size])
        except ValueError:
            assert header is None
            return
        if earlier is not None:
            assert earlier == header
            return


# The server

STREAM = "/api/sessions/s/status/stream"
LOOPBACK = ("127.0.0.1",)


class Peers:
    """A server that notes whose requests it gets."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def authenticate(self, request: Request) -> Grant:
        self.seen.append(request.peer)
        return Grant("root", "admin")

    @asynccontextmanager
    async def serve(self, **settings: Any) -> AsyncIterator[sseserve.Server]:
        settings = {"trusted_proxies": LOOPBACK, "drain": 0.2, **settings}
        async with sseserve.serve(port=0, authenticate=self.authenticate, **settings) as server:
            await server.tracker.update("s", progress=1)
            yield server


async def request_over(kind: str, connection: RawConnection, headers: list[tuple[str, str]]) -> None:
    """Make a request of a kind, and read the head of its response."""
    targets = {"socket": "/api/sessions/s/status/ws", "poll": "/api/sessions/s/status?wait=0.01"}
    targets |= {"bundle": "/api/streams?session=s&session=s", "publish": "/api/sessions/s/events"}
    target = targets.get(kind.removeprefix("http2 "), STREAM)
    if kind.startswith("http2"):
        client = HTTP2Client(connection)
        if kind == "http2 socket":
            number = await client.connect(target, headers)
        else:
            (number,) = await client.request(target, headers=headers)
        await client.read_until(lambda: number in client.statuses)
        assert client.statuses[number] == 200
        return
    if kind == "publish":
        assert (await connection.request("POST", target, b'{"type": "x"}', headers)).status == 202
        return
    upgrade = HANDSHAKE if kind == "socket" else ()
    await connection.send(request_bytes("GET", target, headers=[*headers, *upgrade]))
    assert (await connection.read_head()).status in (101, 200)


KINDS = (
    "stream",
    "bundle",
    "socket",
    "poll",
    "publish",
    "http2",
    "http2 bundle",
    "http2 socket",
    "http2 poll",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
async def test_requests_are_those_of_their_clients(kind, header):
    peers = Peers()
    async with peers.serve(proxy_header=header) as server:
        for client in (CLIENT, V6):
            connection = await connect(server.port)
            node = client if "." in client else f'"[{client}]"'
            value = f"{OTHER}, {client}" if header == "x-forwarded-for" else f"for={OTHER}, for={node}"
            async with connection.stream:
                await request_over(kind, connection, [(header, value)])
        stranger = await connect(server.port, address="127.0.0.2")
        async with stranger.stream:
            await request_over(kind, stranger, [(header, CLIENT if header[0] == "x" else f"for={CLIENT}")])
    assert peers.seen == [CLIENT, V6, "127.0.0.2"]


async def test_each_request_of_a_connection_has_its_client():
    """A proxy sends the requests of many clients over one connection."""
    peers = Peers()
    async with peers.serve() as server:
        connection = await connect(server.port)
        async with connection.stream:
            for client in (CLIENT, OTHER, None, CLIENT):
                headers = [] if client is None else [("X-Forwarded-For", client)]
                await request_over("publish", connection, headers)
    assert peers.seen == [CLIENT, OTHER, "127.0.0.1", CLIENT]


@pytest.mark.parametrize("http2", [False, True])
async def test_the_mounted_application(nursery, http2):
    """In a server of one's own the address is that server's, and its proxies are believed as well."""
    peers, config, stop = Peers(), Config(), trio.Event()
    config.bind, config.errorlog = ["127.0.0.1:0"], None
    async with peers.serve() as server:
        (url,) = await nursery.start(
            lambda *, task_status: hypercorn_serve(
                server.asgi_app, config, shutdown_trigger=stop.wait, mode="asgi", task_status=task_status
            )
        )
        async with httpx.AsyncClient(base_url=url, http1=not http2, http2=http2) as client:
            for headers in ({"X-Forwarded-For": CLIENT}, {}):
                assert (await client.get("/api/sessions/s/status", headers=headers)).status_code == 200
        stop.set()
    assert peers.seen == [CLIENT, "127.0.0.1"]


async def test_clients_behind_a_proxy_are_limited_separately():
    """By rate and by their streams; what one of them forges is its own."""
    limits: dict[str, Any] = {"max_streams_per_address": 1, "publish_rate": 0.1}
    async with sseserve.serve(port=0, drain=0.2, trusted_proxies=LOOPBACK, **limits) as server:
        await server.tracker.update("s", progress=1)
        async with AsyncExitStack() as stack:

            async def open_one(forwarded: str) -> int:
                connection = await connect(server.port)
                await stack.enter_async_context(connection.stream)
                return (await connection.watch("s", headers=[("X-Forwarded-For", forwarded)])).status

            assert [await open_one(CLIENT), await open_one(CLIENT), await open_one(OTHER)] == [200, 429, 200]
            assert await open_one(f"1.2.3.4, {CLIENT}") == 429

            async def publish(forwarded: str) -> int:
                connection = await connect(server.port)
                async with connection.stream:
                    headers = [("X-Forwarded-For", forwarded)]
                    path, body = "/api/sessions/s/events", b'{"type": "x"}'
                    return (await connection.request("POST", path, body, headers)).status

            statuses = [
                await publish(forwarded) for forwarded in (CLIENT, CLIENT, OTHER, f"8.8.8.8, {CLIENT}")
            ]
            assert statuses == [202, 429, 202, 429]


async def test_a_proxy_may_have_any_number_of_connections():
    settings: dict[str, Any] = {"max_connections_per_address": 1, "limit_loopback": True}
    async with (
        sseserve.serve(port=0, drain=0.2, trusted_proxies=LOOPBACK, **settings) as server,
        AsyncExitStack() as stack,
    ):
        for _ in range(3):
            connection = await connect(server.port)
            await stack.enter_async_context(connection.stream)
            assert (await connection.request("GET", "/health")).status == 200


# The PROXY protocol, on connections


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["v1", "v1 of IPv6", "v1 unknown", "v2", "v2 with TLVs", "v2 local"])
async def test_connections_are_those_of_their_clients(kind, name):
    """What follows the header is HTTP/1.1 or HTTP/2; no header of a request counts."""
    peers = Peers()
    data, client = HEADERS[name]
    async with peers.serve(proxy_header="proxy-protocol") as server:
        connection = await connect(server.port)
        async with connection.stream:
            await connection.send(data)
            await request_over(kind, connection, [("X-Forwarded-For", OTHER), ("Forwarded", f"for={OTHER}")])
        # Who is no proxy sends none.
        stranger = await connect(server.port, address="127.0.0.2")
        async with stranger.stream:
            await request_over(kind, stranger, [])
    assert peers.seen == [client[0] if client else "127.0.0.1", "127.0.0.2"]


@pytest.mark.parametrize("name", ["v1", "v2"])
async def test_a_header_in_any_pieces(autojump_clock, name):
    """Cut at each byte, with what follows it."""
    data, client = HEADERS[name]
    data += b"GET / HTTP/1.1\r\n"
    for cut in range(1, len(data)):
        transport, sent = await read_header([data[:cut], data[cut:]])
        assert transport is not None
        assert transport.client == client
        assert transport._pushed + sent == b"GET / HTTP/1.1\r\n"
    transport, sent = await read_header([data[at : at + 1] for at in range(len(data))])
    assert transport is not None
    assert transport._pushed + sent == b"GET / HTTP/1.1\r\n"


async def read_header(pieces: list[bytes], *, seconds: float = 0.0) -> tuple[Transport | None, bytes]:
    """Send pieces, so many seconds apart; return the transport (None: to be closed), and what is unread."""
    client, server = trio.testing.memory_stream_pair()
    transport = Transport(server)
    accepted = False

    async def read() -> None:
        nonlocal accepted
        accepted = await read_proxy_header(transport, IdleConnections(10), timeout=10, is_late=False)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for piece in pieces:
            await client.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(seconds)
        await client.send_eof()
    rest = b""
    if accepted:
        while data := await server.receive_some(100):
            rest += data
    return (transport if accepted else None), rest


async def test_a_header_that_trickles_is_given_up(autojump_clock):
    """All of it has to come within the time of a request's head, however it does."""
    data, _ = HEADERS["v1"]
    pieces = [data[at : at + 1] for at in range(len(data))]
    assert (await read_header(pieces, seconds=0.1))[0] is not None
    assert (await read_header(pieces, seconds=0.5))[0] is None
    assert (await read_header([data[:-1]]))[0] is None
    assert (await read_header([]))[0] is None


@pytest.mark.parametrize("data", [*MALFORMED.values(), b"", v1("TCP4 1.2.3.4 1.2.3.4 1 1")[:-1]])
async def test_a_proxy_without_a_header_is_closed(data, caplog):
    """Without a response: it may be no HTTP that was to follow. The next connection is served."""
    peers = Peers()
    async with peers.serve(proxy_header="proxy-protocol") as server:
        connection = await connect(server.port)
        async with connection.stream:
            await connection.send(data)
            if not data or data.startswith(b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\r"):
                await connection.stream.send_eof()
            assert await connection.read_to_end() == b""
        good = await connect(server.port)
        async with good.stream:
            await good.send(v2())
            await request_over("publish", good, [])
    assert peers.seen == [CLIENT]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_stop_does_not_wait_for_a_header():
    async with sseserve.serve(
        port=0, drain=30, trusted_proxies=LOOPBACK, proxy_header="proxy-protocol"
    ) as server:
        connection = await connect(server.port)
        while not server.app.counters.connections:
            await trio.lowlevel.checkpoint()
        with trio.fail_after(10):
            server.stop()
            assert await connection.read_to_end() == b""
        connection.stream.socket.close()


async def test_a_proxy_that_resets_before_its_header(caplog):
    async with sseserve.serve(
        port=0, drain=0.2, trusted_proxies=LOOPBACK, proxy_header="proxy-protocol"
    ) as server:
        for data in (b"", b"PROXY "):
            connection = await connect(server.port)
            await connection.send(data)
            sock = connection.stream.socket  # type: ignore[attr-defined]
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        good = await connect(server.port)
        async with good.stream:
            await good.send(v2())
            assert (await good.request("GET", "/health")).json["connections"] >= 1
        while server.app.counters.connections:
            await trio.lowlevel.checkpoint()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
