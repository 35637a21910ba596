"""The command that makes tokens: what it prints is what a server with the same settings accepts."""

from __future__ import annotations

import stat

import jwt
import pytest
import trio
from click.testing import CliRunner
from tokens import SECRET, private_key, private_pem, public_pem

from sseserve import Action
from sseserve.auth import open_authenticator
from sseserve.cli import main
from sseserve.config import load
from sseserve.http.messages import Request

OTHER = "another-secret-that-is-long-enough-for-it"


def run(*args, config=None, **environ):
    """Run the command with these variables; returns the result."""
    environ = {"SSESERVE_JWT_KEY": SECRET, **environ}
    options = [] if config is None else ["--config", str(config)]
    result = CliRunner().invoke(main, ["token", *args, *options], env=environ)
    for secret in (SECRET, OTHER):
        assert secret not in result.output
    return result


def grant_of(token, config=None, **environ):
    """Return the grant of a token, as a server with these settings reads it."""
    authenticator = open_authenticator(load(config, {"SSESERVE_JWT_KEY": SECRET, **environ}))
    request = Request.create("GET", "/", [(b"Authorization", f"Bearer {token}".encode())])
    return trio.run(authenticator, request)


def test_token():
    """One line, accepted by the server, with everything that was asked for."""
    args = "--subject dr-lee --role therapist --patients ann --patients bob --watch job-* --watch x"
    result = run(*args.split(), "--publish", "job-1", "--control", "*", "--create", "job-*", "--ttl", "15m")
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout.removesuffix("\n")
    grant = grant_of(text)
    assert (grant.subject, grant.role, grant.patients) == ("dr-lee", "therapist", {"ann", "bob"})
    assert grant.capabilities == {
        Action.WATCH: ("job-*", "x"),
        Action.PUBLISH: ("job-1",),
        Action.CONTROL: ("*",),
        Action.CREATE: ("job-*",),
    }
    assert grant.expires_at - grant.issued_at == 900
    assert len(grant.token_id) >= 16
    again = grant_of(run("--subject", "dr-lee").stdout.strip())
    assert again.token_id != grant.token_id
    assert (again.role, again.capabilities, again.expires_at - again.issued_at) == (None, {}, 3600)


@pytest.mark.parametrize(("ttl", "seconds"), [("30s", 30), ("15m", 900), ("1h", 3600), ("7d", 604800)])
def test_ttl(ttl, seconds):
    """Its units."""
    grant = grant_of(run("--subject", "a", "--ttl", ttl).stdout.strip())
    assert grant.expires_at - grant.issued_at == seconds


@pytest.mark.parametrize("ttl", ["", "0s", "1", "h", "1w", "-1h", "1.5h", "9999999999s", "1h "])
def test_wrong_ttl(ttl):
    """A usage error that says how it is written."""
    result = run("--subject", "a", "--ttl", ttl)
    assert result.exit_code == 2
    assert "such as 30s, 15m, 1h or 7d" in result.stderr


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_private_key(algorithm, tmp_path):
    """From a file; the server has the public one."""
    key = private_key(algorithm)
    (tmp_path / "key.pem").write_text(private_pem(key))
    (tmp_path / "key.pem").chmod(stat.S_IRUSR)
    public = {"SSESERVE_JWT_KEY": public_pem(key)}
    result = run("--subject", "ann", "--key", f"file:{tmp_path / 'key.pem'}", **public)
    assert grant_of(result.stdout.strip(), **public).subject == "ann"
    assert jwt.get_unverified_header(result.stdout.strip())["alg"] == algorithm
    result = run("--subject", "ann", **public)
    assert result.exit_code == 2
    assert "jwt_key is a public key, which can only verify" in result.stderr


def test_settings_of_the_server(tmp_path):
    """Issuer, audience, roles and names of claims are the server's."""
    config = tmp_path / "sseserve.toml"
    config.write_text(
        'jwt_issuer = "https://id.example"\njwt_audience = "us"\n'
        '[claims]\nrole = "group"\nsubject = "email"\n[roles.viewer]\nevery = ["watch"]\n'
    )
    text = run("--subject", "ann", "--role", "viewer", config=config).stdout.strip()
    assert grant_of(text, config).role == "viewer"
    claims = jwt.decode(text, options={"verify_signature": False})
    assert (claims["iss"], claims["aud"], claims["email"]) == ("https://id.example", "us", "ann")
    result = run("--subject", "ann", "--role", "admin", config=config)
    assert result.exit_code == 2
    assert "'admin' is not a role: there are viewer" in result.stderr


def test_one_of_several_issuers(tmp_path):
    """With its key, its audience, and what it may give."""
    config = tmp_path / "sseserve.toml"
    config.write_text(
        f'[[issuers]]\nissuer = "a"\nkey = "{OTHER}"\naudience = "us"\n'
        'roles = ["patient"]\nsubject_prefix = "a:"\n'
    )
    text = run("--subject", "ann", "--role", "patient", "--issuer", "a", config=config).stdout.strip()
    assert grant_of(text, config).user == ("a", "a:ann")
    for args, reason in (
        (("--role", "admin"), "a role that its issuer may not give"),
        (("--watch", "*"), "may not give"),
    ):
        result = run("--subject", "ann", "--issuer", "a", *args, config=config)
        assert result.exit_code == 2
        assert reason in result.stderr


@pytest.mark.parametrize(
    ("args", "environ", "message"),
    [
        (["--role", "boss"], {}, "'boss' is not a role: there are patient, therapist, service, admin"),
        (["--key", "hunter2"], {}, "--key is a secret of 7 bytes: HS256 needs 32"),
        (["--key", "file:/no/such/file"], {}, "--key: cannot read /no/such/file"),
        ([], {"SSESERVE_JWT_KEY": "hunter2"}, "jwt_key is a secret of 7 bytes"),
        ([], {"SSESERVE_JWT_KEY": None}, "a key is needed to sign with: --key or jwt_key (SSESERVE_JWT_KEY)"),
        ([], {"SSESERVE_PROT": "1"}, "unknown setting 'SSESERVE_PROT'"),
        (["--ttl", "31d"], {}, "the server would refuse it: the token expires later than 2592000 seconds"),
        (["--subject", "a\nb"], {}, "the server would refuse it: the token's claim sub must be a string"),
        (["--watch", "a" * 300], {}, "the server would refuse it: in the token's claim sseserve"),
        (["--issuer", "a\nb"], {}, "the server would refuse it: the token's claim iss"),
    ],
)  # fmt: skip
def test_refused(args, environ, message):
    """A token that a server would refuse is not made; the exit status is that of a usage error."""
    result = run("--subject", "ann", *args, **environ)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "hunter2" not in result.stderr


def test_subject_is_required():
    """There are no anonymous tokens."""
    result = run()
    assert result.exit_code == 2
    assert "--subject" in result.stderr


def test_without_the_libraries(monkeypatch):
    """The message names the extra."""
    monkeypatch.setitem(__import__("sys").modules, "sseserve.auth.signing", None)
    result = run("--subject", "ann")
    assert result.exit_code == 2
    assert "pip install 'sseserve[auth]'" in result.stderr
