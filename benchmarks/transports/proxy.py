"""nginx with TLS in front of a server, as browsers need it for HTTP/2."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ..load.process import BenchmarkError, raise_file_limit
from ..operations.deployment import DEPLOY, NGINX_MAIN, Program
from ..servers import find_nginx, free_port
from .bed import Bed
from .connection import Address

__all__ = ["BUFFERING", "DEFAULT", "OURS", "Nginx", "missing_nginx"]

DEFAULT = """\
server {
    listen 80;
    location / { proxy_pass http://127.0.0.1:8000; }
}
"""
# As in front of a server that does not ask nginx not to buffer.
BUFFERING = DEFAULT.replace("proxy_pass", "proxy_ignore_headers X-Accel-Buffering; proxy_pass")
OURS = (DEPLOY / "nginx.conf").read_text()


def missing_nginx() -> str | None:
    """Return what is missing; None: nothing."""
    try:
        find_nginx()
    except BenchmarkError as error:
        return str(error)
    return None


class Nginx(Program):
    """nginx in front of the server of a bed; ``address`` is its.

    Args:
        site: its configuration, with ``listen 80;`` and the server at ``127.0.0.1:8000``.
        bed: with the server.
    """

    def __init__(self, site: str, bed: Bed) -> None:
        with bed.inside("server"):
            super().__init__("nginx", free_port())
        self._bed = bed
        self._site = site
        self.address = Address(bed.host, self.port, tls=True)

    def __enter__(self) -> Nginx:
        files = raise_file_limit()
        certificate, key = self.directory / "certificate.pem", self.directory / "key.pem"
        _make_certificate(certificate, key, self._bed.host)
        interface = "0.0.0.0" if self._bed.has_network else "127.0.0.1"
        listen = f"listen {interface}:{self.port} ssl http2 backlog=4096;"
        listen += f" ssl_certificate {certificate}; ssl_certificate_key {key};"
        listen += " ssl_protocols TLSv1.2 TLSv1.3;"  # as all packages of nginx have it
        site = self._site.replace("listen 80;", listen)
        site = site.replace("127.0.0.1:8000", f"127.0.0.1:{self._bed.server.port}")
        (self.directory / "site.conf").write_text(site)
        user = "user root;" if os.geteuid() == 0 else ""
        main = self.directory / "nginx.conf"
        main.write_text(
            NGINX_MAIN.format(user=user, directory=self.directory, files=files, connections=files - 100)
        )
        with self._bed.inside("server"):
            self.start(find_nginx(), "-p", self.directory, "-c", main, "-e", "stderr")
        return self


def _make_certificate(path: Path, key_path: Path, host: str) -> None:
    """Write a certificate for ten days, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=9))
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key_path.write_bytes(private)
