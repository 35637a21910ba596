"""The tokens of a Pub/Sub push subscription: Google's, for this audience, of this service account."""

from __future__ import annotations

import base64
from contextlib import asynccontextmanager

import httpx
import pytest
from test_jwks import RSA, KeyServer, token
from tokens import SECRET, bearer, jwk, make_token, private_key

import sseserve
from sseserve.errors import ConfigError

AUDIENCE = "https://progress.example/api/v1/pubsub/push"
EMAIL = "push@project.iam.gserviceaccount.com"
PATH = "/api/v1/pubsub/push"
STATUS = base64.b64encode(b'{"jobId":"a","status":"processing","progress":50}').decode()
BODY = {"message": {"data": STATUS, "messageId": "1"}}
GOOGLE = {
    "iss": "https://accounts.google.com",
    "aud": AUDIENCE,
    "email": EMAIL,
    "email_verified": True,
    "sub": "1",
}


@asynccontextmanager
async def serve_push(nursery, *keys):
    """Serve with authentication, and with keys of Google's; yields the server and a client of it."""
    google = await KeyServer(*keys).start(nursery)
    async with (
        sseserve.serve(
            port=0,
            jwt_key=SECRET,
            pubsub_audience=AUDIENCE,
            pubsub_email=EMAIL,
            pubsub_jwks_url=f"{google.url}/certs",
        ) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        yield server, client


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 200),
        ({"iss": "accounts.google.com"}, 200),
        ({"iss": "https://accounts.google.com.evil.example"}, 401),
        ({"iss": None}, 401),
        ({"aud": "https://other.example/push"}, 401),
        ({"aud": None}, 401),
        ({"email": "push@other.iam.gserviceaccount.com"}, 401),
        ({"email": None}, 401),
        ({"email_verified": False}, 401),
        ({"email_verified": "true"}, 401),
        ({"email_verified": None}, 401),
        ({"exp": 1}, 401),
        ({"exp": None}, 401),
        ({"iat": 2**40}, 401),
    ],
    ids=str,
)
async def test_tokens_of_google(nursery, changes, status):
    """Pub/Sub delivers again what is refused, and nothing of it is recorded."""
    async with serve_push(nursery, jwk(private_key("RS256", 1), "a"), jwk(RSA, "b")) as (server, client):
        text = token(RSA, "b", **{**GOOGLE, **changes})
        response = await client.post(PATH, json=BODY, headers=bearer(text))
        assert response.status_code == status
        assert await server.tracker.engine.count() == (status == 200)
        assert server.app.counters.invalid_messages == 0
        # It is for nothing else, and nothing else is for it.
        for method, path in (("GET", "/api/sessions"), ("POST", "/api/sessions/a/progress")):
            assert (await client.request(method, path, headers=bearer(text))).status_code == 401


async def test_no_other_token_is_for_a_push(nursery):
    """None, one of this server's own, and one that another key has signed."""
    async with serve_push(nursery, jwk(RSA, "b")) as (server, client):
        forged = token(private_key("RS256", 1), "b", **GOOGLE)
        for text in (None, make_token(role="admin"), make_token(**GOOGLE), forged, "x"):
            headers = {} if text is None else bearer(text)
            for body in (BODY, {"message": "not one"}):
                assert (await client.post(PATH, json=body, headers=headers)).status_code == 401
        assert await server.tracker.engine.count() == 0
        assert server.app.counters.invalid_messages == 0


async def test_without_the_settings_a_push_needs_the_right_to_publish():
    """To every session: the message says which one it is."""
    async with (
        sseserve.serve(port=0, jwt_key=SECRET) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        every, one = {"publish": ["*"]}, {"publish": ["a"]}
        for text, status in (
            (None, 401),
            (token(RSA, "b", **GOOGLE), 401),
            (make_token(role="patient"), 403),
            (make_token(sseserve=one), 403),
            (make_token(sseserve=every), 200),
            (make_token(role="service"), 200),
        ):
            headers = {} if text is None else bearer(text)
            assert (await client.post(PATH, json=BODY, headers=headers)).status_code == status
            assert await server.tracker.engine.count() == (status == 200)


@pytest.mark.parametrize(
    "settings",
    [
        {"jwt_key": SECRET, "pubsub_audience": AUDIENCE},
        {"jwt_key": SECRET, "pubsub_email": EMAIL},
        {"pubsub_audience": AUDIENCE, "pubsub_email": EMAIL},
        {
            "jwt_key": SECRET,
            "pubsub_audience": AUDIENCE,
            "pubsub_email": EMAIL,
            "pubsub_jwks_url": "http://a.example",
        },
    ],
    ids=lambda settings: " ".join(settings),
)
async def test_settings_that_would_verify_nothing(settings):
    """Are refused at the start."""
    with pytest.raises(ConfigError, match="pubsub_"):
        async with sseserve.serve(port=0, **settings):
            pass


async def test_a_push_waits_for_the_keys(monkeypatch):
    """While they cannot be fetched it is a 503, so that it is delivered again."""
    monkeypatch.setattr("sseserve.auth.jwks.PATIENCE", 0.05)
    async with (
        sseserve.serve(
            port=0, jwt_key=SECRET, pubsub_audience=AUDIENCE, pubsub_email=EMAIL,
            pubsub_jwks_url="http://127.0.0.1:9/certs",
        ) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):  # fmt: skip
        response = await client.post(PATH, json=BODY, headers=bearer(token(RSA, "b", **GOOGLE)))
        assert response.status_code == 503
        assert await server.tracker.engine.count() == 0
