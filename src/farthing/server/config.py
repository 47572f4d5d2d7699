"""The configuration of the HTTP server, and the only declaration of its options (see farthing.options)."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from farthing.options import check, option
from farthing.server.auth import KeyRing

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
]
CallsMode = Literal["auto", Format]
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
    served_model_name: tuple[str, ...] = _http((), "Model name in the API (repeatable); default: MODEL")
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
