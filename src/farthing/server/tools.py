"""Tools of MCP servers for the page of a server that only this machine can reach: no call without a question.

    GET /dashboard/tools              the tools, as chat completions take them, and their servers
    POST /dashboard/tools/question    {"name", "arguments"}: what to ask the user about a call
    POST /dashboard/tools/call        {"question": ID}: make the call of a question, once

The call is that of the question, so that what was shown is what a tool gets.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from farthing.mcp import McpServers, described, escaped
from farthing.server.access import require_own_page
from farthing.server.config import ServerConfig
from farthing.server.errors import ApiError, ClientGone
from farthing.server.jobs import unless_gone
from farthing.server.schema import Strict, describe_validation, short

log = logging.getLogger("farthing.server")

_OPEN = 64  # questions without an answer; the oldest are dropped
_GONE = 499  # as `app.CLIENT_CLOSED`
_B = TypeVar("_B", bound=Strict)


class _Wanted(Strict):
    name: str
    arguments: str = ""


class _Allowed(Strict):
    question: str


@contextmanager
def page_routes(config: ServerConfig) -> Iterator[list[Route]]:
    """The routes for the servers of the configuration's file, connected meanwhile; none if it names no file.
    Raises as `McpServers` does."""
    if config.mcp is None:
        yield []
        return
    with McpServers(Path(config.mcp)) as servers:
        log.info("the page offers %d tools of MCP servers", len(servers.tools))
        yield PageTools(config, servers).routes()


class PageTools:
    """What the page asks for tools. Used in the event loop."""

    def __init__(self, config: ServerConfig, servers: McpServers) -> None:
        self._config, self._servers = config, servers
        self._questions: dict[str, _Wanted] = {}

    def routes(self) -> list[Route]:
        """A route each."""
        return [
            Route("/dashboard/tools", self.tools),
            Route("/dashboard/tools/question", self.question, methods=["POST"]),
            Route("/dashboard/tools/call", self.call, methods=["POST"]),
        ]

    async def tools(self, request: Request) -> Response:
        """All of them."""
        self._check(request)
        server_of = self._servers.server_of
        tools = [{"server": server_of(t["function"]["name"]), "tool": t} for t in self._servers.tools]
        return JSONResponse({"tools": tools})

    async def question(self, request: Request) -> Response:
        """A call's server, tool and arguments as lines whose characters are all visible."""
        self._check(request)
        wanted = await _body(request, _Wanted)
        server = self._servers.server_of(wanted.name)
        if server is None:
            raise ApiError(404, f"name: got {short(wanted.name)}; expected a tool", code="unknown_tool")
        while len(self._questions) >= _OPEN:
            del self._questions[next(iter(self._questions))]
        self._questions[identity := uuid.uuid4().hex] = wanted
        said = {"server": escaped(server), "tool": escaped(wanted.name), "lines": described(wanted.arguments)}
        return JSONResponse({"question": identity, **said})

    async def call(self, request: Request) -> Response:
        """The text of a tool's result. The call ends with its client."""
        self._check(request)
        wanted = self._questions.pop((await _body(request, _Allowed)).question, None)
        if wanted is None:
            why = "the question is no longer open; ask again"
            raise ApiError(404, why, param="question", code="unknown_question")
        try:
            running = self._servers.start(wanted.name, wanted.arguments)
            return JSONResponse({"text": await unless_gone(asyncio.wrap_future(running))})
        except ClientGone:
            return Response(status_code=_GONE)

    def _check(self, request: Request) -> None:
        require_own_page(self._config, request, "tools are not called here", "`farthing chat --mcp FILE`")


async def _body(request: Request, kind: type[_B]) -> _B:
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        content_type = request.headers.get("content-type")
        raise describe_validation(list(error.errors()), content_type) from error
