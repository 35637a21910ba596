"""Settings: who wins, and what is refused."""

from __future__ import annotations

import pytest

from sseserve.config import Settings, load
from sseserve.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "sseserve.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_nothing_given_is_the_defaults():
    """No file, no variables, no flags."""
    assert load(environ={}) == Settings()


def test_each_source_is_stronger_than_the_one_before(tmp_path):
    """Defaults < file < other systems' variables < our variables < flags."""
    path = write(tmp_path, "port = 1\nttl = 1.0\ndrain = 1\nkeep_alive = 1.0\n")
    environ = {"PORT": "2", "SSESERVE_PORT": "3", "SSESERVE_TTL": "3", "SSESERVE_DRAIN": "3"}
    settings = load(path, environ, {"port": 4, "ttl": 4.0})
    assert (settings.port, settings.ttl, settings.drain, settings.keep_alive) == (4, 4.0, 3.0, 1.0)
    assert load(path, {"PORT": "2"}).port == 2
    assert load(path, {"PORT": "2", "SSESERVE_PORT": "3"}).port == 3


def test_a_flag_that_is_not_given_is_none():
    """None leaves a setting as it is; False is given."""
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
def test_an_unknown_key_is_an_error_wherever_it_stands(tmp_path, file, environ, flags, where):
    """And the message says where that is."""
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
def test_a_value_out_of_range_is_an_error(key, value):
    """Of the wrong kind, too; the message names key and source, even if a flag would overrule it."""
    with pytest.raises(ConfigError, match=rf"in the environment.*\$\.{key}"):
        load(None, {f"SSESERVE_{key.upper()}": value}, {"port": 1} if key == "port" else None)


@pytest.mark.parametrize("text", ["port = ", b"\xff = 1", "port = 1\nport = 2"])
def test_a_file_that_is_not_toml(tmp_path, text):
    """Says so, and which file."""
    with pytest.raises(ConfigError, match="is not TOML"):
        load(write(tmp_path, text), {})


def test_a_file_that_cannot_be_read(tmp_path):
    """Whether it is missing or a directory."""
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
def test_origins_are_a_list(text, origins):
    """Separated by commas, of any scheme."""
    assert load(None, {"SSESERVE_CORS_ORIGINS": text}).cors_origins == origins


def test_a_comma_is_no_list_elsewhere():
    """A password may have one."""
    assert load(None, {"SSESERVE_REDIS_PASSWORD": "a,b"}).redis_password == "a,b"


def test_kinds_of_values_in_a_file(tmp_path):
    """Whole numbers where fractions may stand, lists, booleans."""
    path = write(tmp_path, 'ttl = 5\ncors_origins = ["*"]\nauto_create = false\nlog_format = "json"\n')
    settings = load(path, {})
    assert (settings.ttl, settings.cors_origins) == (5.0, ("*",))
    assert (settings.auto_create, settings.log_format) == (False, "json")


def test_other_systems_names():
    """In their own units; one that is set to nothing is not set, one that is no number is an error."""
    environ = {"SSE_HEARTBEAT_INTERVAL": "30000", "SSE_CONNECTION_TIMEOUT": "3600", "ENABLE_SSE": "False"}
    settings = load(None, environ)
    assert (settings.heartbeat, settings.max_age, settings.enable_sse) == (30.0, 3600.0, False)
    assert load(None, {"PORT": "", "REDIS_HOST": " "}) == Settings()
    with pytest.raises(ConfigError, match="SSE_HEARTBEAT_INTERVAL must be a number"):
        load(None, {"SSE_HEARTBEAT_INTERVAL": "soon"})
    with pytest.raises(ConfigError, match="ENABLE_SSE"):
        load(None, {"ENABLE_SSE": "perhaps"})


def test_variables_of_others_are_none_of_ours():
    """Only SSESERVE_* is ours, in capitals."""
    assert load(None, {"SSESERVER_PORT": "1", "sseserve_port": "1", "HOST": "x"}) == Settings()
