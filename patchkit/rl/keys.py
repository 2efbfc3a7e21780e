"""Keys that sign verdicts: HMAC with one secret for both sides, or Ed25519, whose public half can only check.

HMAC is RFC 2104 (https://www.rfc-editor.org/rfc/rfc2104) with SHA-256, and Ed25519 is RFC 8032 (https://www.rfc-editor.org/rfc/rfc8032).
With HMAC whoever checks can also sign; with Ed25519 the verifier keeps the private key, and the trainer has the public one.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import os
from pathlib import Path
from typing import Any, Protocol

from patchkit.errors import RewardError

_LEAST_BYTES = 32
_ED25519 = "cryptography.hazmat.primitives.asymmetric.ed25519"
_SERIALIZATION = "cryptography.hazmat.primitives.serialization"


class Checker(Protocol):
    """A key that checks signatures."""

    def verify(self, message: bytes, signature: str) -> bool:
        """Return whether ``signature`` is this key's for ``message``."""


class Signer(Checker, Protocol):
    """A key that also signs."""

    def sign(self, message: bytes) -> str:
        """Return the signature of ``message``, with the name of the method in front."""


class HmacKey:
    """A secret that signs and checks by HMAC-SHA-256.

    Args:
        secret: at least 32 bytes, as of ``secrets.token_bytes(32)``.

    Raises:
        RewardError: fewer bytes.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < _LEAST_BYTES:
            raise RewardError(f"an HMAC key of {len(secret)} bytes can be guessed: give at least {_LEAST_BYTES}, secrets.token_bytes(32)")
        self._secret = secret

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> HmacKey:
        """Read the secret from a file, without newlines at its end.

        Raises:
            RewardError: the file cannot be read, holds fewer than 32 bytes, or may be read by others than its owner.
        """
        return cls(_private_bytes(Path(path)).rstrip(b"\r\n"))

    @classmethod
    def from_environment(cls, name: str) -> HmacKey:
        """Take the secret from an environment variable, as its UTF-8 bytes.

        Raises:
            RewardError: the variable is not set, or holds fewer than 32 bytes.
        """
        if name not in os.environ:
            raise RewardError(f"the environment variable {name} is not set: set it to a secret of at least {_LEAST_BYTES} bytes")
        return cls(os.environb[name.encode()] if hasattr(os, "environb") else os.environ[name].encode())

    def sign(self, message: bytes) -> str:
        """Return ``hmac-sha256:`` and 64 hexadecimal digits."""
        return f"hmac-sha256:{hmac.new(self._secret, message, hashlib.sha256).hexdigest()}"

    def verify(self, message: bytes, signature: str) -> bool:
        """Return whether ``signature`` is this key's for ``message``, compared in constant time."""
        return hmac.compare_digest(self.sign(message).encode(), signature.encode("utf-8", "replace"))


class Ed25519Key:
    """A private key that signs and checks by Ed25519. Needs cryptography: ``pip install 'patchkit[signing]'``.

    Args:
        private: the key, of the cryptography library.
    """

    def __init__(self, private: Any) -> None:
        self._private, self._public = private, Ed25519PublicKey(private.public_key())

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Ed25519Key:
        """Read a private key from a PEM file without a password, as ``openssl genpkey -algorithm ed25519`` writes it.

        Raises:
            RewardError: the file cannot be read, holds no such key, or may be read by others than its owner.
        """
        data = _private_bytes(Path(path))
        try:
            key = _cryptography(_SERIALIZATION).load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as error:
            raise RewardError(f"{path} holds no private key in PEM without a password ({error})") from None
        if not isinstance(key, _cryptography(_ED25519).Ed25519PrivateKey):
            raise RewardError(f"{path} holds a {type(key).__name__}: give an Ed25519 key (openssl genpkey -algorithm ed25519)")
        return cls(key)

    @property
    def public(self) -> Ed25519PublicKey:
        """The half of the key that checks and cannot sign."""
        return self._public

    def sign(self, message: bytes) -> str:
        """Return ``ed25519:`` and 128 hexadecimal digits."""
        return f"ed25519:{self._private.sign(message).hex()}"

    def verify(self, message: bytes, signature: str) -> bool:
        """Return whether ``signature`` is this key's for ``message``."""
        return self._public.verify(message, signature)


class Ed25519PublicKey:
    """A public key that checks by Ed25519. Needs cryptography: ``pip install 'patchkit[signing]'``.

    Args:
        public: the key, of the cryptography library.
    """

    def __init__(self, public: Any) -> None:
        self._public = public

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Ed25519PublicKey:
        """Read a public key from a PEM file, as ``openssl pkey -pubout`` writes it.

        Raises:
            RewardError: the file cannot be read, or holds no such key.
        """
        try:
            key = _cryptography(_SERIALIZATION).load_pem_public_key(_bytes(Path(path)))
        except ValueError as error:
            raise RewardError(f"{path} holds no public key in PEM ({error})") from None
        if not isinstance(key, _cryptography(_ED25519).Ed25519PublicKey):
            raise RewardError(f"{path} holds a {type(key).__name__}: give an Ed25519 key (openssl pkey -pubout)")
        return cls(key)

    def verify(self, message: bytes, signature: str) -> bool:
        """Return whether ``signature`` is this key's for ``message``."""
        method, _, digits = signature.partition(":")
        try:
            self._public.verify(bytes.fromhex(digits), message)
        except (ValueError, _cryptography("cryptography.exceptions").InvalidSignature):
            return False
        return method == "ed25519"


def _cryptography(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RewardError(f"Ed25519 needs the cryptography library ({error}): pip install 'patchkit[signing]', or use HmacKey") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RewardError(f"the key file {path} cannot be read ({error.strerror})") from None


def _private_bytes(path: Path) -> bytes:
    """The content of a file that only its owner may read."""
    data = _bytes(path)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise RewardError(f"the key file {path} may be read by others than its owner: chmod 600 {path}")
    return data
