"""Undeclared request fields: ignored with one warning per field, or rejected."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from farthing.server.errors import ApiError
from farthing.server.schema import Strict

log = logging.getLogger("farthing.server")

_MAX_NAMES = 64  # distinct names that clients can add to the log and the metric
OTHER = "other"
_SCALARS = (int, str)


class UnknownFields:
    """Counts unknown fields by name, and logs each name once."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict  # reject instead of ignoring
        self.counts: dict[str, int] = {}

    def check(self, body: BaseModel) -> None:
        """Count a body's unknown fields. If strict, raises ApiError (400) for the first one."""
        for name in unknown(body):
            if self.strict:
                raise ApiError(
                    400,
                    f"{name} is not a known field (this server runs with --strict-fields)",
                    param=name,
                    code="unknown_parameter",
                )
            self._count(name)

    def _count(self, name: str) -> None:
        known = name in self.counts
        if not known and len(self.counts) >= _MAX_NAMES:
            name, known = OTHER, True
        if not known:
            log.warning("ignoring unknown request field %r", name)
        self.counts[name] = self.counts.get(name, 0) + 1


def unknown(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of undeclared fields of a body and of nested objects, without list positions."""
    if isinstance(value, list):
        for item in value:
            if not isinstance(item, _SCALARS):  # long lists are token ids
                yield from unknown(item, prefix)
    if not isinstance(value, BaseModel):
        return
    if isinstance(value, Strict):
        for name, extra in (value.model_extra or {}).items():
            if extra is not None:  # SDKs send back everything they received, even null
                yield f"{prefix}{name}"[:80]
    for name in value.model_fields_set:
        if isinstance(inner := getattr(value, name, None), BaseModel | list):
            yield from unknown(inner, f"{prefix}{name}.")
