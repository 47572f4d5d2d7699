"""Describes an invalid body: one line that names the field, its value and the accepted values."""

from __future__ import annotations

import re
import sys
from typing import Any

from farthing.server.errors import ApiError
from farthing.server.fields import HINT, UNKNOWN_TYPE, FieldError, missing, path_of, short, wrong


def describe_validation(errors: list[Any], content_type: str | None = None) -> ApiError:
    """Pydantic's first error as a 400. content_type: the request's header.

    For a field with several types, the error of the type that matched furthest.
    """
    field = errors[0]["loc"][:2]
    complaints = [error for error in errors if error["loc"][:2] == field]
    first = max(complaints, key=lambda error: len(error["loc"]))
    where = _where(first)
    cause = _unknown_type(first) if first["type"] == UNKNOWN_TYPE else first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        named = path_of((*where, *cause.path))
        return ApiError(400, f"{named or 'the body'}{cause.problem}", param=named or None, code=cause.code)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {cause or first['msg']}")
    if isinstance(first.get("input"), bytes):
        got = "is missing" if content_type is None else f"is {short(content_type)}"
        return ApiError(400, f"the header Content-Type {got}; expected 'application/json'")
    param = path_of(where) or None
    if first["type"] == "missing":
        return ApiError(
            400, f"{param or 'the body'} is missing", param=param, code="missing_required_parameter"
        )
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not a known field", param=param, code="unknown_parameter")
    if first["type"] == "value_error" and param is None:  # of the whole body; its message names the fields
        return ApiError(400, str(cause), code="invalid_value")
    accepted = dict.fromkeys(_accepted(error["msg"]) for error in complaints if _where(error) == where)
    expected = " or ".join(accepted).replace(" or expected ", " or ")
    message = f"{param or 'the body'}: got {short(first.get('input'))}; {expected}"
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, message, param=param, code=code)


def describe_unparsed(cause: BaseException | None) -> ApiError:
    """The error of `json.loads`, other than for bad syntax, as a 400."""
    if isinstance(cause, UnicodeDecodeError):
        byte = cause.object[cause.start]
        return ApiError(400, f"the body is not UTF-8: byte 0x{byte:02x} at offset {cause.start}")
    if isinstance(cause, ValueError):  # Python's limit, as the conversion takes quadratic time
        most = sys.get_int_max_str_digits()
        return ApiError(400, f"the body contains an integer of more than {most} digits", code="invalid_value")
    return ApiError(400, "the body is not JSON")


def _unknown_type(error: Any) -> FieldError:
    """The error of an object whose type is not accepted."""
    value, context = error["input"], error["ctx"]
    expected = context["accepted"]
    if not isinstance(value, dict):
        return wrong(got=value, expected="an object")
    if value.get("type") is None:
        return missing("type", why=f"expected {expected}")
    hint = context.get(f"{HINT}{value['type']}")
    return wrong("type", got=value["type"], expected=f"{expected}: {hint}" if hint else expected)


def _where(error: Any) -> list[str | int]:
    place, *rest = error["loc"] or ("body",)
    parts = rest if place in ("body", "query", "path") else error["loc"]
    return [part for part in parts if part != "body" and _is_field(part)]


_PHRASES = (
    (r" after validation, not .*| or instance of \w+|, unable to (parse|interpret) .*", ""),
    (r"^(Input|List|String|Tuple|Dictionary) should (be|have)", "expected"),
    (r"^String should match pattern '(.*)'$", r"expected a string that matches \1"),
    (r"less than or equal to", "at most"),
    (r"greater than or equal to", "at least"),
    (r"a valid dictionary( or object.*)?", "an object"),
    (r"\ba valid (?=[aeiou])", "an "),
    (r"a valid ", "a "),
)


def _accepted(message: str) -> str:
    """Pydantic's message as a clause, in the words of JSON."""
    message = message.removeprefix("Value error, ")
    for pattern, clause in _PHRASES:
        message = re.sub(pattern, clause, message)
    return message[:1].lower() + message[1:]


def _is_field(part: str | int) -> bool:
    """Whether a step of pydantic's path is a field or position instead of a union member."""
    if isinstance(part, int):
        return True
    is_class = part[:1].isupper()  # a model in a union; `schema.by_type` sees to that
    return part.isidentifier() and not is_class and part not in ("str", "int", "float", "bool")
