"""Errors in the format of the API that was called, with the types and codes of its publisher.

OpenAI: {"error": {"message", "type", "param", "code"}}. Anthropic, for /v1/messages: {"type": "error",
"error": {"type", "message"}}. Both have the header X-Error-Code, the code or this server's own reason, for
gateways and operators.
"""

from __future__ import annotations

import json
import re
from reprlib import Repr
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_OPENAI_TYPES = {429: "requests", 503: "service_unavailable_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {405: "method_not_supported", 429: "rate_limit_exceeded"}  # of OpenAI's errors that give no other
_SHORT = Repr()  # writes only the beginning of a large value
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
ANTHROPIC_PATH = "/v1/messages"
CODE_HEADER = "X-Error-Code"
UNAUTHORIZED_HEADERS = {"WWW-Authenticate": "Bearer"}


class ApiError(Exception):
    """An error response.

    code, kind: OpenAI's code and type. reason: this server's own name for the error. retry_after: whole
    seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        reason: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status)
        fault = "invalid_request_error" if status < 500 else "server_error"
        self.kind = kind or _OPENAI_TYPES.get(status, fault)
        self.reason = reason or self.code
        self.retry_after = retry_after

    def payload(self) -> dict[str, Any]:
        """The JSON document."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def body(self, path: str = "") -> str:
        """The document as ASCII JSON, because a message may quote characters that UTF-8 cannot encode."""
        return json.dumps(anthropic_payload(self) if is_anthropic(path) else self.payload())

    def response(self, path: str = "") -> Response:
        """The HTTP response to a request of this path."""
        headers = dict(UNAUTHORIZED_HEADERS) if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.reason is not None:
            headers[CODE_HEADER] = self.reason
        return Response(self.body(path), self.status, headers, media_type="application/json")


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/")


def anthropic_payload(error: ApiError) -> dict[str, Any]:
    """The JSON document of /v1/messages."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


async def send_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Respond from a middleware."""
    await error.response(scope["path"])(scope, receive, send)


def describe_validation(errors: list[Any]) -> ApiError:
    """Pydantic's first error as a 400 that names the field, the value and the accepted values.

    For a field with several types, the error of the type that matched furthest.
    """
    field = errors[0]["loc"][:2]
    complaints = [error for error in errors if error["loc"][:2] == field]
    first = max(complaints, key=lambda error: len(error["loc"]))
    where = _where(first)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if isinstance(first.get("input"), bytes):
        return ApiError(400, "the body has no Content-Type of JSON; expected Content-Type: application/json")
    param = ".".join(where) or None
    if first["type"] == "missing":
        return ApiError(
            400, f"{param or 'the body'} is missing", param=param, code="missing_required_parameter"
        )
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not a known field", param=param, code="unknown_parameter")
    if first["type"] == "value_error" and param is None:  # of the whole body; its message names the fields
        return ApiError(400, str(first["ctx"]["error"]), code="invalid_value")
    value = _SHORT.repr(first.get("input"))
    value = value if len(value) <= 80 else value[:77] + "..."
    accepted = dict.fromkeys(_accepted(error["msg"]) for error in complaints if _where(error) == where)
    message = f"{param or 'the body'}: got {value}; {' or '.join(accepted).replace(' or expected ', ' or ')}"
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, message, param=param, code=code)


def _where(error: Any) -> list[str]:
    place, *rest = error["loc"] or ("body",)
    parts = rest if place in ("body", "query", "path") else error["loc"]
    return [str(part) for part in parts if part != "body" and _is_field(part)]


def _accepted(message: str) -> str:
    """Pydantic's message as a clause, in the words of JSON."""
    message = re.sub(
        r" after validation, not .*| or instance of \w+|, unable to (parse|interpret) .*",
        "",
        message.removeprefix("Value error, "),
    )
    message = re.sub(r"^(Input|List|String|Tuple) should (be|have)", r"expected", message)
    message = re.sub(r"a valid dictionary( or object.*)?", "an object", message)
    message = re.sub(r"\ba valid (?=[aeiou])", "an ", message).replace("a valid ", "a ")
    return message[:1].lower() + message[1:]


def _is_field(part: str | int) -> bool:
    """Whether a step of pydantic's path is a field or position instead of a union member."""
    if isinstance(part, int):
        return True
    is_class = part[:1].isupper()  # a model in a union
    return part.isidentifier() and not is_class and part not in ("str", "int", "float", "bool")
