"""What is said of each setting, and what differs between two configurations."""

from __future__ import annotations

import msgspec
import pytest

from sseserve.config import Claims, Issuer, Role, Settings, changes
from sseserve.config.about import descriptions

SECRET = "hunter2-hunter2-hunter2-hunter2-hunter2"


@pytest.mark.parametrize("kind", [Settings, Issuer, Claims, Role])
def test_every_setting_is_described(kind):
    """Each has a sentence that says what it is, and one that says why; neither has its full stop."""
    described = descriptions(kind)
    assert tuple(described) == kind.__struct_fields__
    for name, about in described.items():
        assert about.text, name
        assert about.reason, name
        assert about.text[0].isupper(), name
        assert not about.text.endswith("."), name
        assert not about.reason.endswith("."), name


@pytest.mark.parametrize("kind", [Settings, Issuer, Claims, Role])
def test_what_unset_means(kind):
    """Each setting that may be None says what that means, and no other one does."""
    for field in msgspec.inspect.type_info(kind).fields:
        types = getattr(field.type, "types", (field.type,))
        may_be_none = any(isinstance(one, msgspec.inspect.NoneType) for one in types)
        assert may_be_none == (descriptions(kind)[field.name].unset is not None), field.name


def test_units():
    """Each number has a unit, but for ports; what has no number has none."""
    for field in msgspec.inspect.type_info(Settings).fields:
        types = getattr(field.type, "types", (field.type,))
        is_number = any(
            isinstance(one, msgspec.inspect.IntType | msgspec.inspect.FloatType) for one in types
        ) and field.name not in ("port", "redis_port")
        assert is_number == (descriptions(Settings)[field.name].unit is not None), field.name


def test_changes():
    """What a running server can take, and what needs a restart, in the order of the settings."""
    old = Settings(cors_origins=("https://a.example",))
    new = Settings(port=9, log_level="debug", connect_rate=None, drain=8.0)
    reloadable, restart = changes(old, new)
    assert list(map(str, reloadable)) == [
        "log_level: 'info' -> 'debug'",
        "cors_origins: ('https://a.example',) -> ()",
        "connect_rate: 100.0 -> None",
    ]
    assert list(map(str, restart)) == ["port: 8000 -> 9", "drain: 4.0 -> 8.0"]
    assert changes(old, old) == ([], [])


def test_changes_hide_secrets():
    """It is said that a secret differs, and nothing of it."""
    old = Settings(jwt_key=SECRET, issuers=(Issuer(issuer="a", key=SECRET),), engine="memory:")
    new = Settings(
        jwt_key=SECRET + "2",
        issuers=(Issuer(issuer="a", key=SECRET + "2"),),
        engine=f"redis://:{SECRET}@host",
        redis_password=SECRET,
    )
    reloadable, restart = changes(old, new)
    said = [*map(str, reloadable), *map(str, restart)]
    assert [text.partition(":")[0] for text in said] == ["jwt_key", "issuers", "engine", "redis_password"]
    assert said[0] == "jwt_key: another value"
    assert said[1] == "issuers: another value"
    assert said[2] == "engine: 'memory:' -> 'redis://***@host'"
    assert said[3] == "redis_password: None -> '***'"
    assert "hunter2" not in "".join(said) + repr(reloadable) + repr(restart)


@pytest.mark.parametrize(
    "name",
    [
        "log_level", "cors_origins", "allowed_hosts", "jwt_key", "jwks_url", "jwt_issuer", "jwt_audience",
        "issuers", "claims", "roles", "max_streams_per_user", "connect_rate", "publish_rate",
        "max_connections",
    ],
)  # fmt: skip
def test_what_reloads(name):
    """Keys and who they belong to, limits and rates, hosts and origins, the log level."""
    assert descriptions(Settings)[name].reloads
