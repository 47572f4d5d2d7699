"""Base classes of request bodies: types are not converted, and null means absent."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Loose(BaseModel):
    """Parts of a conversation, whose other fields go to the chat template.

    An optional null field takes its default, because SDKs write null for unset fields.
    """

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


class Strict(Loose):
    """Unknown fields are kept in `model_extra` for `fields.UnknownFields`, which warns about them or, with
    --strict-fields, rejects them."""


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
