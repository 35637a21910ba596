"""``sseserve config check`` says all that ``serve`` would refuse, and changes nothing."""

from __future__ import annotations

import socket
import sqlite3

import pytest
import trio
from click.testing import CliRunner

from sseserve import serve
from sseserve.cli import main
from sseserve.config import load
from sseserve.errors import ConfigError
from sseserve.server.checks import find_refusals

SECRET = "hunter2-hunter2-hunter2-hunter2-hunter2"


def check(*args, **environ):
    return CliRunner().invoke(main, ["config", "check", *map(str, args)], env=environ)


@pytest.fixture
def write(tmp_path):
    """Write a file of settings; DIR in it is its directory."""

    def write(text):
        path = tmp_path / "settings.toml"
        path.write_text(text.replace("DIR", str(tmp_path)))
        return path

    return write


REFUSED = {
    "no key": ('host = "0.0.0.0"', "without authentication everybody who can reach '0.0.0.0'"),
    "key file": ('jwt_key = "file:DIR/none"', "jwt_key: cannot read DIR/none: No such file or directory"),
    "short secret": ('jwt_key = "hunter2"', "jwt_key is a secret of 7 bytes"),
    "two keys": (f'jwt_key = "{SECRET}"\njwks_url = "https://a.example"', "set either jwt_key or jwks_url"),
    "keys over http": ('jwks_url = "http://a.example/keys"', "jwks_url must be an https URL"),
    "issuer without key": ('jwt_issuer = "a"', "jwt_issuer and jwt_audience verify nothing"),
    "no key of an issuer": ('[[issuers]]\nissuer = "a"', "set either key of the issuer 'a' or jwks_url"),
    "key file of an issuer": ('[[issuers]]\nissuer = "a"\nkey = "file:DIR/none"', "cannot read DIR/none"),
    "role of an issuer": (
        f'[[issuers]]\nissuer = "a"\nkey = "{SECRET}"\nroles = ["boss"]',
        "the roles of the issuer 'a' have 'boss', which is none of the setting roles",
    ),
    "two issuers of one name": (
        f'[[issuers]]\nissuer = "a"\nkey = "{SECRET}"\n[[issuers]]\nissuer = "a"\nkey = "{SECRET}"',
        "two of the issuers have the same name",
    ),
    "half of Pub/Sub": ('pubsub_email = "a@b"', "pubsub_audience and pubsub_email are needed both"),
    "Pub/Sub without key": (
        'pubsub_email = "a@b"\npubsub_audience = "a"',
        "pubsub_audience and pubsub_email need authentication",
    ),
    "certificate without key": ('tls_cert = "DIR/cert.pem"', "tls_cert needs tls_key"),
    "certificate": ('tls_cert = "DIR/cert.pem"\ntls_key = "DIR/key.pem"', "DIR/cert.pem"),
    "no such engine": ('engine = "mysql://a"', "unknown engine 'mysql://a'"),
    "Redis URL": ('engine = "redis://h/x"', "the database in redis://h/x must be a number"),
    "Redis option": ('redis_url = "redis://h/0?x=1"', "unknown option 'x'"),
    "Redis certificates": ('engine = "rediss://h/?ssl_ca_certs=DIR/ca"', "the files for TLS to Redis"),
    "no path": ('engine = "sqlite:"', "needs the path of a file"),
    "no directory": ('engine = "sqlite:DIR/a/logs.db"', "cannot open DIR/a/logs.db: No such file"),
    "a directory": ('engine = "sqlite:DIR"', "cannot open DIR: Is a directory; name a file in it"),
    "another file": ('engine = "sqlite:DIR/settings.toml"', "DIR/settings.toml is not an SQLite database"),
    "channel": ('redis_url = "redis://h"\nredis_publish = ["x"]', "redis_publish cannot have 'x'"),
    "channel without Redis": ('redis_channels = ["sessions"]', "need a Redis: name it with redis_url"),
    "PROXY protocol": ('proxy_header = "proxy-protocol"', "needs trusted_proxies"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_what_serve_refuses(name, write, tmp_path):
    """Each is refused by both, with the same words; the check says where it comes from."""
    text, message = REFUSED[name]
    message = message.replace("DIR", str(tmp_path))
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        async with serve(load(path, {}), port=0):
            pass
    assert message in str(caught.value)
    result = await trio.to_thread.run_sync(check, path)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"sseserve: {caught.value} ({path}, line ")
    assert "hunter2" not in line


@pytest.mark.parametrize("engine", ["memory:", "sqlite:logs.db"])
def test_workers_without_redis(engine, write):
    """They cannot share that; the option is checked, too."""
    result = check(write(f'engine = "{engine}"'), "--workers", "2")
    assert result.exit_code == 2
    assert "2 workers need a Redis" in result.stderr
    assert result.stderr.endswith("(--workers)\n")


def test_all_at_once(write):
    """Unknown names, wrong values and what is refused are said together, each with its line."""
    path = write(
        'heartbeet = 4\nport = "x"\nhost = "0.0.0.0"\ntls_cert = "DIR/none"\nengine = "sqlite:DIR/a/b"\n'
        'workers = 2\nredis_publish = ["x"]\njwt_issuer = "a"\n[claims]\nrle = "a"\n'
        '[[issuers]]\nissuer = "a"\n'
        '[[issuers]]\nissuer = "b"\njwks_url = "x"\n'
    )
    result = check(path)
    assert result.exit_code == 2
    lines = [line.removeprefix("sseserve: ") for line in result.stderr.splitlines()]
    assert [line.split(f"{path}, line ")[1].split(":")[0].split(",")[0].strip(")") for line in lines] == [
        "1", "2", "10", "4", "8", "11", "11", "5", "6", "7",
    ]  # fmt: skip


def test_no_consequences_of_a_mistake(write):
    """What follows from a problem that was said is not said again."""
    result = check(write('host = "0.0.0.0"\njwks_ulr = "https://a.example"'))
    assert len(result.stderr.splitlines()) == 1
    assert "did you mean 'jwks_url'" in result.stderr
    result = check(write('engine = 3\nworkers = 2\nredis_publish = ["sessions"]'))
    assert len(result.stderr.splitlines()) == 1


def test_not_toml(write):
    """The place is said."""
    result = check(write("port = 1\nport = 2"))
    assert result.exit_code == 2
    assert "settings.toml is not TOML: Cannot overwrite a value" in result.stderr


def test_valid_settings(write, tmp_path):
    """They are only looked at: nothing is created, connected or listened on."""
    with socket.create_server(("127.0.0.1", 0)) as redis:
        redis.settimeout(0)
        port = redis.getsockname()[1]
        path = write(f'engine = "sqlite:DIR/logs.db"\nredis_url = "redis://127.0.0.1:{port}"\nport = {port}')
        result = check(path)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "valid" in result.stdout
        assert [entry.name for entry in tmp_path.iterdir()] == ["settings.toml"]
        with pytest.raises(BlockingIOError):
            redis.accept()


def test_environment(write):
    """A key may be a variable; without a file the environment alone is checked."""
    path = write('host = "0.0.0.0"\njwt_audience = "a"')
    assert check(path, SSESERVE_JWT_KEY=SECRET).exit_code == 0
    assert check(SSESERVE_CONFIG=str(path), SSESERVE_JWT_KEY=SECRET).exit_code == 0
    assert check("--config", path, SSESERVE_JWT_KEY=SECRET).exit_code == 0
    assert check("--config", path).exit_code == 2
    result = check(SSESERVE_HOST="0.0.0.0")
    assert (result.exit_code, result.stderr.endswith("(SSESERVE_HOST)\n")) == (2, True)
    assert check().exit_code == 0
    assert check("--insecure", SSESERVE_HOST="0.0.0.0").exit_code == 0


async def test_file_that_a_server_has_open(tmp_path):
    """The settings of a running server are valid, too; a file of another program is refused."""
    path = tmp_path / "logs.db"
    async with serve(engine=f"sqlite:{path}", port=0):
        result = await trio.to_thread.run_sync(lambda: check(SSESERVE_ENGINE=f"sqlite:{path}"))
    assert result.exit_code == 0, result.stderr
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE a (b)")
    connection.close()
    result = await trio.to_thread.run_sync(lambda: check(SSESERVE_ENGINE=f"sqlite:{other}"))
    assert "is the database of another program" in result.stderr


def test_whatever_else_is_refused(monkeypatch):
    """All parts of a server are built: what no check has found is found then."""
    from sseserve.server import checks

    def build(*_args):
        raise ConfigError("a new reason")

    monkeypatch.setattr(checks, "Application", build)
    assert [refusal.text for refusal in find_refusals(load(None, {}))] == ["a new reason"]
