"""What `farthing serve` is told, beside the engine's own configuration."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from farthing.server.auth import KeyRing

ReasoningMode = Literal["auto", "deepseek_r1", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Frozen; ValueError names the field, its value and what is accepted."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    served_model_name: tuple[str, ...] = ()  # empty: the model as it was given
    keys: KeyRing | None = None  # None or empty: no key is asked for
    insecure: bool = False  # allow others than this machine without a key
    requests_per_minute: int | None = None  # for each key
    tokens_per_minute: int | None = None  # for each key, prompt and generated
    max_body_bytes: int = 8 << 20
    body_timeout: float = 30.0  # seconds for a body to arrive
    request_timeout: float = 600.0  # seconds from the body's arrival to the last token
    drain_timeout: float = 30.0  # seconds that running requests get after SIGTERM
    reasoning_parser: ReasoningMode = "auto"  # auto: where the model's chat template knows <think>
    strict_fields: bool = False  # refuse unknown request fields instead of ignoring them
    root_path: str = ""
    access_log: bool = False
    prices: str | None = None  # a prices.toml over the packaged one; None: see farthing.cost.Prices.load
    hardware: str | None = None  # a row of it; None: by the device's name

    def __post_init__(self) -> None:
        if self.reasoning_parser not in get_args(ReasoningMode):
            raise ValueError(
                f"reasoning_parser is {self.reasoning_parser!r}; expected one of {get_args(ReasoningMode)}"
            )
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; expected 0…65535")
        for name in ("requests_per_minute", "tokens_per_minute", "max_body_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected a positive integer")
        for name in ("body_timeout", "request_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected seconds > 0")
        if not self.drain_timeout >= 0:
            raise ValueError(f"drain_timeout is {self.drain_timeout}; expected seconds >= 0")
        if not (self.keys or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"host is {self.host!r}, which other machines can reach, and no API key is set; "
                f"give --api-key or --api-key-file, or allow it with --insecure"
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
