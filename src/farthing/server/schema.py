"""Base classes and checks of request bodies, and the one line that names a wrong field."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import Repr
from types import NoneType
from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from farthing.server.errors import ApiError

# What clients of each API call the fields that errors name.


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The names of fields with a common meaning; the defaults are those of /v1/chat/completions."""

    prompt: str = "messages"
    max_tokens: str = "max_tokens"
    effort: str = "reasoning_effort"
    thinking: str = "thinking"
    budget: str = "max_thinking_tokens"
    structured: str = "structured_outputs"


CHAT = FieldNames()
COMPLETIONS = FieldNames(prompt="prompt")
MESSAGES = FieldNames(
    effort="output_config.effort", budget="thinking.budget_tokens", structured="output_config.format.schema"
)
RESPONSES = FieldNames(
    prompt="input", max_tokens="max_output_tokens", effort="reasoning.effort", structured="text.format.schema"
)

_STRUCTURED = re.compile(r"^structured_outputs(\.\w+)?")  # the engine's name of every constraint


def about_grammar(message: str, field: str) -> str:
    """The engine's error about a grammar, in terms of the field that the client sent."""
    if field != "tools":
        return message if field == COMPLETIONS.structured else _STRUCTURED.sub(field, message)
    why = message.partition("%llguidance")[0].removesuffix(" 1 | ").rpartition(": failed to ")[2]
    why = re.sub(r"^structured_outputs\.\w+ is not accepted: ", "", why)
    return f"tools: the schema of a tool is not accepted: {why}"


# How errors name the fields of a body: their paths, and what validators refuse.

_SHORT = Repr()  # writes only the beginning of a large value
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: Any) -> str:
    """The beginning of a value, for errors."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def path_of(steps: Iterable[str | int]) -> str:
    """Fields and positions as one name: messages[0].content[2].type."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return path.removeprefix(".")


def one_of(words: Iterable[str]) -> str:
    """The accepted words, for errors."""
    listed = [repr(word) for word in words]
    return f"one of {', '.join(listed)}" if len(listed) > 1 else "".join(listed)


def words(*lines: str) -> frozenset[str]:
    """The words of some lines."""
    return frozenset(word for line in lines for word in line.split())


class FieldError(ValueError):
    """A field that a validator refuses.

    path: from the object that is validated to the field. problem: continues the field's name in the message.
    """

    def __init__(self, *path: str | int, problem: str, code: str = "invalid_value") -> None:
        super().__init__(path_of(path) + problem)
        self.path, self.problem, self.code = path, problem, code


def wrong(*path: str | int, got: Any, expected: str) -> FieldError:
    """The error of a field with a value that is not accepted."""
    return FieldError(*path, problem=f": got {short(got)}; expected {expected}")


def missing(*path: str | int, why: str = "") -> FieldError:
    """The error of a field that is missing. why: what it depends on."""
    problem = f" is missing; {why}" if why else " is missing"
    return FieldError(*path, problem=problem, code="missing_required_parameter")


HINT = "hint:"
UNKNOWN_TYPE = "unknown_type"  # pydantic's type of the errors of `by_type`


class _ByType(Discriminator):
    """Hashable, as parts of a union must be, although its context is not."""

    __hash__ = object.__hash__


def by_type(*classes: type[BaseModel], hints: Mapping[str, str] | None = None) -> Discriminator:
    """Chooses the class of an object by its `type`. Each class is tagged with its own name.

    hints: reasons why types that clients use elsewhere are not accepted.
    """
    tags = {
        kind: each.__name__ for each in classes for kind in get_args(each.model_fields["type"].annotation)
    }

    def choose(value: Any) -> str | None:
        if isinstance(value, BaseModel):
            return type(value).__name__
        kind = value.get("type") if isinstance(value, dict) else None
        return tags.get(kind) if isinstance(kind, str) else None

    context = {f"{HINT}{kind}": why for kind, why in (hints or {}).items()}
    context["accepted"] = one_of(tags)
    return _ByType(choose, UNKNOWN_TYPE, "no known type", dict(context))


TEXT_ONLY = dict.fromkeys(
    ("image", "image_url", "input_image", "document", "file", "input_file", "input_audio", "video_url"),
    "the model reads text only; the vision part of multimodal models is not served",
)


log = logging.getLogger("farthing.server")

HEAVY = "farthing.heavy"  # key in the scope of a request whose body has many values
_MAX_NAMES = 64  # distinct names that clients can add to the log and the metric
OTHER = "other"
_PLAIN = (str, int, float, NoneType, dict)  # values without declared fields
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

    async def check(self, body: BaseModel, scope: Mapping[str, Any]) -> None:
        """Count a body's unknown fields. If strict, raises ApiError (400) for the first one.

        A heavy body is checked in an iteration of the event loop of its own, between parsing and conversion.
        """
        if scope.get(HEAVY):
            await asyncio.sleep(0)
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
        if scope.get(HEAVY):
            await asyncio.sleep(0)

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


def unknown(value: Any) -> list[_Path]:
    """Paths of the undeclared fields of a body and of the objects within it."""
    if isinstance(value, list):  # long lists are token ids
        inner = ((at, unknown(item)) for at, item in enumerate(value) if not isinstance(item, _PLAIN))
        return [(at, *path) for at, paths in inner for path in paths]
    if not isinstance(value, Strict):
        return []
    extra = value.model_extra or {}
    # SDKs send back all they received, even null.
    found: list[_Path] = [(n,) for n, each in extra.items() if each is not None and n not in value.known]
    for name, each in vars(value).items():
        if not isinstance(each, _PLAIN) and (paths := unknown(each)):
            found += [(name, *path) for path in paths]
    return found


# Describes an invalid body: one line that names the field, its value and the accepted values.


def wrong_type(content_type: str | None) -> ApiError:
    """Of a body that is not declared as JSON. Web pages of other origins cannot send one that is."""
    got = "is missing" if content_type is None else f"is {short(content_type)}"
    return ApiError(400, f"the header Content-Type {got}; expected 'application/json'")


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
        return wrong_type(content_type)
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
    is_class = part[:1].isupper()  # a model in a union; `by_type` sees to that
    return part.isidentifier() and not is_class and part not in ("str", "int", "float", "bool")


# Checks of tools: the JSON schemas of their parameters, their names, and the choice among them.

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ONE = words(
    "additionalItems additionalProperties contains else if items not propertyNames then",
    "unevaluatedItems unevaluatedProperties",
)
_LISTED = words("allOf anyOf oneOf prefixItems")
_NAMED = words("$defs definitions dependentSchemas patternProperties properties")


def check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself. Raises FieldError if it, or a schema within it, cannot be one of arguments."""
    kind = schema.get("type")
    if kind is not None and "object" not in (kind if isinstance(kind, list) else [kind]):
        raise wrong("type", got=kind, expected="'object': arguments are an object")
    _check(schema, ())
    return schema


def _check(schema: Any, path: _Path) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise wrong(*path, got=schema, expected="a schema: an object or a boolean")
    _check_type(schema.get("type"), path)
    required = schema.get("required")
    if required is not None and not _are_names(required):
        raise wrong(*path, "required", got=required, expected="a list of names")
    for key, value in schema.items():
        if value is not None:
            for inner, step in _inner(key, value, path):
                _check(inner, step)


def _check_type(kind: Any, path: _Path) -> None:
    kinds = kind if isinstance(kind, list) else [kind]
    if kind is not None and (not kinds or any(each not in TYPES for each in kinds)):
        raise wrong(*path, "type", got=kind, expected=f"{one_of(TYPES)}, or a list of them")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _inner(key: str, value: Any, path: _Path) -> Iterator[tuple[Any, _Path]]:
    """The schemas that a keyword contains, with their paths."""
    if key in _NAMED:
        if not isinstance(value, dict):
            raise wrong(*path, key, got=value, expected="an object of schemas")
        yield from ((inner, (*path, key, name)) for name, inner in value.items())
    elif key in _LISTED or (key == "items" and isinstance(value, list)):
        if not isinstance(value, list):
            raise wrong(*path, key, got=value, expected="a list of schemas")
        yield from ((inner, (*path, key, at)) for at, inner in enumerate(value))
    elif key in _ONE:
        yield value, (*path, key)


Parameters = Annotated[dict[str, Any], AfterValidator(check_parameters)]


def check_choice(
    names: list[str], chosen: list[str], *, required: bool, tools: str = "tools", choice: str = "tool_choice"
) -> None:
    """Raises FieldError for two tools of one name, and for choices that the tools do not allow.

    tools, choice: the names of the fields.
    """
    seen: set[str] = set()
    for position, name in enumerate(names):
        if name in seen:
            raise FieldError(
                tools, position, problem=f" is another tool named {short(name)}; expected one of each name"
            )
        seen.add(name)
    if required and not names:
        raise FieldError(choice, problem=f" requires a call, but {tools} is empty")
    for name in chosen:
        if name not in seen:
            raise FieldError(choice, problem=f" names {short(name)}, which {tools} does not define")
