"""Fields that no model of `protocol` declares: ignored with one warning per field, or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from farthing.server.errors import ApiError
from farthing.server.schema import Strict

log = logging.getLogger("farthing.server")

_MAX_NAMES = 64  # distinct names a client can add to the log and to the metric
OTHER = "other"
_SCALARS = (int, str)


class UnknownFields:
    """Counts unknown fields by name, and logs each name once."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict  # refuse instead of ignoring
        self.counts: dict[str, int] = {}

    def check(self, body: BaseModel) -> None:
        """Account for a body's unknown fields. Raises ApiError (400) for the first one if strict."""
        for name in unknown(body):
            if self.strict:
                raise ApiError(
                    400,
                    f"{name} is not a known field, and this server runs with --strict-fields",
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
    """Dotted names of the undeclared fields of a body and of what it contains; positions are left out."""
    if isinstance(value, list):
        for item in value:
            if not isinstance(item, _SCALARS):  # the many are token ids
                yield from unknown(item, prefix)
    if not isinstance(value, BaseModel):
        return
    if isinstance(value, Strict):
        for name, extra in (value.model_extra or {}).items():
            if extra is not None:  # SDKs send back everything they were told, null or not
                yield f"{prefix}{name}"[:80]
    for name in value.model_fields_set:
        if isinstance(inner := getattr(value, name, None), BaseModel | list):
            yield from unknown(inner, f"{prefix}{name}.")
