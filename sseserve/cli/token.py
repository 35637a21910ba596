"""The command ``token``, which makes tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from .common import USAGE, config_option, fail, load_settings

__all__ = ["token"]

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(_ctx: click.Context, _option: click.Parameter, text: str) -> int:
    """Read a time such as ``15m``."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a time such as 30s, 15m, 1h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def _capability(right: str, what: str) -> Callable[[F], F]:
    return click.option(
        f"--{right}",
        metavar="GLOB",
        multiple=True,
        help=f"Ids of sessions to {what}; repeatable. [default: none]",
    )


@click.command()
@click.option("--subject", metavar="S", required=True, help="Whose token it is.")
@click.option(
    "--role", metavar="R", help="A role of the settings: patient, therapist, service, admin. [default: none]"
)
@click.option(
    "--patients",
    metavar="P",
    multiple=True,
    help="A subject assigned to a therapist; repeatable. [default: none]",
)
@_capability("watch", "watch, such as job-*")
@_capability("publish", "publish to")
@_capability("control", "pause and cancel")
@_capability("create", "create")
@click.option(
    "--ttl",
    metavar="TIME",
    callback=_seconds,
    default="1h",
    show_default=True,
    help="How long it is valid: 30s, 15m, 1h, 7d.",
)
@click.option("--issuer", help="Its claim iss. [default: jwt_issuer]")
@click.option("--audience", help="Its claim aud. [default: jwt_audience]")
@click.option(
    "--key",
    metavar="SECRET|file:PATH",
    help="Signs it: a secret, or a file with a secret or a private key in PEM. [default: jwt_key, "
    "SSESERVE_JWT_KEY]",
)
@config_option
def token(
    subject: str,
    role: str | None,
    patients: tuple[str, ...],
    *,
    ttl: int,
    issuer: str | None,
    audience: str | None,
    key: str | None,
    config: str | None,
    **capabilities: tuple[str, ...],
) -> None:
    """Print a token, for the header Authorization: Bearer, or for SSESERVE_TOKEN.

    It is made with the settings of the server that is to accept it. Other users of this machine can see
    options: give the secret in SSESERVE_JWT_KEY or in a file.

    \b
    Exit status:
      0    printed
      2    usage error, invalid setting, or a key that cannot sign
    """
    from ..errors import ConfigError, InvalidToken

    settings = load_settings(config, {})
    if role is not None and role not in settings.roles:
        raise click.BadParameter(
            f"{role!r} is not a role: there are {', '.join(settings.roles)}", param_hint="--role"
        )
    try:
        try:
            from ..auth.signing import make_token
        except ImportError:
            raise ConfigError("tokens need PyJWT and cryptography: pip install 'sseserve[auth]'") from None
        text = make_token(
            settings,
            now=time.time(),
            lifetime=ttl,
            subject=subject,
            role=role,
            patients=patients,
            capabilities=capabilities,
            issuer=issuer,
            audience=audience,
            key=key,
        )
    except ConfigError as error:
        fail(str(error), USAGE)
    except InvalidToken as error:
        fail(f"the server would refuse it: {error}", USAGE)
    click.echo(text)
