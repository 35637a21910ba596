"""Whose requests a trusted proxy forwards. No I/O.

Only the proxies that are listed are believed, and of the addresses that they name only the last that is not
one of them: what stands before it was sent by a client, which may write anything. What cannot be read ends
there, too: then the request counts as that of the proxy which has passed it on.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal

import msgspec

from ..errors import ConfigError
from .limits import UNIX
from .messages import Request

__all__ = ["ProxyHeader", "TrustedProxies", "parse_network", "parse_proxy_header"]

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110, section 5.6.2
_PAIR = re.compile(rf'\s*({_TOKEN})=({_TOKEN}|"(?:[^"\\]|\\.)*")\s*(?:;|$)')
_NODE = re.compile(r"(?:\[([0-9A-Fa-f]*:[0-9A-Fa-f:.]*)\]|([0-9.]+))(?::\d{1,5})?", re.ASCII)
_QUOTED_PAIR = re.compile(r"\\(.)")


def parse_network(text: str) -> IPv4Network | IPv6Network:
    """Read an address, or a network as in 10.0.0.0/8.

    Raises:
        ValueError: it is neither, or has bits of an address behind its prefix.
    """
    return ip_network(text)


def _parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Read an address; an IPv4 address is the same in IPv6 notation. None: it is none, or has a zone."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv4Address):
        return address
    return (address.ipv4_mapped or address) if address.scope_id is None else None


class TrustedProxies:
    """The proxies of one server.

    Args:
        networks: their addresses, or networks; ``unix``: whoever connects to a unix socket is one.
        header: where they say whose requests they forward.

    Raises:
        ConfigError: a network cannot be one, or there is none for the PROXY protocol.
    """

    def __init__(
        self,
        networks: Sequence[str] = (),
        header: Literal["x-forwarded-for", "forwarded", "proxy-protocol"] = "x-forwarded-for",
    ) -> None:
        try:
            self._networks = [parse_network(network) for network in networks if network != UNIX]
        except ValueError as error:
            raise ConfigError(f"trusted_proxies: {error}") from error
        if header == "proxy-protocol" and not networks:
            raise ConfigError(
                "proxy_header = 'proxy-protocol' needs trusted_proxies: every other connection is without it"
            )
        self._trusts_unix = UNIX in networks
        self._has_any = bool(networks)
        self._hops = {"forwarded": _forwarded, "x-forwarded-for": _forwarded_for}.get(header)
        self._header = header
        self.trusts = lru_cache(maxsize=1024)(self._trusts)

    def _trusts(self, address: str) -> bool:
        """Return whether an address is one of them."""
        if address == UNIX:
            return self._trusts_unix
        parsed = _parse_address(address)
        return parsed is not None and any(parsed in network for network in self._networks)

    def begins_with_header(self, peer: str) -> bool:
        """Return whether a connection of ``peer`` begins with the header of the PROXY protocol."""
        return self._hops is None and self.trusts(peer)

    def resolve(self, request: Request) -> Request:
        """Return a request that a proxy has forwarded as that of its client."""
        if not self._has_any or self._hops is None or not self.trusts(request.peer):
            return request
        if not (value := request.headers.get(self._header)):
            return request
        client = request.peer
        for hop in self._hops(value):
            if hop is None:
                break
            client = str(hop)
            if not self.trusts(client):
                break
        return msgspec.structs.replace(request, peer=client, proxy=request.peer)


def _forwarded_for(value: str) -> Iterator[IPv4Address | IPv6Address | None]:
    """Yield the addresses of an ``X-Forwarded-For``, the last first; None for what is none."""
    end = len(value)
    while end >= 0:
        begin = value.rfind(",", 0, end) + 1
        yield _parse_node(value[begin:end].strip(), bare=True)
        end = begin - 1


def _forwarded(value: str) -> Iterator[IPv4Address | IPv6Address | None]:
    """Yield the addresses of a ``Forwarded`` (RFC 7239, section 4), the last first; None for what is none."""
    for element in _elements(value):
        nodes: list[str] = []
        at = 0
        while at < len(element) and (pair := _PAIR.match(element, at)) is not None:
            if pair[1].lower() == "for":
                node = pair[2]
                nodes.append(_QUOTED_PAIR.sub(r"\1", node[1:-1]) if node[0] == '"' else node)
            at = pair.end()
        is_whole = at == len(element)
        yield _parse_node(nodes[0]) if is_whole and len(nodes) == 1 else None


def _elements(value: str) -> Iterator[str]:
    """Yield the elements of a list, in which strings may be quoted, the last first.

    From the end, as a client may have sent a quote that nothing closes: the proxies' elements are behind it.
    """
    end = at = len(value)
    while at > 0:
        at -= 1
        if value[at] == '"':
            at = _opening_quote(value, at)
        elif value[at] == ",":
            yield value[at + 1 : end]
            end = at
    yield value[:end]


def _opening_quote(value: str, closing: int) -> int:
    """Return where the quote is that opens a string; -1 if there is none."""
    at = closing
    while (at := value.rfind('"', 0, at)) > 0:
        backslashes = 0
        while backslashes < at and value[at - 1 - backslashes] == "\\":
            backslashes += 1
        if backslashes % 2 == 0:
            return at
    return at


def _parse_node(text: str, *, bare: bool = False) -> IPv4Address | IPv6Address | None:
    """Read an address with or without a port; that of IPv6 has brackets, unless it may be ``bare``."""
    if (node := _NODE.fullmatch(text)) is not None:
        address = _parse_address(node[1] or node[2])
        wanted = (
            IPv4Address if node[1] is None else (IPv4Address, IPv6Address)
        )  # in brackets it may be mapped
        return address if isinstance(address, wanted) else None
    return _parse_address(text) if bare else None


# The PROXY protocol: https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt

_V1, _V2 = b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n"
_MAX_V1 = 107  # bytes, with CR and LF (section 2.1)
_MAX_V2 = 4096  # bytes of addresses and TLVs, which are about certificates at most
_V1_LINE = re.compile(
    rb"PROXY (TCP4|TCP6) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4})"
)
_LOCAL, _PROXY = 0x20, 0x21  # version 2, and the command
_UNSPECIFIED, _TCP4, _TCP6, _UNIX = 0x00, 0x11, 0x21, 0x31


class ProxyHeader(msgspec.Struct, frozen=True):
    """The header of a connection.

    ``client`` is the address and the port of whose connection it is; None: it is the proxy's own, or has no
    address. ``size``: in bytes; behind them the connection begins.
    """

    size: int
    client: tuple[str, int] | None


def parse_proxy_header(data: bytes) -> ProxyHeader | None:
    """Read the header that a connection begins with, of version 1 or 2; None: more of it is to come.

    Raises:
        ValueError: it begins with none, or one that is malformed or too large.
    """
    if data.startswith(_V1):
        return _parse_v1(data)
    if data.startswith(_V2):
        return _parse_v2(data)
    if _V1.startswith(data) or _V2.startswith(data):
        return None
    raise ValueError("it does not begin with a header of the PROXY protocol")


def _parse_v1(data: bytes) -> ProxyHeader | None:
    line, end, _ = data[:_MAX_V1].partition(b"\r\n")
    if not end:
        if len(data) >= _MAX_V1:
            raise ValueError("the line is too long")
        return None
    size = len(line) + 2
    if line == b"PROXY UNKNOWN" or line.startswith(b"PROXY UNKNOWN "):
        return ProxyHeader(size, None)
    if (match := _V1_LINE.fullmatch(line)) is None:
        raise ValueError("the line is malformed")
    kind: type[IPv4Address | IPv6Address] = IPv4Address if match[1] == b"TCP4" else IPv6Address
    source, _ = (kind(match[group].decode()) for group in (2, 3))
    ports = int(match[4]), int(match[5])
    if max(ports) > 65535:
        raise ValueError("a port is too large")
    return ProxyHeader(size, (str(source), ports[0]))


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if len(data) < 16:
        return None
    command, family, length = struct.unpack_from("!BBH", data, 12)
    if command not in (_LOCAL, _PROXY):
        raise ValueError("the version or the command is unknown")
    if length > _MAX_V2:
        raise ValueError("the header is too large")
    size = 16 + length
    if command == _PROXY and family not in (_UNSPECIFIED, _TCP4, _TCP6, _UNIX):
        raise ValueError("it is not about a TCP connection")
    if len(data) < size:
        return None
    if command == _LOCAL or family in (_UNSPECIFIED, _UNIX):
        return ProxyHeader(size, None)
    layout = "!4s4sHH" if family == _TCP4 else "!16s16sHH"
    if length < struct.calcsize(layout):
        raise ValueError("the addresses are incomplete")
    source, _, port, _ = struct.unpack_from(layout, data, 16)
    return ProxyHeader(size, (str(ip_address(source)), port))
