"""Where a Redis is: what its URL says. Pure."""

from __future__ import annotations

import re
import ssl
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from ...config import hide_password
from ...errors import ConfigError

__all__ = ["RedisAddress"]

_OPTIONS = {
    "db",
    "sentinel",
    "sentinel_username",
    "sentinel_password",
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_cert_reqs",
    "ssl_check_hostname",
}


class RedisAddress(msgspec.Struct, frozen=True):
    """How to connect to a server, to the primary that Sentinels name, or to some nodes of a Cluster.

    ``hosts`` are servers, Sentinels or nodes; empty for a Unix socket, which is at ``path``. ``options`` are
    those of the query.
    """

    hosts: tuple[tuple[str, int], ...] = ()
    path: str | None = None
    username: str | None = None
    password: str | None = None
    db: int = 0
    tls: bool = False
    options: dict[str, str] = {}

    @property
    def sentinel(self) -> str | None:
        """The name under which Sentinel monitors the primary; None: no Sentinel is used."""
        return self.options.get("sentinel")

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """Read a URL.

        ``redis://[[user]:password@]host[:port][,host[:port]...][/db]``, ``rediss://`` for TLS and
        ``unix://[[user]:password@]/path``. Options in the query: ``db``; ``sentinel=NAME``, with
        ``sentinel_username`` and ``sentinel_password``: the hosts are Sentinels; for TLS ``ssl_ca_certs``,
        ``ssl_certfile`` and ``ssl_keyfile`` (paths), ``ssl_cert_reqs=none`` and ``ssl_check_hostname=false``.

        Raises:
            ConfigError: it cannot be read; the message says why, without the password.
        """
        try:
            parts = urlsplit(url)
            shown = hide_password(url)
            options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError:
            # What Python says of it would repeat the password.
            raise ConfigError(
                "the Redis URL cannot be read: it must be such as redis://[[user]:password@]host:6379/0"
            ) from None
        if unknown := options.keys() - _OPTIONS:
            raise ConfigError(
                f"unknown option {min(unknown)!r} in {shown}: there are {', '.join(sorted(_OPTIONS))}"
            )
        credentials, _, hosts = parts.netloc.rpartition("@")
        username, _, password = credentials.partition(":")
        is_unix = parts.scheme == "unix"
        db = options.pop("db", "0" if is_unix else parts.path.strip("/") or "0")
        if not db.isascii() or not db.isdigit():
            raise ConfigError(f"the database in {shown} must be a number, not {db!r}")
        if is_unix and (hosts or not parts.path):
            raise ConfigError(f"{shown} must have an absolute path, such as unix:///run/redis/redis.sock")
        default_port = 26379 if "sentinel" in options else 6379
        return cls(
            () if is_unix else tuple(_host(host, default_port, shown) for host in hosts.split(",")),
            unquote(parts.path) if is_unix else None,
            unquote(username) or None,
            unquote(password) or None,
            int(db),
            parts.scheme == "rediss",
            options,
        )

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return what TLS connections use; None: there is no TLS.

        Raises:
            ConfigError: a file cannot be read.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.options.get("ssl_ca_certs"))
            if certificate := self.options.get("ssl_certfile"):
                context.load_cert_chain(certificate, self.options.get("ssl_keyfile"))
        except OSError as error:
            raise ConfigError(f"the files for TLS to Redis cannot be read: {error}") from error
        without_certificate = self.options.get("ssl_cert_reqs") == "none"
        if without_certificate or self.options.get("ssl_check_hostname", "").lower() in ("false", "0", "no"):
            context.check_hostname = False
        if without_certificate:
            context.verify_mode = ssl.CERT_NONE
        return context

    def __str__(self) -> str:
        if self.path is not None:
            return self.path
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return hosts if self.sentinel is None else f"{self.sentinel} of Sentinel {hosts}"

    def credentials(self, *, of_sentinel: bool = False) -> dict[str, Any]:
        """Return the arguments of a coredis connection that log in and select the database."""
        if of_sentinel:
            options = self.options
            return {
                "username": options.get("sentinel_username"),
                "password": options.get("sentinel_password"),
            }
        return {"username": self.username, "password": self.password, "db": self.db}


def _host(text: str, default_port: int, shown: str) -> tuple[str, int]:
    """Read ``host``, ``host:port``, ``[IPv6]`` or ``[IPv6]:port``."""
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::(\d{1,5}))?", text)
    if match is None:
        raise ConfigError(f"{shown} must name its host, such as redis://localhost:6379/0")
    if not 1 <= (port := int(match[3] or default_port)) <= 65535:
        raise ConfigError(f"the port in {shown} must be from 1 to 65535")
    return match[1] or unquote(match[2]), port
