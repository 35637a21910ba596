"""Tokens of the Python client: which requests get one, a fresh one for each, and what happens at its end."""

from __future__ import annotations

import time
from functools import partial

import httpx
import pytest
import trio
from click.testing import CliRunner
from fakes import FakeServer, read_body, respond, respond_error, send_messages
from tokens import SECRET, make_token

import sseserve
from sseserve.cli import main
from sseserve.client import (
    TRANSPORTS,
    Backoff,
    CannotConnect,
    ClientError,
    Publisher,
    RequestRejected,
    StatusPublisher,
    watch,
)
from sseserve.client.token import AsyncBearer, Bearer
from sseserve.config import Settings, load

PROGRESS = ("e-1", "progress", {"progress": 40, "state": "running", "status": "running"})
DONE = ("e-2", "complete", {"progress": 100, "state": "succeeded", "status": "done"})
EXPIRING = (None, "expiring", {"expires_in": 30})
RESULT = respond(202, {"id": "e-1", "control": "continue"})
FAST = Backoff(initial=0.001, maximum=0.001)


class Tokens:
    """A function that returns another token each time."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return f"token-{self.count}"

    async def later(self):
        await trio.lowlevel.checkpoint()
        return self()


def sent(server):
    """Return what the requests to a server had in ``Authorization``."""
    return [request.headers.get("authorization") for request in server.requests]


async def receive(url, **options):
    """Watch a session to its end; returns the names of the events."""
    async with watch(url, "s", **{"retry_timeout": 0, "backoff": FAST, **options}) as messages:
        return [message.event async for message in messages]


# watch


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_watch_sends_the_token(transport, nursery):
    """With the connection, over each transport."""
    server = await FakeServer(send_messages(transport, DONE, then="end")).start(nursery)
    assert await receive(server.url, transport=transport, token=" a.b-c_d~e+f/g= \n") == ["complete"]
    assert sent(server) == ["Bearer a.b-c_d~e+f/g="]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_token_replaces_the_header(transport):
    """A server refuses two, however the caller has written the name of the other."""
    async with sseserve.serve(port=0, jwt_key=SECRET) as server:
        await server.tracker.update("s", status="completed")
        events = await receive(
            server.url,
            transport=transport,
            token=make_token(role="admin"),
            headers={"authorization": "Bearer other"},
        )
    assert events[-1] == "complete"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", ["function", "coroutine function"])
async def test_watch_asks_for_a_token_for_each_connection(transport, kind, nursery):
    """It may be another one then."""
    server = await FakeServer(
        send_messages(transport, PROGRESS), send_messages(transport, DONE, then="end")
    ).start(nursery)
    tokens = Tokens()
    events = await receive(
        server.url, transport=transport, token=tokens if kind == "function" else tokens.later
    )
    assert events[-1] == "complete"
    assert sent(server) == ["Bearer token-1", "Bearer token-2"]


@pytest.mark.parametrize("transport", ["sse", "poll"])
async def test_another_origin_gets_no_token(transport, nursery):
    """A redirect there loses the token, and the header of the caller; one to another path does not."""
    other = await FakeServer(send_messages(transport, DONE, then="end")).start(nursery)
    location = f"Location: {other.url}/elsewhere"
    server = await FakeServer(respond(307, b"", "Location: /moved"), respond(302, b"", location)).start(
        nursery
    )
    await receive(
        server.url, transport=transport, token="secret-1", headers={"Authorization": "Bearer secret-2"}
    )
    assert sent(server) == ["Bearer secret-1"] * 2
    assert sent(other) == [None]


@pytest.mark.parametrize(
    ("url", "has_token"),
    [
        ("http://a.example/x", True),
        ("http://A.example:80/x", True),
        ("https://a.example/x", False),
        ("http://a.example:8080/x", False),
        ("http://b.a.example/x", False),
        ("http://a.example@evil.example/x", False),
        ("http://evil.example/a.example", False),
    ],
)
async def test_origins(url, has_token):
    """Scheme, host and port; elsewhere a request loses what it has."""
    for bearer in (Bearer("secret", "http://a.example/base"), AsyncBearer("secret", "http://a.example/base")):
        request = httpx.Request("GET", url, headers={"Authorization": "Bearer other"})
        if isinstance(bearer, Bearer):
            bearer.add_to(request)
        else:
            await bearer.add_to(request)
        assert request.headers.get("authorization") == ("Bearer secret" if has_token else None)


async def test_way_back_to_the_origin(nursery):
    """The token is for the server, and it is not what a redirect of another one may ask for twice."""
    server = await FakeServer().start(nursery)
    other = await FakeServer(respond(302, b"", f"Location: {server.url}/back")).start(nursery)
    server._handlers += [
        respond(302, b"", f"Location: {other.url}/"),
        send_messages("sse", DONE, then="end"),
    ]
    await receive(server.url, token="secret")
    assert (sent(server), sent(other)) == (["Bearer secret"] * 2, [None])


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_rejected_token(transport, nursery):
    """An error with the server's sentence; nothing is tried again."""
    server = await FakeServer(respond_error(401, "invalid_token", "the token has expired")).start(nursery)
    with pytest.raises(RequestRejected, match="the token has expired") as caught:
        await receive(server.url, transport=transport, token="secret", retry_timeout=5)
    assert (caught.value.status, caught.value.code) == (401, "invalid_token")
    assert len(server.requests) == 1


@pytest.mark.parametrize("token", ["", "a b", "Bearer abc", "a\r\nb", "a\x00", "é", 17, b"abc"])
@pytest.mark.parametrize("make", [partial(watch, session_id="s"), Publisher, StatusPublisher])
def test_what_cannot_be_a_token(make, token):
    """It is refused before anything is sent, and not repeated."""
    with pytest.raises(ValueError, match="the token must be one word") as caught:
        make("http://127.0.0.1:1", token=token)
    assert str(token) not in str(caught.value) or not token


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_function_that_returns_no_token(transport, nursery):
    """The error says so, and does not repeat what it has returned."""
    server = await FakeServer().start(nursery)
    with pytest.raises(ClientError, match="the token must be one word") as caught:
        await receive(server.url, transport=transport, token=lambda: "hunter2\n\nx")
    assert "hunter2" not in str(caught.value)
    assert not server.requests


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_function_that_fails(transport, nursery):
    """An error of the network may pass, so the attempt is repeated; others are raised at once."""
    server = await FakeServer(send_messages(transport, DONE, then="end")).start(nursery)
    errors = [OSError("no network"), httpx.ConnectError("no network"), None]

    def token():
        if error := errors.pop(0):
            raise error
        return "secret"

    assert (await receive(server.url, transport=transport, token=token, retry_timeout=5))[-1] == "complete"
    errors[:] = [OSError("no network")]
    with pytest.raises(CannotConnect, match="cannot get a token: no network"):
        await receive(server.url, transport=transport, token=token)
    errors[:] = [KeyError("x")]
    with pytest.raises(ClientError, match="cannot get a token: 'x'"):
        await receive(server.url, transport=transport, token=token)
    assert sent(server) == ["Bearer secret"]


# The end of a token


@pytest.mark.parametrize("transport", ["sse", "ws"])
@pytest.mark.parametrize("status", [200, 404, None], ids=["extended", "refused", "no response"])
async def test_stream_is_extended_by_a_fresh_token(transport, status, nursery):
    """Before the message is given to the caller; if it fails the stream ends, and another one is opened."""

    async def close(stream, request):
        pass

    server = await FakeServer(
        send_messages(transport, PROGRESS, EXPIRING),
        close if status is None else respond(status, {}),
        send_messages(transport, DONE, then="end"),
    ).start(nursery)
    events = await receive(server.url, transport=transport, token=Tokens())
    assert events[-3:] == ["progress", "expiring", "complete"]
    assert [(request.method, request.path) for request in server.requests][1] == (
        "POST",
        "/api/tokens/refresh",
    )
    assert sent(server) == ["Bearer token-1", "Bearer token-2", "Bearer token-3"]


async def test_fixed_token_extends_nothing(nursery):
    """There is no other one; nor without a token."""
    for token in ("secret", None):
        server = await FakeServer(
            send_messages("sse", EXPIRING), send_messages("sse", DONE, then="end")
        ).start(nursery)
        await receive(server.url, token=token)
        assert [request.method for request in server.requests] == ["GET", "GET"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_watch_goes_on_beyond_its_tokens(transport, nursery):
    """On a server: the stream is extended before its token expires, so it is not opened again."""
    lifetimes = iter([5])

    def token():
        return make_token(role="patient", exp=int(time.time()) + next(lifetimes, 3600))

    async def publish(server):
        streams = server.app.open_streams
        while not any(c.ends_at > time.time() + 60 for known in streams._credentials.values() for c in known):
            await trio.sleep(0.01)
        await server.tracker.update("s", status="completed")

    async with sseserve.serve(port=0, jwt_key=SECRET) as server:
        await server.tracker.create("s", owner="ann")
        async with watch(server.url, "s", transport=transport, token=token, backoff=FAST) as messages:
            nursery.start_soon(publish, server)
            received = [message.event async for message in messages]
        assert next(lifetimes, None) is None
        assert received[-1] == "complete"
        assert "resume" not in received
        assert ("expiring" in received) is (transport != "poll")  # a poll has a token of its own


# Publisher, StatusPublisher


async def test_publisher_asks_for_a_token_for_each_attempt(nursery):
    """The token may have expired meanwhile."""

    async def lose(stream, request):
        await read_body(stream, request)

    for call in (
        lambda publisher: publisher.progress("s", progress=1),
        lambda publisher: publisher.event("s", "note"),
        lambda publisher: publisher.ndjson("s", [{"progress": 1}]),
    ):
        server = await FakeServer(lose, RESULT).start(nursery)
        async with Publisher(server.url, token=Tokens().later, backoff=FAST) as publisher:
            await call(publisher)
        assert sent(server) == ["Bearer token-1", "Bearer token-2"]


async def test_publisher_with_a_rejected_token(nursery):
    """The server's sentence, at once."""
    server = await FakeServer(respond_error(401, "unauthorized", "a token is required")).start(nursery)
    async with Publisher(server.url, backoff=FAST) as publisher:
        with pytest.raises(RequestRejected, match="a token is required"):
            await publisher.progress("s", progress=1)


async def test_status_publisher_asks_for_a_token_for_each_attempt(nursery):
    """Its function is not asynchronous."""

    async def lose(stream, request):
        await read_body(stream, request)

    server = await FakeServer(lose, RESULT).start(nursery)
    with StatusPublisher(server.url, token=Tokens(), backoff=FAST, raise_errors=True) as publisher:
        await trio.to_thread.run_sync(publisher.publish_status_update, "s", {"progress": 1})
    assert sent(server) == ["Bearer token-1", "Bearer token-2"]


def test_status_publisher_needs_no_token_for_redis():
    """There it would not be checked."""
    with pytest.raises(ValueError, match="a token is for a server"):
        StatusPublisher("redis://127.0.0.1:1/0", token="secret")


# The commands


async def invoke(*args, **environ):
    """Run a command in a thread."""
    environ = {"SSESERVE_TOKEN": None, **environ}
    return await trio.to_thread.run_sync(partial(CliRunner().invoke, main, args, env=environ))


@pytest.mark.parametrize("how", ["option", "variable", "both"])
async def test_commands_send_the_token(how, nursery):
    """From the option or the variable; the option has precedence."""
    options = [] if how == "variable" else ["--token", "one"]
    environ = {} if how == "option" else {"SSESERVE_TOKEN": "two\n"}
    server = await FakeServer(send_messages("sse", DONE, then="end"), RESULT).start(nursery)
    assert (await invoke("watch", "s", "--server", server.url, *options, **environ)).exit_code == 0
    result = await invoke("publish", "s", "--server", server.url, "--progress", "1", *options, **environ)
    assert result.exit_code == 0
    assert sent(server) == ["Bearer two" if how == "variable" else "Bearer one"] * 2


async def test_watch_of_what_has_ended_sends_the_token_each_time(nursery):
    """It asks again for how the session has ended."""
    server = await FakeServer(respond(204), send_messages("poll", DONE, then="end")).start(nursery)
    result = await invoke("watch", "s", "--server", server.url, "--cursor", "e-2", "--token", "one")
    assert result.exit_code == 0
    assert sent(server) == ["Bearer one"] * 2


@pytest.mark.parametrize(("command", "args"), [("watch", []), ("publish", ["--progress", "1"])])
async def test_commands_with_a_rejected_token(command, args, nursery):
    """Exit status 3, and one line that says what to do."""
    rejected = respond_error(401, "unauthorized", "a token is required")
    server = await FakeServer(rejected, rejected).start(nursery)
    result = await invoke(command, "s", "--server", server.url, *args)
    assert (result.exit_code, result.stderr) == (
        3,
        "sseserve: the server requires a token: give one with --token or SSESERVE_TOKEN\n",
    )
    result = await invoke(command, "s", "--server", server.url, *args, "--token", "hunter2")
    assert (result.exit_code, result.stderr) == (3, "sseserve: a token is required\n")


@pytest.mark.parametrize(("command", "args"), [("watch", []), ("publish", ["--progress", "1"])])
@pytest.mark.parametrize("how", ["option", "variable"])
async def test_commands_do_not_repeat_a_token(command, args, how):
    """One that is none is a usage error, and it may be one with a mistake."""
    token = "Bearer hunter2"
    options = ["--token", token] if how == "option" else []
    result = await invoke(command, "s", *args, *options, **({} if options else {"SSESERVE_TOKEN": token}))
    assert result.exit_code == 2
    assert "the token must be one word" in result.stderr
    assert "hunter2" not in result.output


def test_token_is_no_setting():
    """The server may have the variable, too."""
    assert load(None, {"SSESERVE_TOKEN": "x"}) == Settings()
