"""MCP servers of a configuration file, whose tools a model calls after a question: in the terminal, and on
the page. Both show the arguments as `described` has them."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from anyio.from_thread import start_blocking_portal

if TYPE_CHECKING:
    from mcp import Client, StdioServerParameters

_SECTION = "mcpServers"  # as in the files of other clients
REFUSED = "error: the user does not allow this call"
# Letters, signs and marks without a shape: fillers, joiners, inherent vowels, selectors of variants.
_BLANK = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_SHOWN = 2000  # characters at each end of a long value
_FIELDS = 10  # at each end of many: what is asked about stays on the screen


def default_file() -> Path:
    """Where the servers are read from, if the file exists."""
    return Path.home() / ".config" / "farthing" / "mcp.json"


class McpServers:
    """The servers of a file, connected while in `with`. Needs the extra `mcp`.

    The file is that of other clients: {"mcpServers": {NAME: {"command", "args", "env"} or {"url"}}}.
    """

    def __init__(self, file: Path) -> None:
        """Raises ValueError for a file that is none, OSError for one that cannot be read."""
        self._targets = {name: _target(file, name, each) for name, each in _read(file).items()}
        self._stack = ExitStack()
        self._owners: dict[str, tuple[str, Client]] = {}  # by tool: the name of its server
        self.tools: list[dict[str, Any]] = []  # as chat completions take them

    def __enter__(self) -> Self:
        """Start or connect every server. Raises RuntimeError that names the one that fails."""
        from mcp import Client

        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            for name, target in self._targets.items():
                try:
                    client = stack.enter_context(self._portal.wrap_async_context_manager(Client(target)))
                    self._offer(name, client)
                except Exception as error:  # whatever its transport raises
                    raise RuntimeError(f"MCP server {name!r}: {_first(error)}") from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def call(self, name: str, arguments: str) -> str:
        """The text that a tool returns, or what went wrong, for the model to read."""
        return self.start(name, arguments).result()

    def start(self, name: str, arguments: str) -> Future[str]:
        """`call`, of which nobody waits for the result; cancelling it ends the call."""
        return self._portal.start_task_soon(self._call, name, arguments)

    async def _call(self, name: str, arguments: str) -> str:
        if name not in self._owners:
            return f"error: no tool {name!r}; expected one of {', '.join(self._owners)}"
        try:
            result = await self._owners[name][1].call_tool(name, json.loads(arguments or "{}"))
        except Exception as error:  # of the arguments, the tool or the connection
            return f"error: {_first(error)}"
        content = (part.model_dump() for part in result.content)
        return "\n".join(part.get("text") or f"[{part['type']}]" for part in content)

    def server_of(self, tool: str) -> str | None:
        """The name of the server that has a tool; None if there is no such tool."""
        return self._owners[tool][0] if tool in self._owners else None

    def _offer(self, server: str, client: Client) -> None:
        for tool in self._portal.call(client.list_tools).tools:
            described = tool.model_dump(by_alias=True)
            if tool.name in self._owners:
                raise ValueError(f"tool {tool.name!r} is offered by two servers; expected different names")
            self._owners[tool.name] = server, client
            function = {"name": tool.name, "description": described.get("description") or ""}
            function["parameters"] = described["inputSchema"]
            self.tools.append({"type": "function", "function": function})


def _read(file: Path) -> dict[str, Any]:
    try:
        servers = json.loads(file.read_text(encoding="utf-8"))[_SECTION]
        return dict(servers.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: expected JSON with an object {_SECTION!r}: servers by name") from None


def _target(file: Path, name: str, entry: Any) -> str | StdioServerParameters:
    from mcp import StdioServerParameters

    if isinstance(entry, dict) and isinstance(entry.get("url"), str):
        return str(entry["url"])
    if isinstance(entry, dict) and isinstance(entry.get("command"), str):
        return StdioServerParameters(
            command=entry["command"], args=entry.get("args", []), env=entry.get("env")
        )
    raise ValueError(f"{file}: {_SECTION}.{name}: expected a `command` with `args`, or a `url`")


def _first(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # of the library's task groups
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".partition("\n")[0]


# The question before a call.


def escaped(text: str) -> str:
    """A text in one line whose characters are all visible: nothing in it moves, hides or reverses others."""
    shown = (each.isprintable() and not _BLANK.match(each) for each in text)
    return "".join(each if seen else ascii(each)[1:-1] for each, seen in zip(text, shown, strict=True))


def described(arguments: str) -> list[str]:
    """The fields of a call's arguments, one a line, as a tool gets them. Of very long values and of very many
    fields the middle is left out, and it is said."""
    try:
        fields = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return [f"no JSON: {_shortened(escaped(arguments))}"]
    if not isinstance(fields, dict):
        return [f"no object: {_shortened(escaped(arguments))}"]
    lines = [
        f"{_shortened(escaped(name))}: {_shortened(escaped(json.dumps(value, ensure_ascii=False)))}"
        for name, value in fields.items()
    ]
    more = len(lines) - 2 * _FIELDS
    return lines if more <= 0 else [*lines[:_FIELDS], f"[… {more} fields …]", *lines[-_FIELDS:]]


def _shortened(text: str) -> str:
    left_out = len(text) - 2 * _SHOWN
    return text if left_out <= 0 else f"{text[:_SHOWN]} [… {left_out} characters …] {text[-_SHOWN:]}"
