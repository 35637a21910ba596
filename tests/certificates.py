"""Certificates for tests: of an authority of their own, made in milliseconds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

__all__ = ["Authority", "Certificate"]


def _pem(key: ec.EllipticCurvePrivateKey, encryption: KeySerializationEncryption) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


class Certificate(NamedTuple):
    """The chain and the key, as PEM, and the serial number of the first certificate."""

    chain: bytes
    key: bytes
    serial: int
    encrypted_key: bytes

    def write(self, folder: Path, name: str = "server") -> tuple[Path, Path]:
        """Write both to files; return their paths."""
        paths = folder / f"{name}.crt", folder / f"{name}.key"
        for path, data in zip(paths, (self.chain, self.key), strict=True):
            path.write_bytes(data)
        return paths


class Authority:
    """Issues certificates for localhost, by an intermediate authority: so a server must send both."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._root = self._sign("Test root", self._key, "Test root", self._key, is_authority=True)
        self.pem = self._root.public_bytes(Encoding.PEM)
        self._intermediate_key = ec.generate_private_key(ec.SECP256R1())
        self._intermediate = self._sign(
            "Test intermediate", self._intermediate_key, "Test root", self._key, is_authority=True
        )

    def write(self, folder: Path) -> Path:
        """Write the root's certificate to a file; return its path."""
        path = folder / "ca.crt"
        path.write_bytes(self.pem)
        return path

    def issue(self) -> Certificate:
        """Return a certificate for localhost and the addresses of the loopback interface."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = "Test intermediate", self._intermediate_key
        certificate = self._sign("localhost", key, *issuer, is_authority=False)
        chain = [certificate, self._intermediate]
        return Certificate(
            b"".join(each.public_bytes(Encoding.PEM) for each in chain),
            _pem(key, NoEncryption()),
            certificate.serial_number,
            _pem(key, BestAvailableEncryption(b"secret")),
        )

    def _sign(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: str,
        issuer_key: ec.EllipticCurvePrivateKey,
        *,
        is_authority: bool,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(_usage(is_authority=is_authority), critical=True)
        )
        if not is_authority:
            names = [x509.DNSName("localhost"), *(map(x509.IPAddress, map(ip_address, ("127.0.0.1", "::1"))))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
