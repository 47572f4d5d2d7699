"""API keys: who is asking. Keys are kept as SHA-256 digests and compared in constant time."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

ENVIRONMENT = "FARTHING_API_KEY"
ANONYMOUS = "anonymous"  # the name that limits and metrics see when no key is asked for


class KeyRing:
    """Named API keys. An entry is `name:key` or a bare key, which is named after its digest.

    Several keys may share a name (so that keys can be rotated); a key has one name.
    """

    __slots__ = ("_keys",)

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises ValueError on an empty key, an empty name or a key given under two names."""
        keys: dict[bytes, str] = {}
        for position, entry in enumerate(entries, start=1):
            name, key = _parse(entry, position)
            digest = _digest(key.encode())
            if keys.setdefault(digest, name) != name:
                named = f"{name!r} and {keys[digest]!r}"
                raise ValueError(f"API key {position} is named {named}; expected one name a key")
        self._keys = tuple(keys.items())

    @classmethod
    def from_file(cls, path: str | Path) -> KeyRing:
        """One entry a line; blank lines and lines that start with `#` are skipped.

        Raises ValueError when the file cannot be read, holds no key, or has a malformed line.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"API key file {str(path)!r} cannot be read: {error}") from error
        ring = cls(line for raw in lines if (line := raw.strip()) and not line.startswith("#"))
        if not ring:
            raise ValueError(f"API key file {str(path)!r} holds no key; expected `name:key` or a key a line")
        return ring

    @classmethod
    def from_environment(cls, variable: str = ENVIRONMENT) -> KeyRing:
        """Entries from an environment variable, separated by commas or line ends; empty when it is unset."""
        text = os.environ.get(variable, "").replace(",", "\n")
        return cls(entry for raw in text.splitlines() if (entry := raw.strip()))

    def check(self, authorization: str | None) -> str | None:
        """The name behind an `Authorization: Bearer KEY` header; None if the key is unknown.

        Every key is compared whatever matched before, so the time taken tells nothing about the keys.
        """
        scheme, _, key = (authorization or "").partition(" ")
        offered = _digest(key.strip(" \t").encode("latin-1", "replace"))  # the bytes of the header
        found = None
        for digest, name in self._keys:
            if hmac.compare_digest(digest, offered):
                found = name
        return found if scheme.lower() == "bearer" else None

    def names(self) -> list[str]:
        """Every name once, sorted."""
        return sorted({name for _, name in self._keys})

    def __or__(self, other: KeyRing) -> KeyRing:
        """Both rings' keys; this one's name wins for a key in both."""
        merged = KeyRing(())
        merged._keys = tuple((dict(other._keys) | dict(self._keys)).items())
        return merged

    def __len__(self) -> int:
        return len(self._keys)


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


def _parse(entry: str, position: int) -> tuple[str, str]:
    name, colon, key = (part.strip() for part in entry.strip().partition(":"))
    if not colon:
        name, key = "", name
    if not key or (colon and not name):
        raise ValueError(f"API key {position} is malformed; expected `name:key` or a key")
    if any(character.isspace() for character in key):
        raise ValueError(f"API key {position} holds white space; expected one word")
    return name or f"key-{_digest(key.encode()).hex()[:8]}", key
