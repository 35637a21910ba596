"""The network of ``python -m benchmarks transports``: what its link does to packets, and what remains."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest

from benchmarks.transports import network
from benchmarks.transports.network import CLEAN, SERVER, Conditions, Network, client_address

HEADERS = 28  # of a datagram: IP and UDP


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    if why := network.missing():
        pytest.skip(why)
    with Network(netem=False) as opened:
        yield opened


Link = tuple[Network, socket.socket, socket.socket]


@pytest.fixture
def link(net: Network) -> Iterator[Link]:
    with make_link(net) as link:
        yield link


@contextmanager
def make_link(net: Network) -> Iterator[Link]:
    """The network, and a socket for datagrams at each end: of the first client, and of the server."""
    with ExitStack() as stack:
        with net.inside("server"):
            server = stack.enter_context(closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        with net.inside("client"):
            client = stack.enter_context(closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        server.bind((SERVER, 5000))
        client.bind((client_address(0), 5000))
        server.settimeout(10)
        net.change(CLEAN)
        net.take_traffic()
        yield net, client, server
        net.change(CLEAN)


def wait_for_packets(net: Network, number: int) -> None:
    """Wait until the link has read so many, each under the conditions of that time."""
    while number > 0:
        number -= sum(traffic["packets"] for traffic in net.take_traffic().values())


def test_packets_are_counted_with_their_headers(link):
    """Both directions together, by the address of the client."""
    net, client, server = link
    client.sendto(b"x" * 100, (SERVER, 5000))
    assert server.recv(1000) == b"x" * 100
    server.sendto(b"y" * 50, (client_address(0), 5000))
    assert client.recv(1000) == b"y" * 50
    assert net.take_traffic() == {client_address(0): {"packets": 2, "bytes": 150 + 2 * HEADERS}}
    assert net.take_traffic() == {}


def test_packets_are_lost_while_the_link_is_down(link):
    """Those that are sent then never arrive, and the next ones do."""
    net, client, server = link
    net.change(Conditions(is_down=True))
    client.sendto(b"lost", (SERVER, 5000))
    wait_for_packets(net, 1)
    net.change(CLEAN)
    client.sendto(b"there", (SERVER, 5000))
    assert server.recv(1000) == b"there"


def test_a_part_of_the_packets_is_lost(link):
    net, client, server = link
    net.change(Conditions(loss=0.5))
    for number in range(200):
        client.sendto(bytes([number]), (SERVER, 5000))
    wait_for_packets(net, 200)
    net.change(CLEAN)
    client.sendto(b"end", (SERVER, 5000))
    received = list(iter(lambda: server.recv(1000), b"end"))
    assert 50 < len(received) < 150
    assert received == sorted(received)


def test_packets_stay_in_order_when_they_are_delayed(link):
    """A rate that lets each take a while, and a delay: they wait, and none overtakes another."""
    net, client, server = link
    net.change(Conditions(delay=0.01, rate=1e6))
    for number in range(100):
        client.sendto(bytes([number]), (SERVER, 5000))
    assert [server.recv(1000) for _ in range(100)] == [bytes([number]) for number in range(100)]


def fail_inside(net, outside):
    with net.inside("server"):
        assert os.readlink(network.NAMESPACE) != outside
        raise KeyError


def test_netem_delays_and_loses_packets():
    """Where the kernel has it."""
    if why := network.missing():
        pytest.skip(why)
    with Network() as net, make_link(net) as (_, client, server):
        if not net.has_netem:
            pytest.skip("this kernel has no netem")
        net.change(Conditions(is_down=True))
        client.sendto(b"lost", (SERVER, 5000))
        net.change(Conditions(delay=0.01, rate=1e6))
        for number in range(100):
            client.sendto(bytes([number]), (SERVER, 5000))
        assert [server.recv(1000) for _ in range(100)] == [bytes([number]) for number in range(100)]


def test_a_thread_is_where_it_was_after_a_block(net):
    """Also after an error."""
    before = os.readlink(network.NAMESPACE)
    with pytest.raises(KeyError):
        fail_inside(net, before)
    assert os.readlink(network.NAMESPACE) == before


def test_nothing_remains(net):
    """Neither a device in the namespace of the host, nor the namespaces, after a process that was killed."""
    assert network.DEVICE not in [name for _, name in socket.if_nameindex()]
    with Network() as other:
        path = other._paths["server"]
        assert os.path.exists(path)
        other._relay._process.kill()
        other._relay._process.join(10)
    assert not os.path.exists(path)


def test_without_privileges_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(network, "CAP_NET_ADMIN", 63)  # which nobody has
    assert network.missing() == "needs root, for network namespaces"


def test_arguments_of_netem():
    """As tc-netem(8) has them."""
    conditions = Conditions(delay=0.05, loss=0.02, rate=512_000)
    assert conditions.netem() == [
        *("netem", "limit", "1000"),
        *("delay", "50ms", "loss", "2%", "rate", "512000bit"),
    ]
    assert Conditions(is_down=True).netem() == ["netem", "limit", "1000", "loss", "100%"]
    assert CLEAN.netem() == ["netem", "limit", "1000"]
