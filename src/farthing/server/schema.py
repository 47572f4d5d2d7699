"""Base classes of request bodies: types are not converted, null means absent, unknown fields are reported."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from farthing.server.errors import ApiError
from farthing.server.fields import path_of

log = logging.getLogger("farthing.server")

_MAX_NAMES = 64  # distinct names that clients can add to the log and the metric
OTHER = "other"
_SCALARS = (int, str)
_LONGEST = 80  # characters of a name
_Path = tuple[str | int, ...]


class Strict(BaseModel):
    """A part of a body. An optional null field takes its default, because SDKs write null for unset fields.

    Unknown fields are kept in `model_extra` for `UnknownFields`, which warns about them or, with
    --strict-fields, rejects them. known: names of undeclared fields that clients may send, of any type. They
    have no effect here.
    """

    known: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict) or None not in value.values():
            return value
        optional = cls._optional()
        return {name: item for name, item in value.items() if item is not None or name not in optional}

    @classmethod
    def _optional(cls) -> set[str]:
        """Names of optional fields, as clients write them."""
        return {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        document = handler(core_schema)
        properties = handler.resolve_ref_schema(document).get("properties", {})
        for name in cls._optional() & set(properties):
            if {"type": "null"} not in properties[name].get("anyOf", ()):
                properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
        return document


class Body(Strict):
    """A whole body. Rejects lone surrogates, which no tokenizer can encode, and NaN and infinities, which are
    not JSON and would make an answer that repeats them invalid."""

    @model_validator(mode="before")
    @classmethod
    def _is_json(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the body contains a lone surrogate: {error.reason}") from error
        except ValueError as error:
            raise ValueError("the body contains NaN or an infinity; expected JSON numbers") from error
        except RecursionError as error:
            raise ValueError("the body is nested too deeply") from error
        return value


class UnknownFields:
    """Counts unknown fields by name, and logs each name once."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict  # reject instead of ignoring
        self.counts: dict[str, int] = {}

    def check(self, body: BaseModel) -> None:
        """Count a body's unknown fields. If strict, raises ApiError (400) for the first one."""
        for path in unknown(body):
            if self.strict:
                field = path_of(path)[:_LONGEST]
                raise ApiError(
                    400,
                    f"{field} is not a known field (this server runs with --strict-fields)",
                    param=field,
                    code="unknown_parameter",
                )
            self._count(path)

    def _count(self, path: _Path) -> None:
        name = ".".join(step for step in path if isinstance(step, str))[:_LONGEST]
        known = name in self.counts
        if not known and len(self.counts) >= _MAX_NAMES:
            name, known = OTHER, True
        if not known:
            seen = (
                ", except for the model's own chat template"
                if path[0] == "messages" and len(path) == 3
                else ""
            )
            log.warning("ignoring unknown request field %r%s", name, seen)
        self.counts[name] = self.counts.get(name, 0) + 1


def unknown(value: Any, path: _Path = ()) -> Iterator[_Path]:
    """Paths of the undeclared fields of a body and of the objects within it."""
    if isinstance(value, list):
        for position, item in enumerate(value):
            if not isinstance(item, _SCALARS):  # long lists are token ids
                yield from unknown(item, (*path, position))
    if not isinstance(value, Strict):
        return
    for name, extra in (value.model_extra or {}).items():
        if extra is not None and name not in value.known:  # SDKs send back all they received, even null
            yield (*path, name)
    for name in value.model_fields_set:
        if isinstance(inner := getattr(value, name, None), BaseModel | list):
            yield from unknown(inner, (*path, name))
