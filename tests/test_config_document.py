"""Settings as a document: the template, those in use, and the commands that print them."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from click.testing import CliRunner

from sseserve.cli import main
from sseserve.config import Claims, Issuer, Role, Settings, load
from sseserve.config.about import descriptions
from sseserve.config.document import show, template

SECRET = "hunter2-hunter2-hunter2-hunter2-hunter2"


def invoke(*args, **environ):
    return CliRunner().invoke(main, ["config", *map(str, args)], env=environ)


def load_text(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return load(path, {})


# The template


def test_template_has_all_defaults(tmp_path):
    """As it is, it changes nothing; without the marks of its comments each setting has its default."""
    text = template()
    assert tomllib.loads(text) == {}
    uncommented = re.sub(r"^#(?=[\w\[])", "", text, flags=re.MULTILINE)
    tables = tomllib.loads(uncommented)
    assert set(tables) == set(Settings.__struct_fields__) - {"issuers"}
    assert load_text(tmp_path, uncommented) == Settings()


def test_template_describes_each_setting():
    """The comment above each has its description, its unit, its reason, and what no value means."""
    paragraphs = re.split(r"\n\s*\n", template())
    comments = {}
    for paragraph in paragraphs:
        if match := re.search(
            r"^#(\w+) = |^#\[(?:roles\.)?(\w+)\]|^#     \[\[(\w+)\]\]", paragraph, re.MULTILINE
        ):
            prose = " ".join(re.findall(r"^# (.+)$", paragraph[: match.start()], re.MULTILINE))
            comments[match[1] or match[2] or match[3]] = prose
    comments["roles"] = comments.pop("patient")
    for name, about in descriptions(Settings).items():
        comment = comments[name].lower()
        assert comment.startswith(about.text.lower()), name
        assert about.reason.lower() in comment, name
        assert about.unit is None or f"({about.unit})" in comment, name
        assert about.unset is None or f'"unset": {about.unset}'.lower() in comment, name
        assert ("[reloads]" in comment) == about.reloads, name


def test_template_names_choices_and_other_variables():
    """What a setting may be, where it is one of a few words, and its names in other systems."""
    text = template().replace("\n# ", " ")
    assert "One of debug, info, warning, error." in text
    assert "In the environment also SSE_HEARTBEAT_INTERVAL." in text
    assert max(map(len, template().splitlines())) <= 110


def test_example_of_an_issuer(tmp_path):
    """It is an issuer."""
    example = "\n".join(re.findall(r"^#     (.+)$", template(), re.MULTILINE))
    [issuer] = load_text(tmp_path, example).issuers
    assert issuer == Issuer(issuer="https://id.example", jwks_url="https://id.example/jwks.json")
    assert set(tomllib.loads(example)["issuers"][0]) == set(Issuer.__struct_fields__)


# Those in use


def test_what_is_shown_can_be_loaded(tmp_path):
    """It is the same settings, whatever they are."""
    settings = Settings(
        host='a"\\\x7f\n\u2028é',
        ttl=0.1,
        max_log_bytes=2**40,
        connect_rate=None,
        heartbeat=15.0,
        auto_create=False,
        cors_origins=("https://a.example", "*"),
        redis_channels=(),
        claims=Claims(role='ro"le'),
        roles={"a.b c": Role(every=frozenset({"watch"})), "d": Role()},
        issuers=(Issuer(issuer="a", roles=("d",)), Issuer(issuer="b", capabilities=True)),
    )
    assert load_text(tmp_path, show(settings, {})) == settings
    assert load_text(tmp_path, show(Settings(), {})) == Settings()


def test_what_is_not_set_is_a_comment(tmp_path):
    """It says what that means; a value that was taken away is said as such."""
    settings = Settings(connect_rate=None, issuers=(Issuer(issuer="a"),))
    lines = show(settings, {"connect_rate": "SSESERVE_CONNECT_RATE"}).splitlines()
    for line in (
        "# tls_cert: not set (no TLS)  # default",
        "# jwt_key: not set (no key)  # default",
        "# audience: not set (its tokens must have no audience)",
        'connect_rate = "unset"  # SSESERVE_CONNECT_RATE',
    ):
        assert line in lines
    assert load_text(tmp_path, "\n".join(lines)) == settings
    assert "unset" not in show(Settings(), {})


def test_output_is_a_file(tmp_path):
    """What the command prints is read by it as the same settings."""
    path = tmp_path / "shown.toml"
    first = invoke(
        "show", "--port", 7, SSESERVE_CONNECT_RATE="unset", SSESERVE_CORS_ORIGINS="*", REDIS_HOST="a"
    )
    path.write_text(first.stdout)
    second = invoke("show", "--config", path, "--json")
    assert second.exit_code == 0, second.stderr
    third = invoke(
        "show",
        "--json",
        "--port",
        7,
        SSESERVE_CONNECT_RATE="unset",
        SSESERVE_CORS_ORIGINS="*",
        REDIS_HOST="a",
    )
    values = [
        {name: one["value"] for name, one in json.loads(result.stdout).items()} for result in (second, third)
    ]
    assert values[0] == values[1]


def test_shown_without_secrets():
    """As TOML and as JSON."""
    environ = {
        "SSESERVE_JWT_KEY": SECRET,
        "REDIS_PASSWORD": SECRET,
        "SSESERVE_ENGINE": f"redis://:{SECRET}@host/1",
        "SSESERVE_PUBSUB_JWKS_URL": f"https://id.example/jwks?key={SECRET}",
    }
    for args in (["show"], ["show", "--json"]):
        result = invoke(*args, **environ)
        assert result.exit_code == 0
        assert "hunter2" not in result.output
        assert "redis://***@host/1" in result.output
    text = show(Settings(issuers=(Issuer(issuer="a", key=SECRET),)), {})
    assert "hunter2" not in text
    assert 'key = "***"' in text


def test_sources(tmp_path):
    """Each setting has the source that has won."""
    path = tmp_path / "a.toml"
    path.write_text(
        "# A file.\nttl = 5\ndrain = 6\nport = 7\n[claims]\nrole = 'r'\n[[issuers]]\nissuer = 'a'\n"
    )
    environ = {"SSESERVE_DRAIN": "8", "PORT": "9", "SSE_CONNECTION_TIMEOUT": "60"}
    result = invoke("show", "--config", path, "--port", 10, "--insecure", **environ)
    assert result.exit_code == 0, result.output
    for line in (
        f"ttl = 5  # {path}, line 2",
        "drain = 8  # SSESERVE_DRAIN",
        "port = 10  # --port",
        "insecure = true  # --insecure",
        "max_age = 60  # SSE_CONNECTION_TIMEOUT",
        "idle_timeout = 60  # SSE_CONNECTION_TIMEOUT",
        'host = "127.0.0.1"  # default',
        f"[claims]  # {path}, line 5",
        f"[[issuers]]  # {path}, line 7",
        "[roles.admin]  # default",
    ):
        assert line in result.stdout.splitlines()
    shown = json.loads(invoke("show", "--json", SSESERVE_CONFIG=str(path), **environ).stdout)
    assert list(shown) == list(Settings.__struct_fields__)
    assert shown["ttl"] == {"value": 5.0, "source": f"{path}, line 2"}
    assert shown["port"] == {"value": 9, "source": "PORT"}
    assert shown["jwt_key"] == {"value": None, "source": "default"}
    assert shown["issuers"]["value"][0]["issuer"] == "a"
    assert shown["roles"]["value"]["therapist"]["assigned"] == ["control", "watch"]


def test_wrong_settings_are_not_shown(tmp_path):
    """All that is wrong is on standard error, and the exit status is 2."""
    path = tmp_path / "a.toml"
    path.write_text("tttl = 5\n")
    result = invoke("show", "--config", path, SSESERVE_PORT="x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 2
    path.write_text("ttl =")
    result = invoke("show", "--config", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not TOML" in result.stderr


@pytest.mark.parametrize("command", ["show", "template"])
def test_help(command):
    """Each command has one; ``show`` has the options of ``serve``."""
    result = invoke(command, "--help")
    assert result.exit_code == 0
    from sseserve.cli.server import serve

    if command == "show":
        for option in serve.params:
            assert option.opts[0] in result.stdout
        assert "--json" not in CliRunner().invoke(main, ["serve", "--help"]).stdout


def test_template_command():
    """It prints the template, whatever the environment is."""
    result = invoke("template", SSESERVE_PORT="x")
    assert (result.exit_code, result.stdout) == (0, template())
