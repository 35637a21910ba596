"""Settings: the precedence of their sources, and the values that are rejected."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseserve import config
from sseserve.config import Issuer, Settings, load, override, service_variables
from sseserve.config.toml import key_lines, line_of
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
        ("", {"SSESERVE_PROT": "1"}, {}, "'SSESERVE_PROT' in the environment"),
        ("", {}, {"prot": 1}, "'prot' among the flags"),
        ("[server]\nport = 1", {}, {}, "'server' in .*toml, line 1: sseserve config template lists all"),
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
        (
            {"SSESERVE_TTL": "abc"},
            "SSESERVE_TTL in the environment must be a number greater than 0, not 'abc'",
        ),
        ({"SSESERVE_TTL": "-1"}, "SSESERVE_TTL in the environment must be a number greater than 0, not '-1'"),
        (
            {"SSESERVE_HEARTBEAT": "x"},
            "SSESERVE_HEARTBEAT in the environment must be a number greater than 0 or 'unset', not 'x'",
        ),
        ({"PORT": "abc"}, "PORT in the environment must be a whole number from 0 to 65535, not 'abc'"),
        ({"PORT": "70000"}, "PORT in the environment must be a whole number from 0 to 65535, not '70000'"),
        (
            {"REDIS_PORT": "x"},
            "REDIS_PORT in the environment must be a whole number from 1 to 65535, not 'x'",
        ),
        ({"ENABLE_SSE": "perhaps"}, "ENABLE_SSE in the environment must be true or false, not 'perhaps'"),
        (
            {"SSE_HEARTBEAT_INTERVAL": "-5"},
            "SSE_HEARTBEAT_INTERVAL in the environment must be a number greater than 0 or 'unset', not '-5'",
        ),
        (
            {"SSESERVE_LOG_LEVEL": "loud"},
            "SSESERVE_LOG_LEVEL in the environment must be one of debug, info, warning, error, not 'loud'",
        ),
        (
            {"SSESERVE_PROT": "1"},
            "unknown setting 'SSESERVE_PROT' in the environment: did you mean 'SSESERVE_PORT'?",
        ),
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
    assert str(caught.value) == f"cors_origins in {path}, line 2, must be a list of strings, not [1]"


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
    with pytest.raises(ConfigError) as caught:
        load(None, {"SSE_CONNECTION_TIMEOUT": "soon"})
    assert str(caught.value).count("SSE_CONNECTION_TIMEOUT") == 1
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
        jwks_url=f"https://user:{SECRET}@id.example/jwks",
        pubsub_jwks_url=f"https://id.example/push?key={SECRET}",
        issuers=(
            Issuer(issuer="https://id.example", key=SECRET),
            Issuer(issuer="b", jwks_url=f"https://id.example/jwks?a=b&key={SECRET}"),
        ),
    )
    for shown in (repr(settings), str(settings), f"{settings}", repr(settings.__rich_repr__())):
        assert "hunter2" not in shown
        assert "redis://***@host:1/2?sentinel_password=***&db=3" in shown
        assert "https://***@id.example/jwks'" in shown
        assert "https://id.example/jwks?***" in shown
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
    with pytest.raises(ConfigError, match=r"must be|unknown setting|needs issuer|not TOML") as caught:
        load(write(tmp_path, text.format(SECRET)), {})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["issuers", "claims", "roles"])
def test_tables_are_not_variables(key):
    """They are of a file; what a variable has may be a secret."""
    name = f"SSESERVE_{key.upper()}"
    with pytest.raises(ConfigError) as caught:
        load(None, {name: SECRET})
    message = f"{name} in the environment: {key} are tables, which only a file has (SSESERVE_CONFIG)"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[issuers]]\nkey = "a"', "issuers[0] in FILE, line 1, needs issuer"),
        (
            '[[issuers]]\nissuer = "a"\n\n[[issuers]]\nissuer = "b"\nkeys = "b"',
            "unknown setting 'issuers[1].keys' in FILE, line 6: did you mean 'issuers[1].key'?",
        ),
        ("issuers = 3", "issuers in FILE, line 1, must be tables"),
        ("issuers = [3]", "issuers[0] in FILE, line 1, must be a table"),
        ("[claims]\nrole = 1", "claims.role in FILE, line 2, must be a string, not 1"),
        (
            "[claims]\nfoo = 1",
            "unknown setting 'claims.foo' in FILE, line 2: there are subject, role, patients, capabilities",
        ),
        (
            "[claims]\nttl = 1",
            "unknown setting 'claims.ttl' in FILE, line 2: 'ttl' must stand above the first table",
        ),
        (
            '[roles.boss]\nevery = ["fire"]',
            (
                "roles.boss.every in FILE, line 2, must be a list of control, create, delete, publish, "
                "revoke, watch, not ['fire']"
            ),
        ),
        (
            '[roles]\nboss = {evry = ["watch"]}',
            "unknown setting 'roles.boss.evry' in FILE, line 2: did you mean 'roles.boss.every'?",
        ),
        ("[claim]\nrole = 1", "unknown setting 'claim' in FILE, line 1: did you mean 'claims'?"),
    ],
)
def test_wrong_tables(tmp_path, text, message):
    """The message says where in the table, and on which line."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert str(caught.value) == message.replace("FILE", str(path))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("heartbeet", "heartbeat"), ("log-level", "log_level"), ("LOG_LEVEL", "log_level"), ("prot", "port"),
        ("max_stream", "max_streams"), ("cors_origin", "cors_origins"), ("jwt_keys", "jwt_key"),
    ],
)  # fmt: skip
def test_the_nearest_name(tmp_path, key, meant):
    """It is named for an unknown one, in a file, in the environment, among flags and arguments."""
    path = write(tmp_path, f"# The file.\n\n{key} = 1\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert str(caught.value) == f"unknown setting {key!r} in {path}, line 3: did you mean {meant!r}?"
    variable = f"SSESERVE_{key.upper()}"
    if variable != f"SSESERVE_{meant.upper()}":
        with pytest.raises(ConfigError, match=rf"{variable}' .* did you mean 'SSESERVE_{meant.upper()}'\?$"):
            load(None, {variable: "1"})
    with pytest.raises(ConfigError, match=rf"among the flags: did you mean '{meant}'\?$"):
        load(None, {}, {key: 1})
    with pytest.raises(ConfigError, match=rf"among the arguments: did you mean '{meant}'\?$"):
        override(Settings(), {key: 1})


def test_all_that_is_wrong(tmp_path):
    """Each problem of every source has a line of the message."""
    path = write(tmp_path, 'heartbeet = 5\nport = "x"\n[[issuers]]\nkeys = 1\n[claims]\nrole = 2\n')
    with pytest.raises(ConfigError) as caught:
        load(path, {"SSESERVE_TTL": "x", "SSESERVE_PROT": "1", "PORT": "1"}, {"drain": 0})
    lines = str(caught.value).splitlines()
    assert [line.removeprefix("unknown setting ").split(" ")[0].strip("'") for line in lines] == [
        "heartbeet", "port", "issuers[0].keys", "issuers[0]", "claims.role", "SSESERVE_TTL", "SSESERVE_PROT",
        "drain",
    ]  # fmt: skip


def test_unset(tmp_path):
    """It stands for None, where a setting may be None, in a file, a table and the environment."""
    text = 'max_streams = 5\nmax_streams_per_user = "unset"\njwt_key = "unset"\n'
    text += '[[issuers]]\nissuer = "a"\nroles = "unset"'
    settings = load(
        write(tmp_path, text), {"SSESERVE_MAX_STREAMS": "unset", "SSESERVE_CONNECT_RATE": " unset"}
    )
    assert (settings.max_streams, settings.max_streams_per_user) == (None, None)
    assert (settings.connect_rate, settings.jwt_key, settings.issuers[0].roles) == (None, None, None)
    assert load(None, {"SSESERVE_HOST": "unset"}).host == "unset"
    path = write(tmp_path, 'redis_channels = ["sessions"]')
    assert load(path, {"SSESERVE_REDIS_CHANNELS": "unset"}).redis_channels is None
    with pytest.raises(ConfigError, match=r"CORS_ORIGINS .* must be a list of strings"):
        load(None, {"SSESERVE_CORS_ORIGINS": "unset"})
    with pytest.raises(ConfigError, match="PORT"):
        load(None, {"SSESERVE_PORT": "unset"})
    with pytest.raises(ConfigError, match="or None, not 'unset'"):
        override(Settings(), {"max_streams": "unset"})


def test_file_of_the_environment(tmp_path):
    """SSESERVE_CONFIG names the file, unless there is an argument; an empty one names none."""
    path, other = write(tmp_path, "port = 1"), tmp_path / "other.toml"
    other.write_text("port = 2")
    assert load(None, {"SSESERVE_CONFIG": str(path)}).port == 1
    assert load(other, {"SSESERVE_CONFIG": str(path)}).port == 2
    assert load(None, {"SSESERVE_CONFIG": ""}) == Settings()
    with pytest.raises(ConfigError, match="cannot read"):
        load(None, {"SSESERVE_CONFIG": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match=r"SSESERVE_CONFG' .* did you mean 'SSESERVE_CONFIG'"):
        load(None, {"SSESERVE_CONFG": str(path)})


def test_spaces_and_empty_variables():
    """Spaces around a value are no part of it, but of a secret; an empty variable is not set."""
    environ = {
        "PORT": " 81 ",
        "SSESERVE_TTL": " 5\n",
        "SSESERVE_LOG_LEVEL": "debug ",
        "SSESERVE_JWT_KEY": " k ",
    }
    settings = load(None, environ)
    assert (settings.port, settings.ttl, settings.log_level, settings.jwt_key) == (81, 5.0, "debug", " k ")
    names = set(Settings.__struct_fields__) - {"jwt_key", "jwks_url", "jwt_issuer", "redis_channels"}
    names -= {"claims", "issuers", "roles"}
    assert load(None, {f"SSESERVE_{name.upper()}": "" for name in names}) == Settings()
    assert load(None, {"SSESERVE_REDIS_CHANNELS": ""}).redis_channels == ()


@pytest.mark.parametrize("name", ["JWT_KEY", "JWKS_URL", "JWT_ISSUER"])
def test_empty_keys(name):
    """A key that is missing must not open the server to everybody."""
    with pytest.raises(ConfigError, match=f"^SSESERVE_{name} in the environment is empty: give it a value"):
        load(None, {f"SSESERVE_{name}": " "})


def service_variables_of(name, *ports, address="10.0.0.11"):
    """Return what Kubernetes sets for a Service (its documentation, "Environment variables").

    Args:
        name: of the Service.
        ports: the number, the protocol and the name of each; the name may be empty.
        address: of the cluster.
    """
    prefix = name.upper().replace("-", "_")
    host = f"[{address}]" if ":" in address else address
    number, protocol, _ = ports[0]
    variables = {
        f"{prefix}_SERVICE_HOST": address,
        f"{prefix}_SERVICE_PORT": str(number),
        f"{prefix}_PORT": f"{protocol}://{host}:{number}",
    }
    for number, protocol, port_name in ports:
        if port_name:
            variables[f"{prefix}_SERVICE_PORT_{port_name.upper().replace('-', '_')}"] = str(number)
        port = f"{prefix}_PORT_{number}_{protocol.upper()}"
        variables[port] = f"{protocol}://{host}:{number}"
        variables |= {f"{port}_PROTO": protocol, f"{port}_PORT": str(number), f"{port}_ADDR": address}
    return variables


SERVICES = [
    service_variables_of("sseserve", (80, "tcp", "")),
    service_variables_of("sseserve", (80, "tcp", "http"), (9090, "tcp", "metrics-port"), (443, "udp", "h3")),
    service_variables_of("sseserve", (80, "tcp", "http"), address="fd00::1"),
    {"SSESERVE_PORT": "tcp://fd00::1:80"},  # as old versions of Kubernetes write it
    service_variables_of("redis", (6379, "tcp", "")),
    service_variables_of("redis", (6379, "tcp", "redis"), (26379, "tcp", "sentinel")),
    service_variables_of("sseserve-redis", (6379, "tcp", "redis")),
    service_variables_of("sseserve-web", (80, "sctp", "x")),
]


@pytest.mark.parametrize("variables", SERVICES)
def test_variables_of_services_are_not_read(variables):
    """Those of Kubernetes Services are no settings, whatever the Service and its ports are called."""
    assert load(None, variables) == Settings()
    own = {"SSESERVE_TTL": "5", "REDIS_HOST": "redis"}
    settings = load(None, variables | own)
    assert (settings.ttl, settings.redis_host, settings.redis_port) == (5.0, "redis", 6379)
    look_like_settings = {name for name in variables if name.startswith("SSESERVE_") or name == "REDIS_PORT"}
    assert service_variables(variables | own) == sorted(look_like_settings)
    with pytest.raises(ConfigError, match="SSESERVE_HEARTBEET"):
        load(None, {**variables, "SSESERVE_HEARTBEET": "1"})


@pytest.mark.parametrize(
    "variables",
    [
        {"SSESERVE_PORT": "http://a:80"}, {"SSESERVE_PORT": "10.0.0.1:80"}, {"PORT": "tcp://10.0.0.1:80"},
        {"REDIS_PORT": "redis"}, {"SSESERVE_HOST_SERVICE": "a"}, {"SSESERVE_PORT_80": "1"},
    ],
)  # fmt: skip
def test_similar_variables_are_errors(variables):
    """What Kubernetes does not set is somebody's mistake."""
    with pytest.raises(ConfigError):
        load(None, variables)
    assert service_variables(variables) == []


def test_lines_of_keys():
    """Each key and table has the line where it begins, also in strings and arrays of several lines."""
    text = """# A file.
a = 1

b = [
  "x",  # [c]
  "y",
]
c = \'\'\'
[d]
e = 1
\'\'\'\r
[t]
d.e = 2

[[s]]
f = 1
g = 1

[[s]]
  f = {h = 1, i = 2}
"""
    lines = key_lines(text)
    assert {path: line for path, line in lines.items() if path[0] != "b"} == {
        ("a",): 2, ("c",): 8, ("t",): 12, ("t", "d"): 13, ("t", "d", "e"): 13, ("s",): 15, ("s", 0): 15,
        ("s", 0, "f"): 16, ("s", 0, "g"): 17, ("s", 1): 19, ("s", 1, "f"): 20, ("s", 1, "f", "h"): 20,
        ("s", 1, "f", "i"): 20,
    }  # fmt: skip
    assert [line_of(path, lines) for path in (("b", 1), ("s", 1, "x"), ("x",))] == [4, 19, None]


_NAMES = st.one_of(st.sampled_from(Settings.__struct_fields__), st.text(max_size=8))
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("unset")),
    lambda value: st.one_of(
        st.lists(value, max_size=3),
        st.dictionaries(st.sampled_from(["issuer", "key", "roles", "every", "role", "x"]), value, max_size=3),
    ),
    max_leaves=6,
)


@given(fields=st.dictionaries(_NAMES, _VALUES, max_size=4))
def test_any_values(fields):
    """Whatever the values are, there are settings or a ConfigError, and never anything else."""
    with contextlib.suppress(ConfigError):
        assert isinstance(override(Settings(), fields), Settings)
    with contextlib.suppress(ConfigError):
        assert isinstance(load(None, {}, fields), Settings)


@given(variables=st.dictionaries(_NAMES.map(lambda name: f"SSESERVE_{name.upper()}"), st.text(max_size=8)))
def test_any_variables(variables):
    """Likewise."""
    variables.pop("SSESERVE_CONFIG", None)
    with contextlib.suppress(ConfigError):
        assert isinstance(load(None, variables), Settings)
