"""Finds what ``serve`` would refuse, without starting: nothing is listened on, connected to, or changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import trio

from ..auth import open_authenticator, open_push_authenticator
from ..concurrency import raise_single_error
from ..config import Issuer, Settings
from ..engines import EngineListener, open_engine
from ..errors import ConfigError
from ..http.origins import is_loopback
from ..http.proxies import TrustedProxies
from ..http.routes import ROUTES
from .application import Application, wanted_channels
from .sockets import listening_hosts
from .tls import open_certificates
from .workers import check_shared

__all__ = ["Refusal", "check_access", "find_refusals"]

log = logging.getLogger(__name__)


def check_access(settings: Settings, hosts: Sequence[str], *, is_open: bool = True) -> None:
    """Raise ConfigError if everybody on other machines could do everything, unless that is wanted.

    Args:
        settings: of the server.
        hosts: that it listens on.
        is_open: everybody may do everything unless the settings have a key.
    """
    exposed = [host for host in hosts if not is_loopback(host.lower())]
    if not is_open or settings.has_token_keys or not exposed:
        return
    what = f"without authentication everybody who can reach {exposed[0]!r} may do everything"
    if not settings.insecure:
        raise ConfigError(
            f"{what}: set jwt_key (SSESERVE_JWT_KEY), jwks_url or issuers, listen on 127.0.0.1, "
            "or allow it with insecure = true (--insecure, SSESERVE_INSECURE)"
        )
    log.warning("%s (setting insecure)", what)


class Refusal(msgspec.Struct, frozen=True):
    """Why ``serve`` would refuse settings.

    Args:
        names: of the settings that it is about, the most telling first.
        text: says what is wrong.
    """

    names: tuple[str, ...]
    text: str


def find_refusals(settings: Settings) -> list[Refusal]:
    """Return all that ``serve`` would refuse in settings that are valid one by one."""
    found: dict[str, Refusal] = {}
    for names, check in _checks(settings):
        try:
            check()
        except ConfigError as error:
            found.setdefault(str(error), Refusal(names, str(error)))
    if not found:
        # Whatever else there may be: all parts of a server are built, and none is run.
        try:
            trio.run(_build, settings)
        except ConfigError as error:
            return [Refusal((), str(error))]
    return list(found.values())


async def _build(settings: Settings) -> None:
    with raise_single_error():
        async with trio.open_nursery() as nursery:
            Application(settings, nursery)
            nursery.cancel_scope.cancel()


def _checks(settings: Settings) -> list[tuple[tuple[str, ...], Callable[[], object]]]:
    """Return what may be wrong with settings together, or with what they name; each with their names."""
    alone = [_with_one_issuer(settings, issuer) for issuer in settings.issuers]
    return [
        (
            ("host", "insecure", *_KEYS, "issuers"),
            partial(check_access, settings, listening_hosts(settings, ())),
        ),
        (("tls_cert", "tls_key"), partial(open_certificates, settings.tls_cert, settings.tls_key)),
        (
            ("proxy_header", "trusted_proxies"),
            partial(TrustedProxies, settings.trusted_proxies, settings.proxy_header),
        ),
        (_KEYS, partial(open_authenticator, msgspec.structs.replace(settings, issuers=()))),
        *((("issuers", "roles"), partial(open_authenticator, one)) for one in alone),
        (("issuers", *_KEYS), partial(open_authenticator, settings)),
        (
            ("pubsub_audience", "pubsub_email", "pubsub_jwks_url", *_KEYS, "issuers"),
            partial(open_push_authenticator, settings, is_open=not settings.has_token_keys),
        ),
        (_ENGINE, partial(_check_engine, settings)),
        (("workers", *_ENGINE), partial(_check_workers, settings)),
        (("redis_channels", "redis_publish", *_ENGINE), partial(wanted_channels, settings, ROUTES)),
    ]


_KEYS = ("jwt_key", "jwks_url", "jwt_issuer", "jwt_audience")
_ENGINE = ("engine", "redis_url", "redis_host", "redis_port", "redis_password")


def _with_one_issuer(settings: Settings, issuer: Issuer) -> Settings:
    return msgspec.structs.replace(settings, **dict.fromkeys(_KEYS), issuers=(issuer,))


def _check_engine(settings: Settings) -> None:
    open_engine(settings, EngineListener())
    if settings.engine_url.startswith("sqlite:"):
        from ..engines.sqlite.file import check_file, path_of

        check_file(path_of(settings.engine_url))


def _check_workers(settings: Settings) -> None:
    if settings.workers > 1:
        check_shared(settings.engine_url, settings.workers)
