"""How many large responses wait for a client that does not read."""

from __future__ import annotations

import gc
import json

import pytest
import trio
from h2.settings import SettingCodes
from raw_client import RawConnection, RawResponse, request_bytes
from test_http2 import Client, Server
from trio.testing import lockstep_stream_pair, wait_all_tasks_blocked

from sseserve.http.messages import Request, Response
from sseserve.web import turns
from sseserve.web.turns import Turns

SIZE = 200_000


@pytest.fixture(autouse=True)
def four_at_once(monkeypatch):
    monkeypatch.setattr(turns, "AT_ONCE", 4)


def test_addresses_have_turns_of_their_own():
    """Large responses to GET only; what is not limited has none, and what nobody uses is not kept."""
    all_turns = Turns(lambda address: address or None)
    large = Response(200, b"x" * (turns.LARGE + 1))

    def slots(peer: str, response: Response = large, method: str = "GET") -> trio.Semaphore | None:
        return all_turns.slots(Request.create(method, "/", peer=peer), response)

    ann, bob = slots("ann"), slots("bob")
    assert ann is not None
    assert ann is slots("ann")
    assert bob is not ann
    assert slots("") is slots("ann", Response(200, b"x")) is slots("ann", Response(204, None)) is None
    assert slots("ann", method="POST") is None
    assert len(all_turns._slots) == 2
    del ann, bob
    gc.collect()
    assert len(all_turns._slots) == 0


async def connect(nursery, **settings) -> tuple[Server, Client]:
    """Connect a client that gives no window; its address is limited unless a setting says otherwise."""
    server = Server(nursery, **{"limit_loopback": True, **settings})
    await server.tracker.update("a", progress=1, data="x" * SIZE)
    client = await server.connect()
    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    return server, client


async def heads(client: Client, numbers: list[int]) -> list[int]:
    """Read all there is to read; return which requests have the head of their response."""
    with trio.move_on_after(1):
        while await client.read():
            pass
    return [number for number in numbers if number in client.status]


async def read_body(client: Client, number: int) -> None:
    while number not in client.ended:
        client.h2.increment_flow_control_window(10_000, number)
        await client.flush()
        size = len(client.body[number])
        await client.until(lambda size=size: len(client.body[number]) > size or number in client.ended)


@pytest.mark.parametrize(
    "path", ["/api/sessions/a/status", "/api/sessions/a/events", "/api/sessions/a/events?wait=1"]
)
async def test_large_responses_wait_for_each_other(autojump_clock, nursery, path):
    """Four at a time are sent; small ones that were asked for later are served."""
    _, client = await connect(nursery)
    numbers = [await client.request("GET", path) for _ in range(10)]
    assert len(await heads(client, numbers)) == 4
    health = await client.request("GET", "/health")
    assert await heads(client, [health])
    assert len(await heads(client, numbers)) == 4
    while set(numbers) - client.ended:
        number = next(number for number in numbers if number in client.status and number not in client.ended)
        await read_body(client, number)
        assert len(await heads(client, numbers)) - len(client.ended & set(numbers)) <= 4
    assert not client.reset_with
    for number in numbers:
        assert client.status[number] == "200"
        assert "x" * SIZE in client.body[number].decode()


async def test_responses_that_wait_take_no_memory(autojump_clock, nursery):
    """None of them holds its body, or part of it."""
    _, client = await connect(nursery)
    for _ in range(50):
        await client.request("GET", "/api/sessions/a/status")
    await wait_all_tasks_blocked()
    held = [value for value in gc.get_objects() if isinstance(value, bytearray) and len(value) > SIZE // 2]
    large = [frame for task in _tasks() for frame in task if frame > SIZE // 2]
    assert len(held) + len(large) <= 3 * 4


@pytest.mark.parametrize("path", ["/api/sessions/a/status", "/api/sessions/a/events?wait=1"])
async def test_large_responses_over_http1(autojump_clock, nursery, path):
    """The connections of an address have turns together, with those over HTTP/2."""
    server, client = await connect(nursery)
    await client.request("GET", path)
    assert len(await heads(client, [1])) == 1
    connections = []
    for _ in range(8):
        ours, theirs = lockstep_stream_pair()
        nursery.start_soon(server.app.connections.serve, theirs)
        connections.append(RawConnection(ours))
        await connections[-1].send(request_bytes("GET", path))
    await wait_all_tasks_blocked()
    assert _large(_tasks()) == 1 + 3
    responses: list[RawResponse] = []

    async def read(connection: RawConnection) -> None:
        responses.append(await connection.read_response())

    # One leaves in its turn, one before.
    for connection in (connections[0], connections[-1]):
        await connection.stream.aclose()
    async with trio.open_nursery() as reading:
        for connection in connections[1:-1]:
            reading.start_soon(read, connection)
    assert [response.status for response in responses] == [200] * 6
    assert all(b"x" * SIZE in response.body for response in responses)
    for connection in connections[1:-1]:
        assert (await connection.request("GET", path)).status == 200


def _large(tasks: list[list[int]]) -> int:
    """Return how many tasks have a large response."""
    return sum(any(size > SIZE // 2 for size in sizes) for sizes in tasks)


def _tasks() -> list[list[int]]:
    """The sizes of all bytes that the tasks' frames refer to."""
    sizes = []
    waiting = [trio.lowlevel.current_root_task()]
    while waiting:
        task = waiting.pop()
        assert task is not None
        waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        frame_sizes, awaited = [], task.coro
        while awaited is not None:
            frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
            if frame is not None:
                values = [getattr(value, "body", value) for value in frame.f_locals.values()]
                frame_sizes += [len(value) for value in values if isinstance(value, bytes)]
            awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
        sizes.append(frame_sizes)
    return sizes


async def test_a_client_that_reads_none_of_them(autojump_clock, nursery):
    """Each is given up after its send timeout, and the next ones are sent; at the end nothing is left."""
    server, client = await connect(nursery)
    numbers = [await client.request("GET", "/api/sessions/a/status") for _ in range(10)]
    with trio.move_on_after(70):
        while await client.read():
            pass
    assert set(client.reset_with) == set(numbers)
    (number,) = [await client.request("GET", "/api/sessions/a/status")]
    await read_body(client, number)
    assert json.loads(client.body[number])["data"] == "x" * SIZE
    await client.stream.aclose()
    await wait_all_tasks_blocked()
    assert server.open == 0


async def test_a_client_that_leaves_gives_its_turn_to_the_next(autojump_clock, nursery):
    """Those that were sent, and those that wait."""
    _, client = await connect(nursery)
    numbers = [await client.request("GET", "/api/sessions/a/status") for _ in range(8)]
    sent = await heads(client, numbers)
    waiting = [number for number in numbers if number not in sent]
    for number in (*sent, *waiting[:2]):
        await client.reset(number)
    assert set(await heads(client, numbers)) == {*sent, *waiting[2:]}
    for number in waiting[2:]:
        await read_body(client, number)
        assert client.status[number] == "200"


async def test_the_clients_of_a_proxy_do_not_wait_for_each_other(autojump_clock, nursery):
    """What an address is that is not limited may be many clients."""
    _, client = await connect(nursery, limit_loopback=False)
    numbers = [await client.request("GET", "/api/sessions/a/status") for _ in range(10)]
    assert len(await heads(client, numbers)) == 10
