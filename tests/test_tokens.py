"""Tokens of requests: what is accepted, and what is refused with 401."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import httpx
import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from tokens import (
    SECRET,
    bearer,
    encode,
    jwk,
    make_token,
    private_key,
    private_pem,
    public_pem,
    sign_raw,
)

import sseserve
from sseserve import Action, Grant
from sseserve.auth import open_authenticator
from sseserve.config import Claims, Issuer, Role, Settings
from sseserve.errors import ConfigError, Forbidden, InvalidToken, Unauthorized
from sseserve.http.messages import Request, error_response

NOW = 1_800_000_000
HEADER = {"alg": "HS256", "typ": "JWT"}


def make_request(*fields, method="GET"):
    """Return a request with these header fields."""
    raw = [(name.encode(), value.encode("latin-1")) for name, value in fields]
    return Request.create(method, "/api/sessions", raw)


def token_request(token):
    return make_request(("Authorization", f"Bearer {token}"))


class Reader:
    """An authenticator at a certain time; calling it returns the grant of a token."""

    def __init__(self, **settings):
        self.now = float(NOW)
        settings = {"jwt_key": SECRET, **settings}
        self.authenticator = open_authenticator(Settings(**settings), clock=lambda: self.now)

    async def __call__(self, token):
        return await self.authenticator(token_request(token))

    async def refused(self, token):
        """Return why a token is refused."""
        with pytest.raises(InvalidToken) as caught:
            await self(token)
        assert token not in str(caught.value)
        return str(caught.value)


def token(*args, **claims):
    return make_token(*args, now=NOW, **claims)


async def test_grant_of_a_token():
    """All claims that matter become the grant."""
    reader = Reader(jwt_issuer="https://id.example", jwt_audience="sseserve")
    text = token(
        iss="https://id.example",
        aud=["other", "sseserve"],
        jti="t-1",
        role="therapist",
        patients=["ann", "bob"],
        sseserve={"watch": ["job-*"], "publish": ["job-17"], "control": []},
        sub="dr-lee",
        name="ignored",
    )
    assert msgspec.structs.replace(await reader(text), trust=None) == Grant(
        "dr-lee",
        "therapist",
        frozenset({"ann", "bob"}),
        {Action.WATCH: ("job-*",), Action.PUBLISH: ("job-17",)},
        issuer="https://id.example",
        token_id="t-1",
        issued_at=NOW,
        expires_at=NOW + 3600,
    )
    grant = await Reader()(token())
    assert grant == Grant("ann", issued_at=NOW, expires_at=NOW + 3600, trust=grant.trust)


async def test_names_of_claims():
    """They are settings."""
    names = Claims(subject="email", role="https://id.example/role", patients="cases", capabilities="scope")
    grant = await Reader(claims=names)(
        token(
            **{
                "sub": None,
                "email": "ann@example.org",
                "https://id.example/role": "patient",
                "cases": ["a"],
                "scope": {"watch": ["*"]},
                "role": "admin",
                "sseserve": {"publish": ["*"]},
            }
        )
    )
    assert (grant.subject, grant.role, grant.patients) == ("ann@example.org", "patient", {"a"})
    assert grant.capabilities == {Action.WATCH: ("*",)}


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
@pytest.mark.parametrize("how", ["text", "file"])
async def test_public_key(algorithm, how, tmp_path):
    """Its kind says by which algorithm tokens are verified, whether the setting has it or names its file."""
    key, other = private_key(algorithm), private_key(algorithm, 1)
    (tmp_path / "key.pem").write_text(public_pem(key))
    reader = Reader(jwt_key=public_pem(key) if how == "text" else f"file:{tmp_path / 'key.pem'}")
    assert (await reader(token(key, algorithm))).subject == "ann"
    assert "not signed with a key" in await reader.refused(token(other, algorithm))
    assert "not signed with a key" in await reader.refused(token())


async def test_secret_in_a_file(tmp_path):
    """The line end behind it is not part of it."""
    (tmp_path / "secret").write_text(SECRET + "\n")
    reader = Reader(jwt_key=f"file:{tmp_path / 'secret'}")
    assert (await reader(token())).subject == "ann"


async def test_wrong_signature():
    """Of another secret, or of other claims, or of another header."""
    reader = Reader()
    good = token()
    header, payload, signature = good.split(".")
    _, other_payload, _ = token(sub="bob").split(".")
    for wrong in (
        token(SECRET[::-1]),
        f"{header}.{other_payload}.{signature}",
        f"{encode({**HEADER, 'kid': 'x'})}.{payload}.{signature}",
        f"{header}.{payload}.{signature[:-2]}",
        f"{header}.{payload}.{signature[::-1]}",
    ):
        assert "not signed with a key" in await reader.refused(wrong)
    assert (await reader(good)).subject == "ann"


# The algorithm


@pytest.mark.parametrize("name", ["none", "NONE", "", "HS384", "HS512", "RS256", "hs256", None, 1, []])
async def test_algorithm_of_the_header_is_not_chosen(name):
    """Another algorithm than that of the key is refused, be the signature right, wrong or missing."""
    header = {"typ": "JWT"} if name is None else {"alg": name}
    claims = {"sub": "ann", "exp": NOW + 60}
    reader = Reader()
    await reader.refused(sign_raw(header, claims))
    await reader.refused(f"{encode(header)}.{encode(claims)}.AA")
    await reader.refused(f"{encode(header)}.{encode(claims)}.")


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_public_key_is_no_secret(algorithm):
    """Who knows the public key signs with it as the secret: RFC 8725, section 2.1."""
    pem = public_pem(private_key(algorithm))
    reader = Reader(jwt_key=pem)
    for secret in (pem, pem.strip(), pem.encode()):
        assert "not signed" in await reader.refused(sign_raw(HEADER, {"sub": "ann", "exp": NOW + 60}, secret))


async def test_algorithm_of_another_key():
    """A token by one algorithm whose header names another."""
    reader = Reader(jwt_key=public_pem(private_key("RS256")))
    text = token(private_key("ES256"), "ES256", headers={"alg": "ES256"})
    assert "not signed" in await reader.refused(text)
    pss = token(private_key("RS256"), "PS256")
    assert "not signed" in await reader.refused(pss)


async def test_header_names_no_key():
    """A key, or where it is, in the header of the token means nothing."""
    attacker = private_key("RS256", 7)
    headers = {
        "jwk": jwk(attacker),
        "jku": "https://evil.example/jwks",
        "x5u": "https://evil.example/x5u",
        "x5c": ["AAAA"],
        "kid": "../../../../dev/null",
    }
    reader = Reader(jwt_key=public_pem(private_key("RS256")))
    assert "not signed" in await reader.refused(token(attacker, "RS256", headers))
    # They do not disturb a good token either.
    assert (await reader(token(private_key("RS256"), "RS256", headers))).subject == "ann"
    assert "not signed" in await Reader().refused(
        sign_raw({**HEADER, "kid": "/dev/null"}, {"sub": "ann", "exp": NOW + 60}, b"")
    )


async def test_extensions_that_must_be_understood():
    """A header with ``crit`` (RFC 7515, section 4.1.11), or an unencoded payload (RFC 7797)."""
    claims = {"sub": "ann", "exp": NOW + 60}
    for more in ({"crit": ["exp"], "exp": 1}, {"crit": ["b64"], "b64": False}, {"b64": False}):
        assert "not signed" in await Reader().refused(sign_raw({**HEADER, **more}, claims))


# Times


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": None}, "exp"),
        ({"exp": NOW - 30}, "expired"),
        ({"exp": NOW - 29}, None),
        ({"exp": str(NOW + 60)}, "exp must be a number"),
        ({"exp": True}, "exp must be a number"),
        ({"exp": [NOW]}, "exp must be a number"),
        ({"exp": 10**400}, "exp must be a number"),
        ({"exp": NOW + 30 * 86400}, None),
        ({"exp": NOW + 30 * 86400 + 1}, "expires later"),
        ({"nbf": NOW + 30}, None),
        ({"nbf": NOW + 31}, "nbf is in the future"),
        ({"nbf": "now"}, "nbf must be a number"),
        ({"iat": NOW + 30}, None),
        ({"iat": NOW + 31}, "iat is in the future"),
        ({"iat": {}}, "iat must be a number"),
        ({"iat": NOW + 0.5, "exp": NOW + 60.5}, None),
    ],
)
async def test_times(claims, reason):
    """With 30 s of leeway, but none for how long a token may be valid."""
    if reason is None:
        assert (await Reader()(token(**claims))).subject == "ann"
    else:
        assert reason in await Reader().refused(token(**claims))


async def test_explicit_null_is_no_time():
    """A claim that is null is not a claim that is missing."""
    text = sign_raw(HEADER, {"sub": "ann", "exp": NOW + 60, "nbf": None})
    assert "nbf must be a number" in await Reader().refused(text)


# Audience and issuer


@pytest.mark.parametrize(
    ("setting", "audience", "reason"),
    [
        ("us", "us", None),
        ("us", ["them", "us"], None),
        ("us", "them", "another audience"),
        ("us", "u", "another audience"),
        ("us", [], "another audience"),
        ("us", None, "another audience"),
        ("us", ["us", 1], "aud must be"),
        ("us", {"us": 1}, "aud must be"),
        (None, "us", "this server has none"),
        (None, [], "this server has none"),
        (None, None, None),
    ],
)
async def test_audience(setting, audience, reason):
    """The token must be for this server; one that is for somebody is not for a server without a name."""
    reader = Reader(jwt_audience=setting)
    text = token(aud=audience)
    if reason is None:
        assert (await reader(text)).subject == "ann"
    else:
        assert reason in await reader.refused(text)


@pytest.mark.parametrize("issuer", [None, "https://evil.example", "https://id.example/"])
async def test_issuer(issuer):
    """It must be the one of the settings."""
    reader = Reader(jwt_issuer="https://id.example")
    assert "issuer" in await reader.refused(token(iss=issuer))
    assert (await reader(token(iss="https://id.example"))).issuer == "https://id.example"


@pytest.mark.parametrize("value", [1, ["a"], {"a": 1}, True])
async def test_issuer_and_key_id_of_another_type(value):
    """They are strings."""
    claims = {"sub": "ann", "exp": NOW + 60}
    assert "must be strings" in await Reader().refused(sign_raw(HEADER, {**claims, "iss": value}))
    assert "must be strings" in await Reader().refused(sign_raw({**HEADER, "kid": value}, claims))


def two_issuers(**fields):
    """Return a reader of two issuers, and a function that makes tokens of one of them."""
    keys = {name: private_key("ES256", number) for number, name in enumerate(("one", "two"))}
    issuers = (
        Issuer(issuer="one", key=public_pem(keys["one"]), **fields),
        Issuer(issuer="two", key=public_pem(keys["two"]), audience="us", subject_prefix="two:"),
    )
    reader = Reader(jwt_key=None, issuers=issuers)

    def make(name, signer=None, **claims):
        return token(keys[signer or name], "ES256", iss=name, **claims)

    return reader, make


async def test_each_issuer_has_its_own_key():
    """A token is verified with the keys of the issuer that it names, and with no others."""
    reader, make = two_issuers()
    assert (await reader(make("one"))).user == ("one", "ann")
    assert (await reader(make("two", aud="us"))).user == ("two", "two:ann")
    assert "not signed" in await reader.refused(make("one", "two"))
    assert "not signed" in await reader.refused(make("two", "one", aud="us"))
    assert "another audience" in await reader.refused(make("two"))
    assert "this server has none" in await reader.refused(make("one", aud="us"))
    for name in ("three", "", None):
        assert "not one that is trusted" in await reader.refused(make(name, "one"))


async def test_prefix_of_an_issuer():
    """Its patients are its own, too."""
    reader, make = two_issuers()
    grant = await reader(make("two", aud="us", role="therapist", patients=["bob"]))
    assert grant.patients == {"two:bob"}


async def test_users_of_another_issuer():
    """An issuer without a prefix, or with the beginning of another one, cannot name the other's users."""
    keys = {name: private_key("ES256", number) for number, name in enumerate(("a:", "a:b:", "c"))}
    issuers = tuple(
        Issuer(issuer=name, key=public_pem(key), subject_prefix=name) for name, key in keys.items()
    )
    reader = Reader(issuers=issuers)

    async def subject(name, **claims):
        return (await reader(token(keys[name], "ES256", iss=name, **claims))).subject

    for name in ("a:ann", "a:b:ann", "cx", "c"):
        assert "user of another issuer" in await reader.refused(token(sub=name))
        assert "user of another issuer" in await reader.refused(token(patients=["x", name]))
    assert (await reader(token(sub="ba:"))).subject == "ba:"
    assert await subject("a:b:", sub="ann") == "a:b:ann"
    assert await subject("a:", sub="bc:ann") == "a:bc:ann"
    assert await subject("a:", sub="a:b:ann") == "a:a:b:ann"
    assert "user of another issuer" in await reader.refused(token(keys["a:"], "ES256", iss="a:", sub="b:ann"))


async def test_roles_of_an_issuer():
    """It cannot give others, nor capabilities, which could say the same."""
    reader, make = two_issuers(roles=("patient",))
    assert (await reader(make("one", role="patient"))).role == "patient"
    assert (await reader(make("one"))).role is None
    assert "role" in await reader.refused(make("one", role="admin"))
    assert "may not give" in await reader.refused(make("one", sseserve={"publish": ["*"]}))
    assert (await reader(make("one", sseserve={"publish": []}))).capabilities == {}
    assert (await reader(make("two", aud="us", role="admin"))).role == "admin"
    assert (await reader(make("two", aud="us", sseserve={"watch": ["a"]}))).capabilities
    reader, make = two_issuers(roles=("patient",), capabilities=True)
    assert (await reader(make("one", sseserve={"watch": ["a"]}))).capabilities


async def test_an_issuer_beside_the_one_of_the_key():
    """The key of ``jwt_key`` verifies the tokens of issuers that have none of their own."""
    issuer = Issuer(issuer="one", key=public_pem(private_key("ES256")))
    reader = Reader(issuers=(issuer,))
    assert (await reader(token(iss="other"))).issuer == "other"
    assert "not signed" in await reader.refused(token(iss="one"))


# Claims of our own


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"sub": None}, "no claim sub"),
        ({"sub": 17}, "sub must be a string"),
        ({"sub": ""}, "sub must be a string"),
        ({"sub": ["ann"]}, "sub must be a string"),
        ({"sub": "a" * 256}, None),
        ({"sub": "a" * 257}, "sub must be a string"),
        ({"sub": "a\nb"}, "sub must be a string"),
        ({"sub": "a\x00"}, "sub must be a string"),
        ({"sub": "a\x7f"}, "sub must be a string"),
        ({"sub": "\x9b2J"}, "sub must be a string"),
        ({"sub": "\ud800"}, "sub must be a string"),
        ({"sub": "Zoë Müller 王"}, None),
        ({"role": ["admin"]}, "role must be a string"),
        ({"role": 1}, "role must be a string"),
        ({"role": "unheard-of"}, None),
        ({"patients": "ann"}, "patients must be an array"),
        ({"patients": [1]}, "patients must be an array"),
        ({"patients": {"ann": 1}}, "patients must be an array"),
        ({"patients": ["\ud800"]}, "patients must be an array"),
        ({"sseserve": "watch"}, "sseserve must be an object"),
        ({"sseserve": ["watch"]}, "sseserve must be an object"),
        ({"sseserve": {"wacth": ["a"]}}, "sseserve must be an object with no members but create, watch"),
        ({"sseserve": {"revoke": ["*"]}}, "sseserve must be an object"),
        ({"sseserve": {"list": ["*"]}}, "sseserve must be an object"),
        ({"sseserve": {"watch": "a"}}, "each member must be an array"),
        ({"sseserve": {"watch": [1]}}, "each member must be an array"),
        ({"sseserve": {"watch": [["a"]]}}, "each member must be an array"),
        ({"sseserve": {"delete": ["a"]}}, None),
        ({"jti": 1}, "jti must be a string"),
        ({"jti": "a\r\nb"}, "jti must be a string"),
    ],
)  # fmt: skip
async def test_types_of_claims(claims, reason):
    """A clear sentence for each, which names the claim."""
    if reason is None:
        assert (await Reader()(token(**claims))).subject
    else:
        assert reason in await Reader().refused(token(**claims))


# The parts of a token


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (HEADER, b'{"sub": "ann", "sub": "root", "exp": %d}' % (NOW + 60)),
        (HEADER, b'{"sub": "ann", "exp": %d, "sseserve": {"watch": [], "watch": ["*"]}}' % (NOW + 60)),
        (b'{"alg": "none", "alg": "HS256"}', {"sub": "ann", "exp": NOW + 60}),
        (HEADER, b'{"sub": "ann", "exp": NaN}'),
        (HEADER, b'{"sub": "ann", "exp": Infinity}'),
        (HEADER, b'{"sub": "ann", "exp": 1e400}'),
        (HEADER, b'{"sub": "ann", "exp": %d, "iat": -1e400}' % (NOW + 60)),
        (HEADER, b'{"sub": "ann", "exp": %d, "name": NaN}' % (NOW + 60)),
        (HEADER, f'{{"sub": "ann", "exp": {NOW + 60}}}'.encode("utf-16")),
        (HEADER, b'{"sub": "ann", "exp": ' + b"9" * 4500 + b"}"),
        (HEADER, b'["sub"]'),
        (HEADER, b'"sub"'),
        (HEADER, b"null"),
        (HEADER, b"\xff\xfe"),
        (HEADER, b""),
        (b"[]", {"sub": "ann"}),
        (b"{", {"sub": "ann"}),
        (HEADER, b"[" * 5000),
        (HEADER, b'{"sub": "ann", "exp": ' + b"[" * 2000 + b"]" * 2000 + b"}"),
        (b'{"alg": "HS256", "a": ' * 200, b"{}"),
    ],
)
async def test_malformed_parts(header, payload):
    """They are refused although they are signed."""
    assert await Reader().refused(sign_raw(header, payload))


@pytest.mark.parametrize(
    "text",
    ["a", "a.b", "a.b.c.d.e", "..", "a..b", f"{'a' * 9000}.b.c", "é.b.c", f"{token()}=", f"{token()}."],
)
async def test_no_token(text):
    """JWE, several signatures, padding and the like are none."""
    with pytest.raises(InvalidToken, match=r"not a signed JWT|longer than|must be Authorization"):
        await Reader()(text)


async def test_size_of_a_token():
    """It is bounded, whoever has signed it."""
    assert (await Reader()(token(name="a" * 5000))).subject == "ann"
    assert "longer than 8192" in await Reader().refused(token(name="a" * 8000))


# Where the token is


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR "])
async def test_scheme_in_any_case(scheme):
    """RFC 9110, section 11.1."""
    grant = await Reader().authenticator(make_request(("Authorization", f"{scheme} {token()}")))
    assert grant.subject == "ann"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ([], Unauthorized),
        ([("Authorization", "")], Unauthorized),
        ([("Authorization", "Basic YTpi")], Unauthorized),
        ([("Authorization", token())], Unauthorized),
        ([("Authorization", "Bearer")], InvalidToken),
        ([("Authorization", f"Bearer{token()}")], InvalidToken),
        ([("Authorization", f"Bearer {token()} x")], InvalidToken),
        ([("Authorization", f"Bearer {token()}, Basic YTpi")], InvalidToken),
        ([("Authorization", f"Bearer\t{token()}")], InvalidToken),
        ([("Authorization", f"Bearer {token()}")] * 2, InvalidToken),
        ([("Authorization", "Basic YTpi"), ("Cookie", f"__Host-sseserve={token()}")], Unauthorized),
        ([("Authorization", "Bearer x.y.z"), ("Cookie", f"__Host-sseserve={token()}")], InvalidToken),
        ([("Cookie", f"__host-sseserve={token()}")], Unauthorized),
        ([("Cookie", "__Host-sseserve=")], InvalidToken),
        ([("Cookie", f"__Host-sseserve={token()}; __Host-sseserve={token(sub='b')}")], InvalidToken),
    ],
)
async def test_requests_without_a_valid_token(fields, kind):
    """The response says that a token was invalid only if there was one (RFC 6750, section 3.1)."""
    request = make_request(*fields)
    with pytest.raises(Unauthorized) as caught:
        await Reader().authenticator(request)
    assert type(caught.value) is kind
    response = error_response(caught.value, request)
    challenge = 'Bearer error="invalid_token"' if kind is InvalidToken else "Bearer"
    assert (response.status, dict(response.headers)["WWW-Authenticate"]) == (401, challenge)


@pytest.mark.parametrize(
    "field",
    [
        "__Host-sseserve={}",
        "a=b; __Host-sseserve={}; c",
        'x;__Host-sseserve="{}"',
        " ;;=; __Host-sseserve={} ",
    ],
)
async def test_cookie(field):
    """RFC 6265, among others."""
    request = make_request(("Cookie", field.format(token())))
    assert (await Reader().authenticator(request)).subject == "ann"


async def test_cookies_in_fields_of_their_own():
    """HTTP/2 may split them (RFC 9113, section 8.2.3)."""
    request = make_request(("cookie", "a=b"), ("cookie", f"__Host-sseserve={token()}"), ("cookie", "c=d"))
    assert (await Reader().authenticator(request)).subject == "ann"


async def test_cookie_of_another_name():
    """The setting names it."""
    reader = Reader(cookie="session")
    assert (await reader.authenticator(make_request(("Cookie", f"session={token()}")))).subject == "ann"
    with pytest.raises(Unauthorized, match="a token is required"):
        await reader.authenticator(make_request(("Cookie", f"__Host-sseserve={token()}")))


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
async def test_cookie_needs_an_origin_to_change_something(method):
    """A browser sends it with what a page of another site makes it send; its Origin was checked before."""
    fields = [("Cookie", f"__Host-sseserve={token()}")]
    with pytest.raises(Forbidden, match="needs an Origin"):
        await Reader().authenticator(make_request(*fields, method=method))
    fields.append(("Origin", "https://jobs.example"))
    assert (await Reader().authenticator(make_request(*fields, method=method))).subject == "ann"


async def test_cookie_needs_an_origin_for_a_websocket():
    """The request of a handshake is a GET, or over HTTP/2 a CONNECT."""
    fields = [("Cookie", f"__Host-sseserve={token()}"), ("Sec-WebSocket-Version", "13")]
    for method in ("GET", "CONNECT"):
        with pytest.raises(Forbidden, match="needs an Origin"):
            await Reader().authenticator(make_request(*fields, method=method))
    assert await Reader().authenticator(make_request(*fields, ("Origin", "https://jobs.example")))


# Any bytes


VALUES = st.one_of(
    st.binary(max_size=200),
    st.text(alphabet="Bbearer \t.=-_,;AZaz09", max_size=80).map(str.encode),
    st.builds(
        lambda *parts: b"Bearer " + b".".join(parts),
        *[st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda b: encode(b).encode()))] * 3,
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
CLAIMS = st.dictionaries(
    st.sampled_from(
        ["sub", "exp", "nbf", "iat", "iss", "aud", "jti", "role", "patients", "sseserve", "watch"]
    ),
    JSON,
)


@given(name=st.sampled_from([b"authorization", b"cookie"]), value=VALUES)
def test_any_bytes_are_401(name, value):
    """No header field, whatever its bytes, gives a grant or another error."""
    request = Request.create(
        "GET", "/", [(name, value if name != b"cookie" else b"__Host-sseserve=" + value)]
    )

    async def main():
        with pytest.raises(Unauthorized):
            await Reader().authenticator(request)

    trio.run(main)


HEADERS = st.dictionaries(
    st.sampled_from(["alg", "kid", "crit", "b64", "typ", "cty", "jku", "x5u", "x5c", "jwk", "zip", "enc"]),
    JSON,
).map(lambda header: {**HEADER, **header})


@given(header=HEADERS | JSON, claims=CLAIMS, valid=st.booleans())
def test_any_signed_claims_are_a_grant_or_401(header, claims, valid):
    """What a trusted issuer signs is read without another error, and gives what can be encoded as UTF-8."""
    if valid:
        claims = {"sub": "ann", "exp": NOW + 60, **claims}
    text = sign_raw(header, claims)

    async def main():
        try:
            grant = await Reader()(text)
        except Unauthorized as error:
            json.loads(error_response(error, token_request(text)).body)
        else:
            msgspec.json.encode(grant.subject)
            repr(grant).encode()

    trio.run(main)


# Known tokens


async def test_known_token_is_not_verified_again(monkeypatch):
    """Its grant is the same object, so that its streams have one credential."""
    reader = Reader()
    text = token()
    grant = await reader(text)
    monkeypatch.setattr("sseserve.auth.verifier.is_signed_by", None)
    assert await reader(text) is grant


async def test_known_tokens_are_bounded(monkeypatch):
    """The oldest ones are forgotten."""
    monkeypatch.setattr("sseserve.auth.authenticator.MAX_KNOWN", 3)
    reader = Reader()
    texts = [token(jti=str(number)) for number in range(5)]
    grants = [await reader(text) for text in texts]
    assert len(reader.authenticator._known) == 3
    assert await reader(texts[4]) is grants[4]
    assert await reader(texts[0]) is not grants[0]


async def test_refused_tokens_are_not_remembered():
    """So that nobody can fill the memory with them."""
    reader = Reader()
    await reader.refused(token(SECRET[::-1]))
    assert not reader.authenticator._known


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jwt_key": "a" * 31}, "secret of 31 bytes: HS256 needs 32 or more"),
        ({"jwt_key": ""}, "secret of 0 bytes"),
        ({"jwt_key": "file:/no/such/file"}, "jwt_key: cannot read /no/such/file: No such file"),
        ({"jwt_key": "file:/"}, "cannot read /: Is a directory"),
        ({"jwt_key": "file:a\x00b"}, "cannot read"),
        ({"jwt_key": private_pem(private_key("RS256"))}, "is a private key"),
        ({"jwt_key": "-----BEGIN PUBLIC KEY-----\nhunter2\n-----END PUBLIC KEY-----"}, "not a public key"),
        ({"jwt_key": "-----BEGIN CERTIFICATE-----\nhunter2\n-----END CERTIFICATE-----"}, "is a certificate"),
        ({"jwt_key": "ssh-ed25519 " + "A" * 60}, "public key in another format"),
        ({"jwt_key": json.dumps(jwk(private_key("ES256")))}, "public key in another format"),
        ({"jwt_key": SECRET, "jwks_url": "https://id.example/jwks"}, "either jwt_key or jwks_url"),
        ({"jwt_key": None, "jwt_issuer": "a"}, "verify nothing without"),
        ({"jwt_key": None, "jwt_audience": "a"}, "verify nothing without"),
        ({"jwt_key": None, "jwks_url": "http://id.example/jwks"}, "must be an https URL"),
        ({"jwt_key": None, "jwks_url": "https://user:hunter2@id.example/jwks"}, "must be an https URL"),
        ({"jwt_key": None, "jwks_url": "file:///etc/passwd"}, "must be an https URL"),
        ({"jwt_key": None, "jwks_url": "https://"}, "must be an https URL"),
        ({"jwt_key": None, "jwks_url": "https://a:b/"}, "must be an https URL"),
        ({"issuers": (Issuer(issuer="a"),)}, "either key of the issuer 'a' or jwks_url of the issuer 'a'"),
        ({"issuers": (Issuer(issuer="a", key="hunter2"),)}, "key of the issuer 'a' is a secret of 7 bytes"),
        ({"issuers": (Issuer(issuer="a", key=SECRET, roles=("boss",)),)}, "'boss', which is none of"),
        ({"issuers": (Issuer(issuer="a", key=SECRET),) * 2}, "the same name"),
        ({"jwt_issuer": "a", "issuers": (Issuer(issuer="a", key=SECRET),)}, "the same name"),
        ({"cookie": "a b"}, "cookie must be a name"),
        ({"cookie": ""}, "cookie must be a name"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(settings, message):
    """The server does not start; the message says why, and repeats no key."""
    with pytest.raises(ConfigError, match=message) as caught:
        Reader(**settings)
    assert "hunter2" not in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("kind", ["RSA 1024", "P-384", "Ed448"])
def test_keys_of_other_kinds(kind):
    """Too small, or of no algorithm that is accepted."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa

    key = {
        "RSA 1024": lambda: rsa.generate_private_key(65537, 1024),
        "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "Ed448": ed448.Ed448PrivateKey.generate,
    }[kind]()
    with pytest.raises(ConfigError, match="of another kind: it must be RSA"):
        Reader(jwt_key=public_pem(key))


def test_without_a_key_there_is_no_authenticator():
    """The server is open then."""
    assert open_authenticator(Settings()) is None


def test_without_the_libraries():
    """The server runs, but not with a key: the message names the extra."""
    program = """
import sys
sys.modules["jwt"] = sys.modules["cryptography"] = None
import sseserve, sseserve.server
from sseserve.auth import open_authenticator
assert open_authenticator(sseserve.Settings()) is None
try:
    open_authenticator(sseserve.Settings(jwt_key="a" * 32))
except sseserve.errors.ConfigError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout == (
        "jwt_key, jwks_url and issuers need PyJWT, cryptography and httpx: pip install 'sseserve[auth]'\n"
    )


# The server


async def test_server_with_a_key():
    """Each route needs a token; what it allows follows from the role or the capabilities."""
    async with sseserve.serve(port=0, jwt_key=SECRET) as server:  # noqa: SIM117
        async with httpx.AsyncClient(base_url=server.url) as client:
            path = "/api/sessions/job-1/progress"
            for headers, status, challenge in (
                ({}, 401, "Bearer"),
                (bearer("x.y.z"), 401, 'Bearer error="invalid_token"'),
                (bearer(make_token(exp=1, iat=None)), 401, 'Bearer error="invalid_token"'),
                (bearer(make_token(role="patient")), 403, None),
                (bearer(make_token(sseserve={"publish": ["job-2"]})), 403, None),
                (bearer(make_token(sseserve={"publish": ["job-*"]})), 202, None),
                (bearer(make_token(role="service")), 202, None),
            ):
                response = await client.post(path, json={"progress": 1}, headers=headers)
                assert response.status_code == status, response.text
                assert response.headers.get("www-authenticate") == challenge
            assert (await client.get("/health")).status_code == 200
            status = "/api/sessions/job-1/status"
            assert (await client.get(f"{status}?access_token={make_token(role='admin')}")).status_code == 401
            client.cookies.set("__Host-sseserve", make_token(role="admin"))
            assert (await client.get(status)).status_code == 200


async def test_server_with_a_cookie():
    """Only a page of the server's own, or of a listed origin, may change something or open a WebSocket."""
    async with (
        sseserve.serve(port=0, jwt_key=SECRET, cors_origins=("https://app.example",)) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        cookie = {"Cookie": f"a=b; __Host-sseserve={make_token(role='admin')}"}
        await server.tracker.create("s")
        for origin, status in (
            (None, 403),
            (server.url, 202),
            ("https://app.example", 202),
            ("https://evil.example", 403),
            ("null", 403),
        ):
            headers = cookie if origin is None else {**cookie, "Origin": origin}
            response = await client.post("/api/sessions/s/progress", json={}, headers=headers)
            assert (origin, response.status_code) == (origin, status)
            handshake = {
                "Connection": "Upgrade",
                "Upgrade": "websocket",
                "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            }
            stream = await trio.open_tcp_stream("127.0.0.1", server.port)
            async with stream:
                fields = {"Host": f"127.0.0.1:{server.port}", **handshake, **headers}
                head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
                await stream.send_all(f"GET /api/sessions/s/status/ws HTTP/1.1\r\n{head}\r\n".encode())
                line = (await stream.receive_some()).split(b"\r\n")[0]
                assert line.split()[1] == (b"403" if status == 403 else b"101"), origin
        assert (await client.get("/api/sessions", headers=cookie)).status_code == 200


async def test_roles_are_settings():
    """A role of the configuration, by its name in the token."""
    roles = {"viewer": Role(every=frozenset({"watch"}))}
    async with sseserve.serve(port=0, jwt_key=SECRET, roles=roles) as server:
        await server.tracker.create("s", owner="bob")
        async with httpx.AsyncClient(base_url=server.url) as client:
            for role, status in (("viewer", 200), ("admin", 403)):
                response = await client.get("/api/sessions/s/status", headers=bearer(make_token(role=role)))
                assert response.status_code == status


async def test_tokens_are_shown_nowhere(caplog):
    """Valid or not, in the header or the cookie: no log line, response or metric has any part of one."""
    caplog.set_level(logging.DEBUG)
    good, expired = make_token(role="admin"), make_token(exp=1, iat=None)
    forged = make_token(SECRET[::-1], role="admin")
    garbage = "garbage-that-is-not-a-token"
    seen = ""
    async with (
        sseserve.serve(port=0, jwt_key=SECRET) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        for text in (good, expired, forged, garbage, f"{good} {good}"):
            for headers in (
                bearer(text),
                {"Authorization": text},
                {"Authorization": f"Basic {text}"},
                {"Cookie": f"__Host-sseserve={text}"},
            ):
                for method, path in (("GET", "/api/sessions"), ("POST", "/api/sessions/s/progress")):
                    response = await client.request(method, path, headers=headers)
                    seen += f"{response.headers}{response.text}"
        seen += (await client.get("/metrics", headers=bearer(good))).text
    seen += "".join(record.getMessage() for record in caplog.records if record.name.startswith("sseserve"))
    assert "status=401" in seen
    for part in (*good.split("."), *expired.split("."), *forged.split("."), garbage):
        assert part not in seen
