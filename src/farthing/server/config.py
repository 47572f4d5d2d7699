"""The HTTP server's configuration: options declared once (see `farthing.config`), keys, hosts and bounds."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from farthing.config import check, option

# API keys: client identity. Keys are stored as SHA-256 digests and compared in constant time.

log = logging.getLogger("farthing.server")

ENVIRONMENT = "FARTHING_API_KEY"
ADMIN_ENVIRONMENT = "FARTHING_ADMIN_API_KEY"
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
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ValueError(
                f"--api-key-file: got {str(path)!r}, which cannot be read ({why}); expected `name:key` or a "
                "key per line"
            ) from error
        ring = cls(line for raw in lines if (line := raw.strip()) and not line.startswith("#"))
        if not ring:
            raise ValueError(
                f"--api-key-file: got {str(path)!r}, which has no key; expected `name:key` or a key per line"
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


# How finely a client may cut a body: the same for the server and the gateway.
#
# Each chunk costs as much as a few hundred bytes. A body may have MOST chunks, and more if they have at
# least LEAST bytes on average.

MOST, LEAST = 1_024, 64
TOO_FINE = f"expected chunks of at least {LEAST} bytes on average"


def too_fine(chunks: int, size: int) -> bool:
    """Whether a body of `size` bytes so far came in too many chunks."""
    return chunks > MOST + size // LEAST


# Which host a request is for, and by which key: the same rule for the server and the gateway.
#
# A proxy in front may route, or check access, by one of several values while this server goes by another.


_HOST = re.compile(rb"(?:\[[0-9a-z.:%]+\]|[^][\s,/\\?#@:<>\"]+)?(?::\d*)?")
_PORTS = {b"http": b":80", b"https": b":443"}  # that a URL need not name


def ambiguity(
    target: bytes, headers: Iterable[tuple[bytes, bytes]], version: tuple[int, int] = (1, 1)
) -> str | None:
    """What a head whose host or key is not clear should have; None if both are. target: as received."""
    fields = [(name.lower(), value) for name, value in headers]
    hosts = [value.strip().lower() for name, value in fields if name == b"host"]
    if len(hosts) > 1 or (not hosts and version >= (1, 1)):
        return "expected one Host header"
    if hosts and not _HOST.fullmatch(hosts[0]):
        return "expected a Host header of one host, perhaps with a port"
    for single in (b"authorization", b"x-api-key"):
        if sum(name == single for name, _ in fields) > 1:
            return f"expected one {single.decode().title()} header"
    authority = None if target.startswith(b"/") else _authority(target)
    if authority is not None:
        port = _PORTS.get(target.partition(b":")[0].lower(), b"")
        if authority.lower().removesuffix(port) not in [host.removesuffix(port) for host in hosts]:
            return "expected a path, or a URL of the host in the Host header"
    return None


def _authority(target: bytes) -> bytes | None:
    """The host and port in a request's target; None if it is a path."""
    scheme, separator, rest = target.partition(b"://")
    if not separator or b"/" in scheme or b"?" in scheme:
        return None
    return rest.partition(b"?")[0].partition(b"/")[0]


Format = Literal[
    "deepseek_v3",
    "deepseek_r1",
    "deepseek_v31",
    "deepseek_v32",
    "deepseek_v4",
    "kimi_k2",
    "kimi_k2_thinking",
    "kimi_k25",
    "glm45",
    "glm47",
    "harmony",
]
CallsMode = Literal[
    "auto",
    Format,
    "hermes",
    "qwen3_coder",
    "minimax_m2",
    "mistral",
    "mistral_list",
    "granite",
    "llama3_json",
]
ReasoningMode = Literal["auto", "none", Format]

_http = partial(option, group="HTTP")
_limit = partial(option, group="Limits")
_cost = partial(option, group="Cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything about the server except its engine. Raises ValueError with the field and its value."""

    host: str = _http("127.0.0.1", "Address to listen on")
    port: int = _http(8000, "Port; 0: any free port", minimum=0, maximum=65535)
    keys: KeyRing | None = None  # None or empty: no key is required
    admin_keys: KeyRing | None = None  # may use the API and see every key's spending
    metrics_keys: KeyRing | None = None  # if set, other machines need one to scrape /metrics
    insecure: bool = _http(False, "Allow access from other machines without a key")
    allowed_hosts: tuple[str, ...] = _http(
        (), "Host name to answer to, or * (repeatable); default: any with keys, else this machine's"
    )
    allowed_origins: tuple[str, ...] = _http((), "Web origin that may call the API by CORS (repeatable)")
    share_prefix_cache: bool = _http(False, "One prefix cache for all keys instead of one per key")
    kv_events: str | None = _http(
        None, "ZeroMQ endpoint that publishes the prefix cache's blocks as vLLM does (tcp://127.0.0.1:5557)"
    )
    served_model_name: tuple[str, ...] = _http((), "Model name in the API (repeatable); default: MODEL")
    mcp: str | None = _http(
        None, "File of MCP servers whose tools the page offers, with a question before each call"
    )
    root_path: str = _http("", "Path prefix behind a proxy that strips it")
    tool_call_parser: CallsMode = _http("auto", "Format of tool calls to parse; auto: by checkpoint")
    reasoning_parser: ReasoningMode = _http("auto", "Format of reasoning to parse; auto: by checkpoint")
    strict_fields: bool = _http(False, "Reject unknown request fields instead of ignoring them")
    access_log: bool = _http(False, "Log line per request")
    requests_per_minute: int | None = _limit(None, "Requests per minute and key", minimum=1)
    tokens_per_minute: int | None = _limit(None, "Prompt and output tokens per minute and key", minimum=1)
    work_seconds_per_minute: int | None = _limit(
        None, "CPU seconds per minute and key for tokenizing, chat templates and grammars", minimum=1
    )
    max_body_bytes: int = _limit(8 << 20, "Maximum bytes of a request body", minimum=1)
    max_connections: int = _limit(4096, "Maximum number of open connections", minimum=1)
    max_header_bytes: int = _limit(32_768, "Maximum bytes of a request's head", minimum=1)
    header_timeout: float = _limit(10.0, "Seconds for a request's head to arrive", above=0)
    body_timeout: float = _limit(30.0, "Seconds for a request body to arrive", above=0)
    idle_timeout: float = _limit(75.0, "Seconds between requests before a connection is closed", above=0)
    keep_alive: float = _limit(10.0, "Seconds without output after which a stream sends a ping", above=0)
    request_timeout: float = _limit(600.0, "Seconds from the body's arrival to the last token", above=0)
    drain_timeout: float = _limit(30.0, "Seconds for running requests after SIGTERM", minimum=0)
    prices: str | None = _cost(None, "A prices.toml that overrides the packaged one")
    hardware: str | None = _cost(None, "Row of the price table for this machine; default: by device name")

    def __post_init__(self) -> None:
        check(self)
        if not (self.keys or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"host: got {self.host!r}, which other machines can reach, without an API key; "
                f"set --api-key or --api-key-file, or allow it with --insecure"
            )
        if self.mcp is not None and not is_loopback(self.host):
            raise ValueError(
                f"mcp: got {self.mcp!r} with host {self.host!r}; expected an address that only this machine "
                "can reach, since tools run as you"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. Names other than localhost count as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def gather_keys(api_keys: list[str], key_file: Path | None) -> KeyRing:
    """Keys from the command line, a file and the environment together."""
    ring = KeyRing(api_keys) | KeyRing.from_environment()
    return ring | KeyRing.from_file(key_file) if key_file else ring


@dataclass(frozen=True, slots=True)
class Given:
    """Options of `farthing serve` for every model of several. keys: without those in `key_file`."""

    engine: Mapping[str, Any]
    server: Mapping[str, Any]
    keys: Sequence[str] = ()
    admin_keys: Sequence[str] = ()
    key_file: Path | None = None
