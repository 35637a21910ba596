"""Settings: the precedence of their sources, and the values that are rejected."""

from __future__ import annotations

import pytest

from sseserve import config
from sseserve.config import Issuer, Settings, load, override
from sseserve.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "sseserve.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_defaults():
    """Without a file, variables and flags."""
    assert load(environ={}) == Settings()


def test_precedence_of_sources(tmp_path):
    """Defaults < file < other systems' variables < SSESERVE_* variables < flags."""
    path = write(tmp_path, "port = 1\nttl = 1.0\ndrain = 1\nkeep_alive = 1.0\n")
    environ = {"PORT": "2", "SSESERVE_PORT": "3", "SSESERVE_TTL": "3", "SSESERVE_DRAIN": "3"}
    settings = load(path, environ, {"port": 4, "ttl": 4.0})
    assert (settings.port, settings.ttl, settings.drain, settings.keep_alive) == (4, 4.0, 3.0, 1.0)
    assert load(path, {"PORT": "2"}).port == 2
    assert load(path, {"PORT": "2", "SSESERVE_PORT": "3"}).port == 3


def test_flag_of_none_is_not_given():
    """None leaves a setting unchanged; False is a value."""
    environ = {"SSESERVE_PORT": "3", "SSESERVE_AUTO_CREATE": "true"}
    settings = load(None, environ, {"port": None, "auto_create": False})
    assert (settings.port, settings.auto_create) == (3, False)


@pytest.mark.parametrize(
    ("file", "environ", "flags", "where"),
    [
        ("prot = 1", {}, {}, "'prot' in .*toml"),
        ("", {"SSESERVE_PROT": "1"}, {}, "'prot' in the environment"),
        ("", {}, {"prot": 1}, "'prot' among the flags"),
        ("[server]\nport = 1", {}, {}, "'server' in .*toml"),
    ],
)
def test_unknown_key(tmp_path, file, environ, flags, where):
    """It is an error in every source, and the message names the source."""
    with pytest.raises(ConfigError, match=f"unknown setting {where}"):
        load(write(tmp_path, file), environ, flags)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", "x"), ("port", "-1"), ("port", "65536"), ("port", "1.5"), ("ttl", "0"), ("ttl", "nan"),
        ("drain", "-1"), ("buffer_events", "0"), ("log_level", "loud"), ("auto_create", "perhaps"),
        ("max_connections", "0"),
    ],
)  # fmt: skip
def test_invalid_value(key, value):
    """Out of range or of the wrong type; the message names key and source, even if a flag overrides it."""
    name = f"SSESERVE_{key.upper()}"
    with pytest.raises(ConfigError, match=rf"^{name} in the environment must be .*, not '{value}'$"):
        load(None, {name: value}, {"port": 1} if key == "port" else None)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SSESERVE_TTL": "abc"}, "SSESERVE_TTL in the environment must be a number, not 'abc'"),
        ({"SSESERVE_TTL": "-1"}, "SSESERVE_TTL in the environment must be a number > 0.0, not '-1'"),
        ({"SSESERVE_HEARTBEAT": "x"}, "SSESERVE_HEARTBEAT in the environment must be a number, not 'x'"),
        ({"PORT": "abc"}, "PORT in the environment must be a whole number, not 'abc'"),
        ({"PORT": "70000"}, "PORT in the environment must be a whole number <= 65535, not '70000'"),
        ({"REDIS_PORT": "x"}, "REDIS_PORT in the environment must be a whole number, not 'x'"),
        ({"ENABLE_SSE": "perhaps"}, "ENABLE_SSE in the environment must be true or false, not 'perhaps'"),
        (
            {"SSE_HEARTBEAT_INTERVAL": "-5"},
            "SSE_HEARTBEAT_INTERVAL in the environment must be a number > 0.0, not '-5'",
        ),
        (
            {"SSESERVE_LOG_LEVEL": "loud"},
            "SSESERVE_LOG_LEVEL in the environment must be one of debug, info, warning, error, not 'loud'",
        ),
        ({"SSESERVE_PROT": "1"}, "unknown setting 'prot' in the environment: SSESERVE_PROT"),
    ],
)
def test_message_names_the_variable(environ, message):
    """The name as it is in the environment, what it must be, and the value as it was written."""
    with pytest.raises(ConfigError) as caught:
        load(None, environ)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("allowed_hosts", "https://jobs.example"), ("allowed_hosts", "jobs.example:443"),
        ("allowed_hosts", "jobs.example/"), ("allowed_hosts", "*.jobs.example"), ("allowed_hosts", ""),
        ("cors_origins", "jobs.example"), ("cors_origins", "https://jobs.example/"),
        ("cors_origins", "https://Jobs.example"), ("cors_origins", "https://*.jobs.example"),
        ("cors_origins", ""),
    ],
)  # fmt: skip
def test_hosts_and_origins_that_match_nothing(key, value):
    """What is in neither format would silently refuse the very requests that it is to allow."""
    with pytest.raises(ConfigError, match=f"^{key} among the arguments must be "):
        override(Settings(), {key: [value]})


def test_hosts_and_origins():
    """Names, addresses and ``*``; origins as browsers write them, of applications too."""
    hosts = ["jobs.example", ".jobs.example", "Box", "192.0.2.1", "2001:db8::1", "*"]
    origins = ["https://jobs.example", "http://localhost:3000", "http://[::1]:80", "app://a", "null", "*"]
    settings = override(Settings(), {"allowed_hosts": hosts, "cors_origins": origins})
    assert (settings.allowed_hosts, settings.cors_origins) == (tuple(hosts), tuple(origins))
    environ = {"SSESERVE_CORS_ORIGINS": "https://jobs.example/"}
    with pytest.raises(ConfigError) as caught:
        load(None, environ)
    assert str(caught.value) == (
        "SSESERVE_CORS_ORIGINS in the environment must be origins as browsers send them, such as "
        "https://a.example or http://localhost:3000, or *, not 'https://jobs.example/'"
    )


def test_message_names_the_file(tmp_path):
    """The key, its file, and the value."""
    path = write(tmp_path, "port = 1\ncors_origins = [1]\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert str(caught.value) == f"cors_origins in {path} must be text, not [1]"


@pytest.mark.parametrize("text", ["port = ", b"\xff = 1", "port = 1\nport = 2"])
def test_invalid_toml(tmp_path, text):
    """The message names the file."""
    with pytest.raises(ConfigError, match="is not TOML"):
        load(write(tmp_path, text), {})


def test_unreadable_file(tmp_path):
    """A missing file and a directory."""
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read"):
            load(path, {})


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("https://a.example, https://b.example,", ("https://a.example", "https://b.example")),
        ("https://a.example", ("https://a.example",)),
        ("*", ("*",)),
        ("null", ("null",)),
        ("capacitor://localhost", ("capacitor://localhost",)),
        ("", ()),
    ],
)
def test_list_of_origins(text, origins):
    """Separated by commas, with any scheme."""
    assert load(None, {"SSESERVE_CORS_ORIGINS": text}).cors_origins == origins


def test_comma_in_a_string():
    """Only lists are split: a password may contain a comma."""
    assert load(None, {"SSESERVE_REDIS_PASSWORD": "a,b"}).redis_password == "a,b"


def test_types_in_a_file(tmp_path):
    """Integers for floats, lists, booleans."""
    path = write(tmp_path, 'ttl = 5\ncors_origins = ["*"]\nauto_create = false\nlog_format = "json"\n')
    settings = load(path, {})
    assert (settings.ttl, settings.cors_origins) == (5.0, ("*",))
    assert (settings.auto_create, settings.log_format) == (False, "json")


def test_other_systems_variables():
    """In their own units; an empty value counts as unset, an invalid one is an error."""
    environ = {"SSE_HEARTBEAT_INTERVAL": "30000", "SSE_CONNECTION_TIMEOUT": "3600", "ENABLE_SSE": "False"}
    settings = load(None, environ)
    assert (settings.heartbeat, settings.max_age, settings.enable_sse) == (30.0, 3600.0, False)
    assert settings.idle_timeout == 3600.0
    assert load(None, {"PORT": "", "REDIS_HOST": " "}) == Settings()
    with pytest.raises(ConfigError, match="SSE_HEARTBEAT_INTERVAL in the environment must be a number"):
        load(None, {"SSE_HEARTBEAT_INTERVAL": "soon"})
    with pytest.raises(ConfigError, match="ENABLE_SSE"):
        load(None, {"ENABLE_SSE": "perhaps"})


def test_unrelated_variables_are_ignored():
    """Only SSESERVE_* variables are read, and only in upper case."""
    assert load(None, {"SSESERVER_PORT": "1", "sseserve_port": "1", "HOST": "x"}) == Settings()


SECRET = "hunter2-hunter2-hunter2-hunter2-hunter2"


def test_secrets_are_not_shown():
    """Neither in the representation, nor in that for rich; all other values are."""
    settings = Settings(
        jwt_key=SECRET,
        redis_password=SECRET,
        redis_url=f"redis://user:{SECRET}@with@host:1/2?sentinel_password={SECRET}&db=3",
        engine=f"rediss://:{SECRET}@host",
        issuers=(Issuer(issuer="https://id.example", key=SECRET),),
    )
    for shown in (repr(settings), str(settings), f"{settings}", repr(settings.__rich_repr__())):
        assert "hunter2" not in shown
        assert "redis://***@host:1/2?sentinel_password=***&db=3" in shown
        assert "https://id.example" in shown
        assert "keep_alive" in shown
    assert settings.jwt_key == SECRET
    assert eval(repr(Settings()), {**vars(config)}) == Settings()


@pytest.mark.parametrize(
    "text",
    [
        "jwt_key = 17{}",
        'jwt_key = ["{}"]',
        'redis_password = ["{}"]',
        'redis_url = ["redis://:{}@host"]',
        'engine = ["redis://:{}@host"]',
        'issuers = "{}"',
        '[[issuers]]\nissuer = "a"\nkeys = "{}"',
        '[[issuers]]\nkey = "{}"',
    ],
)
def test_errors_do_not_repeat_secrets(tmp_path, text):
    """A value of the wrong type is named, and not shown."""
    with pytest.raises(ConfigError, match=r"must be|is wrong: |not TOML") as caught:
        load(write(tmp_path, text.format(SECRET)), {})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["SSESERVE_ISSUERS", "SSESERVE_CLAIMS"])
def test_tables_are_not_variables(name):
    """They are of a file; what a variable has may be a secret."""
    with pytest.raises(ConfigError, match=name):
        load(None, {name: "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[issuers]]\nkey = "a"', "issuers in .* is wrong: .*missing required field `issuer`"),
        ('[[issuers]]\nissuer = "a"\nkeys = "b"', "issuers in .* is wrong: .*unknown field `keys`"),
        ('[claims]\nrole = 1', "claims in .* is wrong: Expected `str`"),
        ('[roles.boss]\nevery = ["fire"]', "roles in .* is wrong: Invalid enum value 'fire'"),
    ],
)  # fmt: skip
def test_wrong_tables(tmp_path, text, message):
    """The message says where in the table."""
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text), {})
