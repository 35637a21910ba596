"""Settings that a running server takes: what changes, what goes on, and which streams must end."""

from __future__ import annotations

import json
import logging

import msgspec
import pytest
import trio
from harness import START, FaultyHarness, ServerHarness
from test_jwks import KeyServer
from tokens import SECRET, jwk, make_token, private_key, public_pem
from trio.testing import wait_all_tasks_blocked
from watch_clients import POLLS, TRANSPORTS, WatchClient, bearer

from sseserve.auth.jwks import MIN_INTERVAL
from sseserve.config import ROLES, Issuer, Role, Settings
from sseserve.errors import ConfigError
from sseserve.http.limits import BURST
from sseserve.http.open_streams import RETRY
from sseserve.server.reload import Reloader, plan

OTHER = "another-secret-of-at-least-thirty-two-bytes"


DAY = 86400


def token(key=SECRET, algorithm="HS256", headers=None, **claims):
    """Return a token that is valid for days, whatever the virtual clock does."""
    claims = {"role": "admin", "exp": int(START) + 20 * DAY, **claims}
    return make_token(key, algorithm, headers, now=int(START), **claims)


def change(harness, **fields):
    """Go on with other values of some settings."""
    harness.app.reload(msgspec.structs.replace(harness.app.settings, **fields))


async def watch(harness, transport="sse", text=None, session_id="s", **options):
    client = WatchClient(harness, transport, session_id, token=text or token(), **options)
    harness.app.nursery.start_soon(client.run)
    await wait_all_tasks_blocked()
    return client


async def status_of(harness, text, method="GET", path="/api/sessions"):
    return (await harness.request(method, path, headers=bearer(text))).status


@pytest.fixture
async def server(nursery, autojump_clock):
    server = ServerHarness(nursery, jwt_key=SECRET, limit_loopback=True)
    await server.tracker.create("s", owner="ann", viewers=["bob"])
    return server


# What is read


def test_what_a_running_server_takes():
    """The rest needs a restart, and keeps its value until then."""
    running = Settings(publish_rate=5.0, port=1, jwt_key=SECRET)
    planned = plan(running, Settings(publish_rate=6.0, port=2, workers=3, jwt_key=OTHER))
    assert planned.settings == Settings(publish_rate=6.0, port=1, jwt_key=OTHER)
    text = planned.describe(has_new_files=False)
    assert "publish_rate: 5.0 -> 6.0" in text
    assert "jwt_key: another value" in text
    assert "Needs a restart: port: 1 -> 2; workers: 1 -> 3" in text
    assert OTHER not in text
    nothing = plan(running, running)
    assert nothing.describe(has_new_files=False) == "reloaded the settings: nothing has changed"
    assert "files of keys" in nothing.describe(has_new_files=True)


@pytest.mark.parametrize("fields", [{"jwt_key": SECRET}, {"issuers": (Issuer(issuer="a", key=SECRET),)}])
def test_whether_tokens_are_needed_is_not_reloaded(fields):
    """The streams that are open would have no token; and a variable that is lost would let everybody in."""
    opened, keyed = Settings(ttl=1.0), Settings(ttl=1.0, publish_rate=6.0, **fields)
    for running, wanted in ((opened, keyed), (keyed, opened)):
        planned = plan(running, wanted)
        assert planned.settings == msgspec.structs.replace(running, publish_rate=wanted.publish_rate)
        assert [change.name for change in planned.left] == list(fields)


def test_what_cannot_be_used_changes_nothing(tmp_path, caplog):
    """A file that is wrong, a key that is too short, one that is gone: an error, and the server goes on."""
    caplog.set_level(logging.INFO)
    key = tmp_path / "key"
    key.write_text(SECRET)
    settings = Settings(jwt_key=f"file:{key}")
    wanted: list[Settings | ConfigError] = []

    def reread():
        if isinstance(wanted[0], ConfigError):
            raise wanted[0]
        return wanted[0]

    applied = []
    reloader = Reloader(settings, reread)
    reloader.check()
    for wrong in (
        ConfigError("unknown setting 'x'"),
        msgspec.structs.replace(settings, jwt_key="short"),
        msgspec.structs.replace(settings, jwt_key=f"file:{tmp_path / 'gone'}"),
        msgspec.structs.replace(settings, tls_cert="/gone", tls_key="/gone"),
    ):
        wanted[:] = [wrong]
        before = len(caplog.records)
        # Certificates need a restart; what they are is not read, so that is no error.
        is_valid = isinstance(wrong, Settings) and wrong.tls_cert is not None
        assert reloader.reload(applied.append) is is_valid
        assert [record.levelno for record in caplog.records[before:]] == [
            logging.INFO if is_valid else logging.ERROR
        ]
        assert reloader.settings == settings
    assert "cannot reload the settings, so nothing is changed: unknown setting 'x'" in caplog.text
    assert applied == [settings]
    wanted[:] = [settings]
    key.write_text(OTHER)
    assert reloader.reload(applied.append)
    assert "the files of keys or certificates have changed" in caplog.records[-1].getMessage()
    assert reloader.reload(applied.append)
    assert "nothing has changed" in caplog.records[-1].getMessage()


# Limits, hosts and origins


async def test_rates(autojump_clock, server):
    """A bucket is as full as it was: who has none left has none at the new rate either."""
    change(server, ticket_rate=1.0)
    body = {"sessions": ["s"]}

    async def publish(text):
        return (await server.post("/api/tickets", body, bearer(text))).status

    ann = token()
    assert [await publish(ann) for _ in range(int(BURST) + 1)] == [201] * int(BURST) + [429]
    change(server, ticket_rate=2.0)
    assert await publish(ann) == 429
    await trio.sleep(0.5)
    assert [await publish(ann) for _ in range(2)] == [201, 429]
    change(server, ticket_rate=None)
    assert [await publish(ann) for _ in range(50)] == [201] * 50
    change(server, ticket_rate=1.0)
    assert [await publish(ann) for _ in range(int(BURST) + 1)] == [201] * int(BURST) + [429]
    change(server, limit_loopback=False)
    assert await publish(ann) == 201


@pytest.mark.parametrize("name", ["max_streams_per_user", "max_streams_per_session", "max_streams"])
async def test_streams_that_are_open_go_on(autojump_clock, server, name):
    """With a lower limit no other is opened until there are fewer; with a higher one they are again."""
    clients = [await watch(server) for _ in range(3)]
    change(server, **{name: 2})
    assert (await watch(server)).status == 429
    assert not any(client.ended for client in clients)
    clients[0].leave()
    await wait_all_tasks_blocked()
    assert (await watch(server)).status == 429
    change(server, **{name: 3})
    assert (await watch(server)).status == 200
    assert (await watch(server)).status == 429


@pytest.mark.parametrize(
    "name", ["max_streams_per_user", "max_streams_per_session", "max_streams_per_address"]
)
async def test_limit_that_comes_and_goes(autojump_clock, server, name):
    """What a stream has taken it gives back, whatever the limits are when it ends."""
    streams = server.app.open_streams
    for before, after in ((10, None), (None, 10)):
        change(server, **{name: before})
        client = await watch(server, text=token())
        change(server, **{name: after})
        client.leave()
        await wait_all_tasks_blocked()
        assert (streams.total, streams._addresses, server.app.coordination.slots.taken) == (0, {}, {})


async def test_hosts_and_origins(autojump_clock, server):
    """New names and pages are allowed, and old ones are not any more."""

    async def ask(host, origin):
        headers = [("Host", host), ("Origin", origin), *bearer(token())]
        response = await server.get("/api/sessions", headers)
        return response.status, response.headers.get("access-control-allow-origin")

    assert await ask("a.example", "https://page.example") == (421, None)
    change(server, allowed_hosts=("a.example",), cors_origins=("https://page.example",))
    assert await ask("a.example", "https://page.example") == (200, "https://page.example")
    change(server, allowed_hosts=("b.example",), cors_origins=())
    assert await ask("a.example", "https://page.example") == (421, None)
    assert await ask("b.example", "https://page.example") == (200, None)


async def test_lifetime_of_tokens(autojump_clock, server):
    """A token that was accepted may not be any more."""
    text = token()
    assert await status_of(server, text) == 200
    change(server, max_token_lifetime=60.0)
    assert await status_of(server, text) == 401


# Keys


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_key_that_was_replaced(autojump_clock, server, transport):
    """Its tokens open nothing any more, and what they have opened ends at once, on every transport."""
    old, new = token(), token(OTHER)
    client = await watch(server, transport, old)
    assert not client.ended
    change(server, jwt_key=OTHER)
    await wait_all_tasks_blocked()
    assert client.ended
    if transport in POLLS:
        assert client.status == 401
    assert (await status_of(server, old), await status_of(server, new)) == (401, 200)
    assert not (await watch(server, transport, new)).ended


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_key_that_stays(autojump_clock, server, transport):
    """A reload of anything else ends no stream, and no request that waits."""
    client = await watch(server, transport)
    change(server, publish_rate=1.0, roles={**ROLES, "other": Role()}, max_streams_per_user=5)
    await wait_all_tasks_blocked()
    assert not client.ended
    if transport in ("sse", "websocket", "bundle"):
        await server.tracker.update("s", progress=5)
        await wait_all_tasks_blocked()
        assert client.names[-1] == "progress"


async def test_ticket_of_a_key_that_was_replaced(autojump_clock, server):
    """It opens nothing: who has stolen the key could otherwise stay."""
    response = await server.post("/api/tickets", {"sessions": ["s"]}, bearer(token()))
    change(server, jwt_key=OTHER)
    client = WatchClient(server, "sse", ticket=response.json["ticket"])
    await client.run()
    assert client.status == 401


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"jwt_key": OTHER}, 401),
        ({"roles": {**ROLES, "admin": Role(every=frozenset({"watch"}))}}, 403),
        ({"roles": {**ROLES, "admin": Role(own=frozenset({"publish"}))}}, 403),
    ],
)
async def test_batch_that_is_not_allowed_any_more(autojump_clock, server, fields, status):
    """A request that takes long ends at its next line, without its key or its right to publish."""
    connection = server.connect()
    head = (
        "POST /api/sessions/s/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
        f"Authorization: Bearer {token(sub='eve')}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    line = b'{"progress": 1}\n'
    chunk = b"%x\r\n%s\r\n" % (len(line), line)
    await connection.send(head.encode() + chunk)
    await wait_all_tasks_blocked()
    assert (await server.tracker.get("s")).progress.percent == 1
    change(server, **fields)
    await connection.send(chunk.replace(b"1}", b"2}"))
    with trio.fail_after(60):
        assert (await connection.read_response()).status == status
    assert (await server.tracker.get("s")).progress.percent == 1
    await connection.stream.aclose()


async def test_stream_that_was_extended(autojump_clock, server):
    """Every token counts: the one that opened it, too."""
    change(server, jwt_key=None, issuers=(A,))
    first = token(iss="a", role="admin", exp=int(START) + 15 * DAY)
    client = await watch(server, text=first)
    last = token(iss="a", role="patient")
    assert (await server.post("/api/tokens/refresh", headers=bearer(last))).status == 200
    other = await watch(server, text=last)
    change(server, issuers=(msgspec.structs.replace(A, roles=("patient",)),))
    await wait_all_tasks_blocked()
    assert (client.ended, other.ended) == (True, False)


A, B = Issuer(issuer="a", key=SECRET), Issuer(issuer="b", key=OTHER)


@pytest.mark.parametrize(
    ("issuers", "ended"),
    [
        ((A, B), []),
        ((B,), ["admin", "patient", "watch"]),
        ((msgspec.structs.replace(A, key=OTHER), B), ["admin", "patient", "watch"]),
        ((msgspec.structs.replace(A, audience="x"), B), ["admin", "patient", "watch"]),
        ((msgspec.structs.replace(A, subject_prefix="x:"), B), ["admin", "patient", "watch"]),
        ((msgspec.structs.replace(A, roles=("patient",)), B), ["admin", "watch"]),
        ((msgspec.structs.replace(A, roles=("patient", "admin"), capabilities=True), B), []),
    ],
)
async def test_issuers(autojump_clock, server, issuers, ended):
    """Only the streams end whose tokens would be refused now; those of another issuer go on."""
    change(server, jwt_key=None, issuers=(A, B))
    clients = {
        "admin": await watch(server, text=token(iss="a")),
        "patient": await watch(server, text=token(iss="a", role="patient")),
        "watch": await watch(server, text=token(iss="a", role=None, sseserve={"watch": ["*"]})),
        "other": await watch(server, text=token(OTHER, iss="b")),
    }
    assert not [name for name, client in clients.items() if client.ended]
    change(server, issuers=issuers)
    await wait_all_tasks_blocked()
    assert sorted(name for name, client in clients.items() if client.ended) == ended


async def test_keys_of_a_url(nursery, autojump_clock):
    """What was fetched stays; a new URL is fetched, one that is gone is not any more."""
    autojump_clock.autojump_threshold = 0.02  # real sockets
    key = private_key("EdDSA")
    first, second = [await KeyServer(jwk(key, "a")).start(nursery) for _ in range(2)]
    server = ServerHarness(nursery, jwks_url=f"{first.url}/jwks")
    await server.tracker.create("s")
    text = token(key, "EdDSA", {"kid": "a"})
    client = await watch(server, text=text)
    with trio.fail_after(20):
        while client.status is None:
            await trio.sleep(0.01)
    change(server, publish_rate=1.0)
    await wait_all_tasks_blocked()
    assert (client.ended, len(first.requests)) == (False, 1)
    assert await status_of(server, text) == 200
    (scope,) = server.app._token_keys._fetches.values()
    change(server, jwks_url=f"{second.url}/jwks")
    assert await status_of(server, text) == 200
    assert (client.ended, len(first.requests), len(second.requests)) == (True, 1, 1)
    assert scope.cancelled_caught
    assert [keys.url for keys in server.app._token_keys._fetches] == [f"{second.url}/jwks"]
    # The keys of a URL may change: then no token is remembered that they do not verify.
    second.keys = []
    change(server, publish_rate=2.0)
    await trio.sleep(MIN_INTERVAL)
    assert await status_of(server, token(key, "EdDSA", {"kid": "b"})) == 401
    assert await status_of(server, text) == 401


async def test_public_key_is_another_one(autojump_clock, server):
    """A key in PEM that replaces another one, with the same algorithm."""
    change(server, jwt_key=public_pem(private_key("ES256")))
    client = await watch(server, text=token(private_key("ES256"), algorithm="ES256"))
    assert client.status == 200
    change(server, jwt_key=public_pem(private_key("ES256", 1)))
    await wait_all_tasks_blocked()
    assert client.ended


async def test_wrong_key_changes_nothing(autojump_clock, server):
    """Neither of the keys nor of the limits."""
    client = await watch(server)
    with pytest.raises(ConfigError, match="secret of 5 bytes"):
        change(server, jwt_key="short", max_streams_per_user=1)
    await wait_all_tasks_blocked()
    assert not client.ended
    assert (await watch(server)).status == 200
    assert server.app.settings.jwt_key == SECRET


async def test_program_that_decides_itself(nursery, autojump_clock):
    """Its grants are of no key; limits and origins are reloaded."""

    async def authenticate(_request):
        from sseserve import Grant

        return Grant("ann", "admin")

    server = ServerHarness(nursery, authenticate=authenticate)
    await server.tracker.create("s")
    client = await watch(server)
    change(server, allowed_hosts=("a.example",))
    await wait_all_tasks_blocked()
    assert not client.ended
    assert (await server.get("/api/sessions", [("Host", "a.example")])).status == 200


# Roles

NO_WATCH = Role(own=frozenset({"control"}))


@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name not in ("list", "claim")])
async def test_role_that_lost_its_right(autojump_clock, server, transport):
    """What it has opened ends, and it opens nothing any more; that of another role goes on."""
    client = await watch(server, transport, token(role="patient"))
    other = await watch(server, transport, token(role="admin"))
    assert not client.ended
    change(server, roles={**ROLES, "patient": NO_WATCH})
    await wait_all_tasks_blocked()
    assert (client.ended, other.ended) == (True, False)
    if transport == "sse":
        assert client.names == ["progress"]
    assert (await watch(server, transport, token(role="patient"))).status in (401, 403)


async def test_claim_of_a_role_that_lost_its_right(autojump_clock, nursery):
    """It waits on, and gets no job; one of another role gets it."""
    server = ServerHarness(nursery, jwt_key=SECRET, limit_loopback=True, job_workers="remote")
    client = await watch(server, "claim", token(role="service"))
    change(server, roles={**ROLES, "service": Role(every=frozenset({"watch"}))})
    other = await watch(server, "claim", token(role="admin"))
    assert (client.ended, other.ended) == (False, False)
    response = await server.post("/api/jobs", {}, bearer(token(role="admin")))
    assert response.status == 202
    await wait_all_tasks_blocked()
    assert (client.status, other.status) == (403, 200)
    assert response.json["jobId"].encode() in other.raw


async def test_role_that_keeps_a_part_of_its_rights(autojump_clock, server):
    """Each stream is judged by the session that it is of."""
    await server.tracker.create("t", owner="bob")
    text = token(role="patient", sub="bob")
    viewed, owned = await watch(server, text=text), await watch(server, text=text, session_id="t")
    change(server, roles={**ROLES, "patient": Role(own=frozenset({"watch"}))})
    await wait_all_tasks_blocked()
    assert (viewed.ended, owned.ended) == (True, False)


async def test_list_shows_what_the_role_may_watch_now(autojump_clock, server):
    """It goes on; a session that is changed later is in it only if the role may watch it."""
    client = await watch(server, "list", token(role="patient"))
    change(server, roles={**ROLES, "patient": NO_WATCH})
    await wait_all_tasks_blocked()
    before = len(client.received)
    await server.tracker.update("s", progress=50)
    await trio.sleep(10)
    assert not client.ended
    assert not any("50" in json.dumps(message.data) for message in client.received[before:])


async def test_roles_are_judged_when_the_engine_is_back(nursery, autojump_clock):
    """Until then nothing is delivered; the stream of who may watch goes on."""
    server = FaultyHarness(nursery, jwt_key=SECRET)
    await server.tracker.create("s", owner="ann", viewers=["bob"])
    ann, bob = [await watch(server, text=token(role="patient", sub=name)) for name in ("ann", "bob")]
    server.engine.fail()
    change(server, roles={**ROLES, "patient": Role(own=frozenset({"watch"}))})
    await trio.sleep(3 * RETRY)
    assert (ann.ended, bob.ended) == (False, False)
    server.engine.recover()
    await trio.sleep(2 * RETRY)
    assert (ann.ended, bob.ended) == (False, True)
