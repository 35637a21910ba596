"""Keys, and tokens that are signed with them, for tests."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

__all__ = [
    "SECRET",
    "bearer",
    "encode",
    "jwk",
    "make_token",
    "private_key",
    "private_pem",
    "public_pem",
    "sign_raw",
]

SECRET = "correct-horse-battery-staple-0123456789"  # 39 bytes


@cache
def private_key(algorithm: str, number: int = 0) -> Any:
    """Return a private key for an algorithm; another one for each number."""
    del number
    match algorithm:
        case "RS256":
            return rsa.generate_private_key(65537, 2048)
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case "EdDSA":
            return ed25519.Ed25519PrivateKey.generate()
    raise AssertionError(algorithm)


def private_pem(key: Any) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def public_pem(key: Any) -> str:
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def jwk(key: Any, key_id: str | None = None, **members: Any) -> dict[str, Any]:
    """Return a public key as a member of a JWK Set."""
    kinds = {
        rsa.RSAPrivateKey: RSAAlgorithm,
        ec.EllipticCurvePrivateKey: ECAlgorithm,
        ed25519.Ed25519PrivateKey: OKPAlgorithm,
    }
    [algorithm] = [algorithm for kind, algorithm in kinds.items() if isinstance(key, kind)]
    value = algorithm.to_jwk(key.public_key(), as_dict=True)
    value.pop("key_ops", None)
    return {**value, **({} if key_id is None else {"kid": key_id}), **members}


def make_token(
    key: Any = SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **claims: Any
) -> str:
    """Return a token of ann that is valid for an hour; a claim of None is left out."""
    now = claims.pop("now", None) or int(time.time())
    values = {"sub": "ann", "iat": now, "exp": now + 3600, **claims}
    values = {name: value for name, value in values.items() if value is not None}
    return jwt.encode(values, key, algorithm, headers)


def encode(value: Any) -> str:
    """Return a part of a token: JSON, or text as it is."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def sign_raw(header: Any, payload: Any, secret: str | bytes = SECRET) -> str:
    """Return a token of any parts, signed with HMAC and SHA-256, whatever its header says."""
    signed = f"{encode(header)}.{encode(payload)}"
    secret = secret.encode() if isinstance(secret, str) else secret
    return f"{signed}.{encode(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
