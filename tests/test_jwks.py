"""Keys that are fetched from a URL: when, how often, and what happens when that fails."""

from __future__ import annotations

import gzip
import json
import logging
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import trio
from fakes import FakeServer, respond
from jwt.algorithms import ECAlgorithm
from processes import Program
from tokens import SECRET, bearer, encode, jwk, make_token, private_key, sign_raw

import sseserve
from sseserve.auth import jwks, open_authenticator
from sseserve.auth.jwks import RemoteKeys
from sseserve.auth.keys import read_jwks
from sseserve.config import Issuer, Settings
from sseserve.errors import Unavailable
from sseserve.http.messages import Request

RSA, EC, ED = (private_key(algorithm) for algorithm in ("RS256", "ES256", "EdDSA"))


@pytest.fixture
def virtual_clock(autojump_clock):
    """A clock that jumps only when the sockets have been silent for a while, in real time."""
    autojump_clock.autojump_threshold = 0.02
    return autojump_clock


class KeyServer(FakeServer):
    """Responds to each request with the JWK Set ``keys``, or with ``handler`` if there is one."""

    def __init__(self, *keys):
        super().__init__()
        self.keys = list(keys)
        self.handler = None

    async def _serve(self, stream):
        self._handlers = [self.handler or respond(200, {"keys": self.keys})]
        await super()._serve(stream)


def token(key, key_id=None, **claims):
    algorithm = {"RSAPrivateKey": "RS256", "ECPrivateKey": "ES256"}.get(type(key).__name__, "EdDSA")
    return make_token(key, algorithm, None if key_id is None else {"kid": key_id}, **claims)


async def start(server, nursery, **options):
    """Return the keys of a server, after the first fetch."""
    keys = RemoteKeys(f"{server.url}/jwks", "jwks_url", **options)
    fetched = keys._fetched
    nursery.start_soon(keys.run)
    await fetched.wait()
    return keys


async def names(keys, key_id):
    return [key.key_id for key in await keys.find(key_id)]


@pytest.mark.parametrize("key", [RSA, EC, ED], ids=["RS256", "ES256", "EdDSA"])
async def test_server_with_a_jwks_url(key, nursery):
    """Tokens are verified by the key that their header names."""
    keys = await KeyServer(jwk(private_key("RS256", 1), "a"), jwk(key, "b")).start(nursery)
    async with (
        sseserve.serve(port=0, jwks_url=f"{keys.url}/jwks") as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        for text, status in (
            (token(key, "b", role="admin"), 200),
            (token(key, "a", role="admin"), 401),
            (token(key, role="admin"), 401),
            (token(private_key("ES256", 2), "b", role="admin"), 401),
            (make_token(SECRET, role="admin"), 401),
        ):
            assert (await client.get("/api/sessions", headers=bearer(text))).status_code == status
    assert len(keys.requests) == 1
    assert keys.requests[0].path == "/jwks"


async def test_token_without_a_key_id(nursery, virtual_clock):
    """It can be verified if there is one key only."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = await start(server, nursery)
    assert await names(keys, None) == ["a"]
    server.keys.append(jwk(ED, "b"))
    await trio.sleep(jwks.MAX_AGE + 1)
    assert await names(keys, None) == []


async def test_unknown_key_is_fetched(nursery, virtual_clock):
    """A key that is new is found by the first token that it has signed."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = await start(server, nursery)
    await trio.sleep(jwks.MIN_INTERVAL)
    server.keys.append(jwk(ED, "b"))
    assert await names(keys, "a") == ["a"]
    assert len(server.requests) == 1
    assert await names(keys, "b") == ["b"]
    assert len(server.requests) == 2


async def test_flood_of_unknown_keys(nursery, virtual_clock):
    """However many there are, the keys are fetched at most once in 10 s; the requests do not wait."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = await start(server, nursery)
    for _ in range(5):
        await trio.sleep(jwks.MIN_INTERVAL)
        fetched = len(server.requests)
        async with trio.open_nursery() as requests:
            for number in range(100):
                requests.start_soon(names, keys, f"../{number}")
        assert len(server.requests) == fetched + 1
        began = trio.current_time()
        for number in range(100):
            assert await names(keys, str(number)) == []
        assert trio.current_time() == began
        assert len(server.requests) == fetched + 1
    assert await names(keys, "a") == ["a"]


async def test_requests_that_wait_share_a_fetch(nursery, virtual_clock):
    """Those that come while the keys are fetched wait for that."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = await start(server, nursery)
    await trio.sleep(jwks.MIN_INTERVAL)
    server.keys.append(jwk(ED, "b"))

    async def later(stream, request):
        await trio.sleep(2)
        await respond(200, {"keys": server.keys})(stream, request)

    server.handler = later
    found = []

    async def find(delay):
        await trio.sleep(delay)
        found.append((await names(keys, "b"), trio.current_time()))

    began = trio.current_time()
    async with trio.open_nursery() as requests:
        for delay in (0, 0.5, 1):
            requests.start_soon(find, delay)
    assert len(server.requests) == 2
    assert [(key_ids, round(at - began, 3)) for key_ids, at in found] == [(["b"], 2)] * 3


async def test_wait_is_bounded(nursery, virtual_clock, caplog):
    """A server that does not respond costs a request 5 s, and a request for a known key nothing."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = await start(server, nursery)
    await trio.sleep(jwks.MIN_INTERVAL)
    server.handler = lambda stream, request: trio.sleep_forever()
    began = trio.current_time()
    assert await names(keys, "b") == []
    assert trio.current_time() - began == pytest.approx(jwks.PATIENCE)
    assert await names(keys, "a") == ["a"]
    await trio.sleep(jwks.TIMEOUT)
    assert "cannot fetch the keys of tokens" in caplog.text
    # Failures count as well.
    assert await names(keys, "b") == []
    assert len(server.requests) == 2


async def test_keys_are_fetched_again_by_age(nursery, virtual_clock):
    """In the background: a key that was withdrawn is refused without anybody asking for a new one."""
    server = await KeyServer(jwk(EC, "a"), jwk(ED, "b")).start(nursery)
    changes = []
    keys = await start(server, nursery, max_age=60)
    keys.on_change = lambda: changes.append(trio.current_time())
    await trio.sleep(61)
    assert (len(server.requests), changes) == (2, [])
    del server.keys[0]
    await trio.sleep(60)
    assert await names(keys, "a") == []
    assert await names(keys, "b") == ["b"]
    assert len(changes) == 1


FAILURES = {
    "500": respond(500, {"keys": []}),
    "not JSON": respond(200, b"<html>"),
    "no keys": respond(200, {"error": "x"}),
    "not a list": respond(200, {"keys": {"a": 1}}),
    "array": respond(200, []),
    "nested": respond(200, b"[" * 100_000),
    "too many": respond(200, {"keys": [{}] * 101}),
    "too large": respond(200, b" " * (jwks.MAX_SIZE + 1) + b'{"keys": []}'),
    "compressed": respond(200, gzip.compress(b'{"keys": []}'), "Content-Encoding: gzip"),
    "cut": respond(200, b"", "Content-Length: 10"),
    "no response": respond,
}


@pytest.mark.parametrize("name", FAILURES)
async def test_fetch_that_fails_keeps_the_keys(name, nursery, virtual_clock, caplog):
    """It is logged, and tried again in 30 s."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = await start(server, nursery)
    handler = FAILURES[name]

    async def close(stream, request):
        pass

    server.handler = close if handler is respond else handler
    await trio.sleep(jwks.MAX_AGE + 1)
    assert len(server.requests) == 2
    assert await names(keys, "a") == ["a"]
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "the keys that are known stay in use" in record.getMessage()
    server.handler, server.keys = None, [jwk(ED, "b")]
    await trio.sleep(jwks.RETRY + 1)
    assert await names(keys, "b") == ["b"]


async def test_redirects_are_not_followed(nursery, virtual_clock):
    """They could lead to another site, or to http."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    other = await KeyServer(jwk(ED, "b")).start(nursery)
    keys = await start(server, nursery)
    server.handler = respond(302, b"", f"Location: {other.url}/jwks")
    await trio.sleep(jwks.MIN_INTERVAL)
    assert await names(keys, "b") == []
    assert (len(server.requests), other.requests) == (2, [])


async def test_response_without_end(nursery, virtual_clock, caplog):
    """No more is read than a set of keys may have."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = await start(server, nursery)
    sent = 0

    async def pour(stream, request):
        nonlocal sent
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1024):
            await stream.send_all(b" " * 65536)
            sent += 65536

    server.handler = pour
    await trio.sleep(jwks.MAX_AGE + 1)
    assert sent < 32 * jwks.MAX_SIZE  # most of it in the sockets' buffers
    assert f"larger than {jwks.MAX_SIZE} bytes" in caplog.text
    assert await names(keys, "a") == ["a"]


async def test_response_that_drips(nursery, virtual_clock, caplog):
    """The time is limited as a whole, not only between two bytes."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = await start(server, nursery)

    async def drip(stream, request):
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(60):
            await trio.sleep(1)
            await stream.send_all(b" ")

    server.handler = drip
    await trio.sleep(jwks.MAX_AGE + jwks.TIMEOUT + 1)
    assert "cannot fetch the keys" in caplog.text
    assert await names(keys, "a") == ["a"]


async def test_issuers_of_one_url(nursery, virtual_clock):
    """What is fetched is theirs together."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    url = f"{server.url}/jwks?secret=hunter2"
    issuers = (Issuer(issuer="one", jwks_url=url), Issuer(issuer="two", jwks_url=url))
    authenticator = open_authenticator(Settings(issuers=issuers))
    [keys] = authenticator.remote_keys
    nursery.start_soon(keys.run)
    for issuer in ("one", "two"):
        text = token(EC, "a", iss=issuer)
        request = Request.create("GET", "/", [(b"authorization", f"Bearer {text}".encode())])
        assert (await authenticator(request)).issuer == issuer
    assert len(server.requests) == 1


async def test_log_does_not_show_the_query(nursery, virtual_clock, caplog):
    """It may have a secret of the issuer's."""
    server = await KeyServer().start(nursery)
    keys = RemoteKeys(f"{server.url}/jwks?secret=hunter2", "jwks_url")
    nursery.start_soon(keys.run)
    assert await names(keys, "a") == []
    server.handler = respond(500)
    await trio.sleep(jwks.MAX_AGE + 1)
    assert len([record for record in caplog.records if "jwks" in record.getMessage()]) == 2
    assert "hunter2" not in "".join(r.getMessage() for r in caplog.records if r.name.startswith("sseserve"))


def test_log_of_a_server_does_not_show_the_query():
    """Not even at level debug, by the library that fetches."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"keys": [jwk(EC, "a")]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as keys:
        threading.Thread(target=keys.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{keys.server_port}/jwks?secret=hunter2"
        command = (sys.executable, "-m", "sseserve", "serve", "--port", "0", "--log-level", "debug")
        with Program(*command, SSESERVE_JWKS_URL=url) as program:
            at = program.wait_for_output(r"serving at (\S+)")[1]
            headers = bearer(token(EC, "a", role="admin"))
            assert httpx.get(f"{at}/api/sessions", headers=headers).status_code == 200
            assert program.wait(signal.SIGTERM) == 0
        keys.shutdown()
    assert "hunter2" not in program.output
    assert headers["Authorization"][7:] not in program.output


async def test_keys_that_were_never_fetched(nursery, virtual_clock):
    """Tokens cannot be verified yet: 503, which tells clients to come again, as soon as that is known."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    server.handler = respond(500)
    keys = await start(server, nursery)
    await trio.sleep(1)
    began = trio.current_time()
    for _ in range(3):
        with pytest.raises(Unavailable, match="cannot be fetched"):
            await keys.find("a")
    assert trio.current_time() == began
    server.handler = None
    await trio.sleep(jwks.MIN_INTERVAL)
    assert await names(keys, "a") == ["a"]


async def test_first_request_waits_for_the_first_fetch(nursery, virtual_clock):
    """It comes while the keys are fetched at the start."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = RemoteKeys(f"{server.url}/jwks", "jwks_url")
    async with trio.open_nursery() as inner:
        inner.start_soon(keys.run)
        assert await names(keys, "a") == ["a"]
        inner.cancel_scope.cancel()
    assert len(server.requests) == 1


async def test_an_empty_set_withdraws_all_keys(nursery, virtual_clock, caplog):
    """It is a valid response, so it counts; the log says what it means."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    keys = await start(server, nursery)
    server.keys = []
    await trio.sleep(jwks.MAX_AGE + 1)
    assert await names(keys, "a") == []
    assert "so all are refused" in caplog.text


async def test_known_tokens_are_forgotten_with_their_key(nursery):
    """A token that was verified is verified again when the keys have changed."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    async with (
        sseserve.serve(port=0, jwks_url=f"{server.url}/jwks") as sse_server,
        httpx.AsyncClient(base_url=sse_server.url) as client,
    ):
        [remote] = [
            issuer.keys for issuer in sse_server.app.admission.authenticate._verifier._issuers.values()
        ]
        headers = bearer(token(EC, "a", role="admin"))
        assert (await client.get("/api/sessions", headers=headers)).status_code == 200
        server.keys = [jwk(ED, "b")]
        remote._next_fetch = 0
        other = bearer(token(ED, "b", role="admin"))
        assert (await client.get("/api/sessions", headers=other)).status_code == 200
        assert (await client.get("/api/sessions", headers=headers)).status_code == 401


# The set


@pytest.mark.parametrize(
    ("member", "is_used"),
    [
        (jwk(RSA), True),
        (jwk(RSA, alg="RS256", use="sig", key_ops=["verify"]), True),
        (jwk(ED, alg="Ed25519"), True),
        (jwk(RSA, alg="RS512"), False),
        (jwk(RSA, alg="HS256"), False),
        (jwk(EC, alg="RS256"), False),
        (jwk(RSA, alg=["RS256"]), False),
        (jwk(RSA, use="enc"), False),
        (jwk(RSA, key_ops=["encrypt"]), False),
        (jwk(RSA, key_ops="verify"), False),
        ({**jwk(RSA), "kid": 1}, False),
        (ECAlgorithm.to_jwk(EC, as_dict=True) | {"key_ops": ["verify"]}, False),
        ({**jwk(EC), "crv": "P-384"}, False),
        ({**jwk(EC), "y": jwk(EC)["x"]}, False),
        ({**jwk(EC), "kty": "oct"}, False),
        ({"kty": "oct", "k": encode(SECRET.encode()), "alg": "HS256"}, False),
        ({**jwk(RSA), "n": "AQAB"}, False),
        ({**jwk(RSA), "n": 1}, False),
        ({"kty": "RSA"}, False),
        ({"kty": {}}, False),
        ("RSA", False),
        (None, False),
    ],
)
def test_members_of_a_set(member, is_used):
    """Public keys for signatures of the three kinds are used; all others are left out, secrets above all."""
    data = json.dumps({"keys": [member, jwk(EC, "other")]}).encode()
    assert [key.key_id for key in read_jwks(data)] == [*([member.get("kid")] if is_used else []), "other"]


async def test_public_key_of_a_set_is_no_secret(nursery):
    """Neither in PEM nor as JSON: RFC 8725, section 2.1."""
    server = await KeyServer(jwk(EC, "a")).start(nursery)
    async with (
        sseserve.serve(port=0, jwks_url=f"{server.url}/jwks") as sse_server,
        httpx.AsyncClient(base_url=sse_server.url) as client,
    ):
        claims = {"sub": "ann", "role": "admin", "exp": 2_000_000_000}
        for secret in (json.dumps(jwk(EC, "a")), json.dumps(jwk(EC)), jwk(EC)["x"], ""):
            text = sign_raw({"alg": "HS256", "kid": "a"}, claims, secret)
            assert (await client.get("/api/sessions", headers=bearer(text))).status_code == 401
