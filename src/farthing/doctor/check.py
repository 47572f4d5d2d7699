"""The result of a check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One result. ok: good; info: a fact; warn: reduced capability; fail: serving will not work."""

    group: str
    name: str
    status: Status
    detail: str
    advice: str = ""  # how to fix or improve it
    data: dict[str, Any] = field(default_factory=dict)  # machine-readable values for --json


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All results, in order."""

    checks: Sequence[Check]

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "fail" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """{"healthy", "checks": [{group, name, status, detail, advice, data}]}."""
        return {"healthy": self.healthy, "checks": [asdict(check) for check in self.checks]}
