"""API keys: client identity. Keys are stored as SHA-256 digests and compared in constant time."""

from __future__ import annotations

import hmac
import logging
import os
import stat
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

log = logging.getLogger("farthing.server")

ENVIRONMENT = "FARTHING_API_KEY"
ANONYMOUS = "anonymous"  # client name in limits and metrics when no key is required


class KeyRing:
    """Named API keys. An entry is `name:key` or a bare key, which gets its digest as name.

    Several keys may share a name, so that keys can be rotated; a key has one name.
    """

    __slots__ = ("_keys",)

    def __init__(self, entries: Iterable[str]) -> None:
        """Raises ValueError for an empty key, an empty name, or one key under two names."""
        keys: dict[bytes, str] = {}
        for position, entry in enumerate(entries, start=1):
            name, key = _parse(entry, position)
            digest = _digest(key.encode())
            if keys.setdefault(digest, name) != name:
                named = f"{name!r} and {keys[digest]!r}"
                raise ValueError(f"API key {position} is named {named}; expected one name per key")
        self._keys = tuple(keys.items())

    @classmethod
    def from_file(cls, path: str | Path) -> KeyRing:
        """Read one entry per line; blank lines and lines that start with `#` are skipped.

        Warns of a file that every user of the machine can read. Raises ValueError if the file cannot be read,
        contains no key, or has a malformed line.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            warn_if_public(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"API key file {str(path)!r} cannot be read: {error}") from error
        ring = cls(line for raw in lines if (line := raw.strip()) and not line.startswith("#"))
        if not ring:
            raise ValueError(
                f"API key file {str(path)!r} contains no key; expected `name:key` or a key per line"
            )
        return ring

    @classmethod
    def from_environment(cls, variable: str = ENVIRONMENT) -> KeyRing:
        """Entries from an environment variable, separated by commas or newlines; empty if unset."""
        text = os.environ.get(variable, "").replace(",", "\n")
        return cls(entry for raw in text.splitlines() if (entry := raw.strip()))

    def check(self, authorization: str | None) -> str | None:
        """The name of the key in an `Authorization: Bearer KEY` header; None if the key is unknown.

        Every key is compared even after a match, so timing reveals nothing about the keys.
        """
        scheme, _, key = (authorization or "").partition(" ")
        offered = _digest(key.strip(" \t").encode("latin-1", "replace"))  # the header's bytes
        found = None
        for digest, name in self._keys:
            if hmac.compare_digest(digest, offered):
                found = name
        return found if scheme.lower() == "bearer" else None

    def names(self) -> list[str]:
        """Every name once, sorted."""
        return sorted({name for _, name in self._keys})

    def __or__(self, other: KeyRing) -> KeyRing:
        """The union of both key rings; a key in both keeps this ring's name."""
        merged = KeyRing(())
        merged._keys = tuple((dict(other._keys) | dict(self._keys)).items())
        return merged

    def __len__(self) -> int:
        return len(self._keys)


def warn_if_public(path: str | Path) -> None:
    """Log a warning if every user of the machine can read a file of keys. Raises OSError."""
    mode = Path(path).stat().st_mode
    if mode & stat.S_IROTH:
        log.warning(
            "key file %r: every user of this machine can read it (mode %03o); expected 600 or 640",
            *(str(path), stat.S_IMODE(mode)),
        )


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


def _parse(entry: str, position: int) -> tuple[str, str]:
    name, colon, key = (part.strip() for part in entry.strip().partition(":"))
    if not colon:
        name, key = "", name
    if not key or (colon and not name):
        raise ValueError(f"API key {position} is malformed; expected `name:key` or a key")
    if any(character.isspace() for character in key):
        raise ValueError(f"API key {position} contains white space; expected one word")
    return name or f"key-{_digest(key.encode()).hex()[:8]}", key
