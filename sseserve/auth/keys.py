"""Keys: which there are, and the one algorithm that each of them is for (RFC 7518, section 3.1).

The algorithm follows from the key, never from a token: a public key taken for a secret would let everybody
who knows it sign (RFC 8725, section 2.1).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from jwt import PyJWTError
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.api_jws import PyJWS

from ..errors import ConfigError

__all__ = ["Algorithm", "Key", "is_signed_by", "read_jwks", "read_key", "read_private_key"]

Algorithm = Literal["HS256", "RS256", "ES256", "EdDSA"]

MIN_SECRET = 32  # bytes: as many as the hash has (RFC 7518, section 3.2)
MIN_RSA = 2048  # bits (RFC 7518, section 3.3)
MAX_KEYS = 100  # of one set
_KINDS = "RSA (2048 bits or more), EC on the curve P-256, or Ed25519"

_jws = PyJWS(algorithms=["HS256", "RS256", "ES256", "EdDSA"])


class Key(msgspec.Struct, frozen=True):
    """A key that verifies tokens, or signs them.

    Args:
        algorithm: the only one that it is for.
        material: the secret, or the key object of cryptography.
        key_id: its name in a set of keys; None: it has none.
    """

    algorithm: Algorithm
    material: Any
    key_id: str | None = None

    @property
    def identity(self) -> str:
        """What stands for the key; it cannot be computed from that."""
        material = self.material
        if not isinstance(material, bytes):
            material = material.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(material).hexdigest()

    def __repr__(self) -> str:
        return f"Key({self.algorithm!r}, key_id={self.key_id!r})"


def is_signed_by(token: str, key: Key) -> bool:
    """Return whether a token (RFC 7515, section 7.1) was signed with a key, by the key's algorithm."""
    try:
        # Refuses an algorithm in the header that is another one, and extensions that must be understood.
        _jws.decode_complete(
            token,
            key.material,
            algorithms=[key.algorithm],
            options={"verify_signature": True, "enforce_minimum_key_length": True},
        )
    except PyJWTError:
        return False
    return True


def read_key(text: str, name: str) -> Key:
    """Read a key that verifies: a secret, a public key in PEM, or ``file:PATH`` of either.

    Args:
        text: the setting.
        name: what it is called, for errors.

    Raises:
        ConfigError: it cannot be used; the message does not repeat it.
    """
    data = _contents(text, name)
    if b"-----BEGIN" not in data:
        return Key("HS256", _secret(data, name))
    if b"PRIVATE KEY-----" in data:
        raise ConfigError(
            f"{name} is a private key: the server needs only the public one, which this prints: "
            "openssl pkey -in PRIVATE.pem -pubout"
        )
    if b"BEGIN CERTIFICATE-----" in data:
        raise ConfigError(
            f"{name} is a certificate: give its public key, which this prints: "
            "openssl x509 -in CERTIFICATE.pem -noout -pubkey"
        )
    try:
        material = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{name} is not a public key in PEM that can be read") from None
    return Key(_algorithm(material, name), material)


def read_private_key(text: str, name: str) -> Key:
    """Read a key that signs: a secret, a private key in PEM, or ``file:PATH`` of either.

    Raises:
        ConfigError: it cannot be used; the message does not repeat it.
    """
    data = _contents(text, name)
    if b"-----BEGIN" not in data:
        return Key("HS256", _secret(data, name))
    if b"PRIVATE KEY-----" not in data:
        raise ConfigError(f"{name} is a public key, which can only verify: sign with the private one")
    try:
        material = load_pem_private_key(data, None)
    except TypeError:
        raise ConfigError(f"{name} is encrypted; give it without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{name} is not a private key in PEM that can be read") from None
    return Key(_algorithm(material, name), material)


def _contents(text: str, name: str) -> bytes:
    if not text.startswith("file:"):
        return text.encode(errors="surrogateescape")
    path = Path(text.removeprefix("file:"))
    try:
        return path.read_bytes().strip(b"\r\n")  # editors and shells end the last line
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name}: cannot read {path}: {reason}") from None


def _secret(data: bytes, name: str) -> bytes:
    if len(data) < MIN_SECRET:
        raise ConfigError(
            f"{name} is a secret of {len(data)} bytes: HS256 needs {MIN_SECRET} or more (RFC 7518, "
            "section 3.2), such as those of: openssl rand -hex 32. For a file, write file:PATH"
        )
    try:
        return HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(data)
    except PyJWTError:
        raise ConfigError(f"{name} is a public key in another format: give it in PEM") from None


def _algorithm(material: object, name: str) -> Algorithm:
    match material:
        case RSAPublicKey() | RSAPrivateKey() if material.key_size >= MIN_RSA:
            return "RS256"
        case EllipticCurvePublicKey() | EllipticCurvePrivateKey() if isinstance(material.curve, SECP256R1):
            return "ES256"
        case Ed25519PublicKey() | Ed25519PrivateKey():
            return "EdDSA"
    raise ConfigError(f"{name} is a key of another kind: it must be {_KINDS}")


def read_jwks(data: bytes) -> list[Key]:
    """Read the keys of a JWK Set (RFC 7517, section 5) that verify tokens. Others are left out.

    Raises:
        ValueError: it is not a JWK Set.
    """
    try:
        members = msgspec.json.decode(data, type=dict[str, Any]).get("keys")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("it is not a JSON object") from None
    if not isinstance(members, list) or len(members) > MAX_KEYS:
        raise ValueError(f"it has no array of at most {MAX_KEYS} keys")
    return [key for member in members if (key := _read_jwk(member)) is not None]


def _read_jwk(member: Any) -> Key | None:
    """Read one key; None: it is not public, not for signatures, or of another kind."""
    if not isinstance(member, dict) or "d" in member or member.get("use", "sig") != "sig":
        return None
    operations, key_id, algorithm = member.get("key_ops", ["verify"]), member.get("kid"), member.get("alg")
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    if key_id is not None and not isinstance(key_id, str):
        return None
    try:
        match member.get("kty"), member.get("crv"):
            case "RSA", None if algorithm in (None, "RS256"):
                material: object = RSAAlgorithm.from_jwk(member)
            case "EC", "P-256" if algorithm in (None, "ES256"):
                material = ECAlgorithm.from_jwk(member)
            case "OKP", "Ed25519" if algorithm in (None, "EdDSA", "Ed25519"):
                material = OKPAlgorithm.from_jwk(member)
            case _:
                return None
        return Key(_algorithm(material, "the key"), material, key_id)
    except (PyJWTError, ConfigError, ValueError, TypeError, KeyError):
        return None
