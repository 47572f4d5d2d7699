"""A conversation with a server over HTTP, and the server that it is with: a running one, or one to start."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NoReturn
from urllib.parse import urlsplit

Message = dict[str, Any]
_SOCKETS = tuple(Path("/proc/net", name) for name in ("tcp", "tcp6"))
ADDRESS = "http://127.0.0.1:8000"  # where `farthing serve` listens
_CONNECT_SECONDS = 5.0
_CONTINUED = 200  # tokens that a base model writes
_START_SECONDS = 3600.0  # of a large model that is packed first
_END_SECONDS = 40.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer as it arrives."""

    kind: Literal["reasoning", "text"]
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of a whole answer; arguments as the model wrote them."""

    id: str
    name: str
    arguments: str


class Unauthorized(ValueError):
    """The server wants a key, or another one."""


class Server:
    """An OpenAI-compatible server."""

    def __init__(self, url: str, key: str | None = None, named: bool = True) -> None:
        """url: with or without /v1. named: by the user; otherwise any user of the machine may listen there,
        and the key is for processes of this one."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server: got {url!r}; expected an address such as {ADDRESS}")
        self._parts = parts
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._key, self._named = key, named
        self.url = f"{parts.scheme}://{parts.netloc}{self._base}"
        self._stopped = False  # by Ctrl-C

    def models(self) -> dict[str, str]:
        """The names of the models served, each with its state where there are several. Raises OSError or
        ValueError."""
        with self._answer("GET", "/v1/models", None, _CONNECT_SECONDS) as answer:
            return {str(each["id"]): str(each.get("state", "")) for each in json.loads(answer.read())["data"]}

    def model(self, name: str | None) -> str:
        """The name of a model that is served; None: of a loaded one, or else of the first. Raises OSError or
        ValueError."""
        if not (served := self.models()):
            raise ValueError(f"{self.url} serves no model")
        if name is None:
            return next((each for each, state in served.items() if state == "loaded"), next(iter(served)))
        if name not in served:
            raise ValueError(f"model: got {name!r}; expected one of {', '.join(served)}")
        return name

    def ready(self) -> bool:
        """Whether requests are accepted."""
        with suppress(OSError, ValueError), self._answer("GET", "/ready", None, _CONNECT_SECONDS):
            return True
        return False

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed completion; leaving the loop ends the request.

        Raises OSError for a connection, ValueError with the server's message for an error, and
        KeyboardInterrupt after Ctrl-C.
        """
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        with self._answer("POST", path, body, None) as answer:
            for line in _lines(answer):
                if self._stopped:
                    return
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return
                if not data.startswith("{"):  # a blank line or a comment that keeps the connection alive
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(str(event["error"].get("message", event["error"])))
                yield event

    @property
    def withholds(self) -> bool:
        """Whether it has a key that is not sent, because somebody else listens at the address."""
        return bool(self._key) and not (self._named or _is_own(self._parts.port or 80))

    def withheld(self, naming: str) -> str:
        """What the user is told of it. naming: how a command names the address."""
        return (
            f"not sent to {self.url}, where another user's process may listen; to send it, name the "
            f"address: {naming}"
        )

    def _headers(self) -> dict[str, str]:
        key = {} if self._key is None or self.withholds else {"Authorization": f"Bearer {self._key}"}
        return {"Content-Type": "application/json", **key}

    @contextmanager
    def _answer(
        self, method: str, path: str, body: dict[str, Any] | None, seconds: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname
        connection = kind(self._parts.hostname, self._parts.port, timeout=seconds)
        try:
            connection.connect()
            with self._until_stopped(connection.sock):
                text = None if body is None else json.dumps(body)
                connection.request(method, self._base + path, text, self._headers())
                answer = connection.getresponse()
                if answer.status != 200:
                    said = _message(answer.read(), f"{self.url}{path}: {answer.status} {answer.reason}")
                    raise Unauthorized(said) if answer.status == 401 else ValueError(said)
                yield answer
        except http.client.HTTPException as error:
            raise ConnectionError(f"{self.url}: {error!r}") from error
        except OSError as error:
            raise type(error)(f"{self.url}: {error}") from error
        finally:
            connection.close()

    @contextmanager
    def _until_stopped(self, connection: socket.socket) -> Iterator[None]:
        """Ctrl-C ends a connection, and raises KeyboardInterrupt here once that was noticed.

        Python's own handler raises it wherever the main thread is, and if that is in a destructor or in a
        callback of the garbage collector, it is lost.
        """

        def stop(*_: object) -> None:
            self._stopped = True
            with suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)

        self._stopped = False
        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            if self._stopped:
                raise KeyboardInterrupt


def _lines(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """The lines of a stream, which says itself when it is complete. Raises ConnectionError at its end."""
    with suppress(ConnectionResetError):
        yield from answer
    raise ConnectionError("the connection ended amid an answer")


def _message(body: bytes, otherwise: str) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"]["message"])
    return otherwise


@dataclass(slots=True)
class Conversation:
    """The messages so far, and how the next answer is requested."""

    server: Server
    model: str
    tools: Sequence[dict[str, Any]] = ()
    system: str = ""
    base: bool = False  # the model continues texts: every message is one, on its own
    effort: str | None = None  # reasoning_effort; None: the model's own
    sampling: dict[str, float | int | None] = field(default_factory=dict)  # None: the model's own
    messages: list[Message] = field(default_factory=list)
    reasoning: str = ""  # of the last answer
    usage: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> Iterator[Piece]:
        """Add the user's message and stream the answer."""
        self.messages.append({"role": "user", "content": text})
        return self.answer()

    def answer(self) -> Iterator[Piece]:
        """Stream the answer to the messages so far, and add it to them; as much as arrived, if the loop is
        left early. Without any answer the user's message is taken back."""
        parts: dict[str, list[str]] = {"reasoning": [], "text": []}
        calls: dict[int, dict[str, str]] = {}
        whole = False
        self.usage = {}
        try:
            for event in self.server.stream(self._body()):
                self.usage = event.get("usage") or self.usage
                for choice in event.get("choices", ())[:1]:
                    delta = {"content": choice.get("text")} if self.base else choice.get("delta")
                    yield from _pieces(delta or {}, parts, calls)
            whole = True
        finally:
            self._keep("".join(parts["text"]), "".join(parts["reasoning"]), calls if whole else {})

    @property
    def calls(self) -> list[Call]:
        """The tool calls of the last message that have no result yet."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return []
        made = self.messages[-1].get("tool_calls", ())
        return [Call(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in made]

    def add_results(self, results: Sequence[tuple[Call, str]]) -> None:
        """Add what tools returned."""
        for call, text in results:
            self.messages.append({"role": "tool", "tool_call_id": call.id, "content": text})

    def clear(self) -> None:
        """Begin a new conversation with the same settings."""
        self.messages.clear()
        self.reasoning, self.usage = "", {}

    def markdown(self) -> str:
        """The conversation as a document."""
        titles = {"user": "You", "assistant": self.model, "tool": "Tool", "system": "System"}
        texts = ((titles[m["role"]], str(m.get("content") or "")) for m in self._all())
        return "\n\n".join(f"## {title}\n\n{text}" for title, text in texts) + "\n"

    def _all(self) -> list[Message]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def _body(self) -> dict[str, Any]:
        options = {"stream_options": {"include_usage": True}, "x_farthing": True}
        body = {"model": self.model, "stream": True, **options}
        body |= {name: value for name, value in self.sampling.items() if value is not None}
        if self.base:
            return {"max_tokens": _CONTINUED} | body | {"prompt": self.messages[-1]["content"]}
        body |= {"messages": self._all()}
        body |= {"tools": list(self.tools)} if self.tools else {}
        return body | ({"reasoning_effort": self.effort} if self.effort else {})

    def _keep(self, text: str, reasoning: str, calls: dict[int, dict[str, str]]) -> None:
        self.reasoning = reasoning
        if not (text or reasoning or calls):
            while self.messages and self.messages[-1]["role"] == "user":
                self.messages.pop()
            return
        message: Message = {"role": "assistant", "content": text}
        if reasoning:  # formats that keep reasoning across turns want it back
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                {"id": c["id"], "type": "function", "function": {k: c[k] for k in ("name", "arguments")}}
                for c in calls.values()
            ]
        self.messages.append(message)


def _pieces(
    delta: dict[str, Any], parts: dict[str, list[str]], calls: dict[int, dict[str, str]]
) -> Iterator[Piece]:
    """Collect a delta, and yield what of it is shown while it arrives."""
    if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
        parts["reasoning"].append(reasoning)
        yield Piece("reasoning", reasoning)
    if text := delta.get("content"):
        parts["text"].append(text)
        yield Piece("text", text)
    for part in delta.get("tool_calls") or ():
        call = calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
        function = part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""


# A server to talk to.


def find(model: str | None, key: str | None) -> tuple[Server, str] | None:
    """A server that listens at the usual address (FARTHING_URL) and serves the model, and its name there.

    Raises Unauthorized if it wants the key, and is not a process of this user.
    """
    named = os.environ.get("FARTHING_URL")
    server = Server(named or ADDRESS, key, named=bool(named))
    try:
        name = server.model(model)
        return (server, name) if server.ready() else None
    except Unauthorized:
        if not server.withholds:
            return None
        raise Unauthorized(f"api_key: {server.withheld(f'farthing chat {server.url}')}") from None
    except (OSError, ValueError, KeyError):
        return None


_LISTENING = "0A"  # the state of a socket in /proc/net/tcp


def _is_own(port: int) -> bool:
    """Whether all sockets that listen on a port are this user's or the system's; False if nothing tells."""
    owners: set[int] = set()
    for table in _SOCKETS:
        with suppress(OSError, ValueError, IndexError):
            for line in table.read_text(encoding="ascii").splitlines()[1:]:
                _, local, _, state, _, _, _, user, *_ = line.split()
                if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                    owners.add(int(user))
    return bool(owners) and owners <= {0, os.getuid()}


@contextmanager
def started(model: str, options: Sequence[str], say: Callable[[str], object]) -> Iterator[Server]:
    """Start `farthing serve MODEL OPTIONS` on a free port, and end it on exit. say: shows what it does.

    Raises ChildProcessError with its error if it does not become ready.
    """
    command = [sys.executable, "-m", "farthing", "serve", model, "--port", "0", *options]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
        before = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            yield _when_ready(process, lambda: _read(log), say)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _exit(number: int, _: object) -> NoReturn:
    """Ends the server, too, where the terminal is closed."""
    sys.exit(128 + number)


def _read(log: IO[str]) -> str:
    return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")


def _when_ready(
    process: subprocess.Popen[bytes], read: Callable[[], str], say: Callable[[str], object]
) -> Server:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        lines = [re.sub(r"^\S+ \S+ [A-Z]+ ", "", line) for line in read().splitlines()]
        if process.poll() is not None:
            error = next((line for line in reversed(lines) if line.startswith("error: ")), "")
            raise ChildProcessError(
                error.removeprefix("error: ") or "\n".join(lines[-5:]) or "the server ended"
            )
        url = next((line.split()[-1] for line in lines if line.startswith("listening on ")), None)
        if url is not None and Server(url).ready():
            return Server(url)
        if lines:
            say(lines[-1])
        time.sleep(0.05)
    raise ChildProcessError(f"the server was not ready after {_START_SECONDS:.0f} s")
