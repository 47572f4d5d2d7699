"""`farthing chat`: talk to a model in the terminal; `farthing run`: download, fit and serve it first."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from farthing.cli.conversation import Conversation, Piece, Server, find, started
from farthing.cli.errors import one_line_errors, sampling_option
from farthing.cli.offered import base_note, named
from farthing.cli.tables import step_progress
from farthing.config import EngineConfig
from farthing.files import replace_text
from farthing.hub import find_model
from farthing.mcp import REFUSED, McpServers, default_file, described, escaped
from farthing.memory import available_memory
from farthing.planner.fit import fit

if TYPE_CHECKING:
    from farthing.cli.conversation import Call

HELP = """\
/model NAME      talk to another model of the server; without NAME list them
/system TEXT     set the system prompt; without TEXT show it
/think LEVEL     on, off, or an effort such as low; without LEVEL the model's own
/thoughts        show the reasoning of the last answer
/save FILE       write the conversation as JSON, or as Markdown to a name that ends in .md
/clear           begin a new conversation
/bye             end; so does Ctrl-D
\"\"\"              begins and ends a message of several lines; so does a \\ at the end of a line
Ctrl-C           stops an answer"""
_FENCE = "```"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SEQUENCES = 2  # of one person's conversations; `farthing serve` has room for many
_OPTIONS = ("--fit", "--max-num-seqs", str(_SEQUENCES))
_MOST_CALLS = 25  # rounds of tool calls per message


class Screen:
    """The terminal, or plain text where stdout is none."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.formatted = self.console.is_terminal
        self._always: set[tuple[str, str]] = set()  # servers and tools that need no question any more

    def read(self) -> str:
        """A message or a command. Raises EOFError at the end."""
        line = input(">>> ")
        if line.startswith('"""'):
            lines = [line[3:]]
            while '"""' not in lines[-1]:
                lines.append(input("... "))
            lines[-1] = lines[-1].partition('"""')[0]
            return "\n".join(lines).strip()
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input("... ")
        return line.strip()

    def say(self, text: str) -> None:
        """A line about the conversation."""
        self.console.print(Text(printable(text), style="dim"), soft_wrap=True)

    def error(self, error: Exception) -> None:
        """What went wrong, in one line."""
        self.console.print(Text(printable(f"error: {error}"), style="red"), soft_wrap=True)

    def show(self, pieces: Iterator[Piece]) -> None:
        """An answer as it arrives."""
        if not self.formatted:
            for piece in pieces:
                if piece.kind == "text":
                    print(piece.text, end="", flush=True)
            print()
            return
        rest, thought, began = "", 0, time.monotonic()
        with Live(console=self.console, refresh_per_second=10, transient=True) as live:
            for piece in pieces:
                if piece.kind == "reasoning":
                    thought += 1
                    live.update(Text(f"thinking … {thought} tokens", style="dim"))
                    continue
                if thought and not rest:
                    live.console.print(Text(self._thought(time.monotonic() - began), style="dim"))
                    thought = 0
                whole, rest = split_blocks(rest + printable(piece.text))
                if whole:
                    live.console.print(Markdown(whole))
                live.update(Markdown(rest))
        if thought:
            self.say(self._thought(time.monotonic() - began))
        if rest.strip():
            self.console.print(Markdown(rest))

    @staticmethod
    def _thought(seconds: float) -> str:
        return f"thought for {seconds:.1f} s (/thoughts shows it)"

    def allowed(self, call: Call, server: str) -> bool:
        """Whether the user lets a tool of a server run. Shows what it gets, not how that was written."""
        lines = [f"{escaped(call.name)} of {escaped(server)}", *described(call.arguments)]
        self.console.print(Text("\n  ".join(lines), style="yellow"), soft_wrap=True)
        if (server, call.name) in self._always:
            return True
        try:
            said = input("call it? [y]es, [n]o, [a]lways: ").strip().lower()
        except EOFError:
            return False
        if said.startswith("a"):
            self._always.add((server, call.name))
        return said.startswith(("y", "a"))


def printable(text: str) -> str:
    """A text without control characters, with which a model or a tool could change the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def split_blocks(text: str) -> tuple[str, str]:
    """(whole blocks of Markdown, the block that still grows). An empty line outside code ends a block."""
    end = at = 0
    fenced = False
    for line in text.splitlines(keepends=True):
        at += len(line)
        if line.lstrip().startswith(_FENCE):
            fenced = not fenced
        elif not line.strip() and line.endswith("\n") and not fenced:
            end = at
    return text[:end], text[end:]


def converse(talk: Conversation, screen: Screen, servers: McpServers | None) -> None:
    """Read, answer, until the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history in `input`
    screen.say(f"talking to {talk.model}; /? for help")
    while True:
        try:
            said = screen.read()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            screen.say("Ctrl-D or /bye ends the conversation")
            continue
        if said == "/bye":
            return
        if said.startswith("/"):
            obey(said, talk, screen)
        elif said:
            reply(talk, said, screen, servers)


def obey(line: str, talk: Conversation, screen: Screen) -> None:
    """A command of the user."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/system":
        talk.system = rest or talk.system
        screen.say(f"system prompt: {talk.system or 'none'}")
    elif name == "/think":
        talk.effort = {"": None, "on": "high", "off": "none"}.get(rest, rest)
        screen.say(f"reasoning effort: {talk.effort or 'the default of the model'}")
    elif name == "/thoughts":
        screen.say(talk.reasoning or "the last answer has no reasoning")
    elif name == "/clear":
        talk.clear()
        screen.say("a new conversation")
    elif name == "/model":
        switch(talk, rest, screen)
    elif name == "/save" and rest:
        save(talk, Path(rest).expanduser(), screen)
    else:
        screen.say(HELP)


def switch(talk: Conversation, name: str, screen: Screen) -> None:
    """Go on with another model; without a name, list the server's."""
    try:
        if name:
            talk.model = talk.server.model(name)
        served = talk.server.models()
    except (OSError, ValueError) as error:
        screen.error(error)
        return
    for each, state in served.items():
        screen.say(f"{'*' if each == talk.model else ' '} {each}{f'  {state}' if state else ''}")


def save(talk: Conversation, file: Path, screen: Screen) -> None:
    """Write the conversation."""
    document = {"model": talk.model, "system": talk.system, "messages": talk.messages}
    text = talk.markdown() if file.suffix == ".md" else json.dumps(document, indent=1, ensure_ascii=False)
    try:
        replace_text(file, text)
    except OSError as error:
        screen.say(f"{file}: {error.strerror}")
    else:
        screen.say(f"saved {len(talk.messages)} messages to {file}")


def reply(talk: Conversation, said: str, screen: Screen, servers: McpServers | None) -> bool:
    """Show the answer to a message, calling tools as it asks and the user allows. False after an error."""
    pieces, began = talk.say(said), time.monotonic()
    try:
        for _ in range(_MOST_CALLS):
            screen.show(pieces)
            if not (calls := talk.calls) or servers is None:
                break
            talk.add_results([(call, _result(call, servers, screen)) for call in calls])
            pieces = talk.answer()
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]  # a generator, which ends the request
        _forget_calls(talk)
        screen.say("(stopped)")
        return True
    except (OSError, ValueError) as error:
        screen.error(error)
        return False
    if screen.formatted:
        screen.say(_account(talk, time.monotonic() - began))
    return True


def _result(call: Call, servers: McpServers, screen: Screen) -> str:
    server = servers.server_of(call.name)
    if server is not None and not screen.allowed(call, server):
        return REFUSED
    return servers.call(call.name, call.arguments)


def _forget_calls(talk: Conversation) -> None:
    """Calls without results, which no server accepts as the end of a conversation."""
    if talk.calls:
        del talk.messages[-1]["tool_calls"]


def _account(talk: Conversation, seconds: float) -> str:
    """Tokens, speed and price of the last answer."""
    usage = talk.usage
    made = int(usage.get("completion_tokens", 0))
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    parts = [f"{made} tokens, {made / seconds:.1f}/s"] if made else []
    parts += [f"{usage['prompt_tokens']} of prompt, {cached} cached"] if "prompt_tokens" in usage else []
    cost = (usage.get("x_farthing") or {}).get("usd")
    parts += [f"${cost:.6f}"] if isinstance(cost, float) else []
    return "; ".join(parts)


# The commands.

chat_app = typer.Typer(add_completion=False)
run_app = typer.Typer(add_completion=False)

_Key = Annotated[
    str | None, typer.Option("--api-key", envvar="FARTHING_API_KEY", help="Key of a running server.")
]
_System = Annotated[str, typer.Option("--system", help="System prompt.")]
_Think = Annotated[str | None, typer.Option("--think", help="on, off, or an effort such as low.")]
_Temperature = Annotated[
    float | None,
    sampling_option("temperature", "Sampling temperature, 0 for greedy; default: the checkpoint's."),
]
_Most = Annotated[int | None, sampling_option("max_tokens", "Maximum tokens of an answer.", "--max-tokens")]
_Mcp = Annotated[
    Path | None,
    typer.Option("--mcp", help="File of MCP servers; default: ~/.config/farthing/mcp.json, if it exists."),
]


@chat_app.command(
    epilog="Examples:  farthing chat  |  farthing chat qwen3-8b  |  farthing chat http://10.0.0.2:8000"
)
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|URL]", help="A model, or a server's address; default: what runs here."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Which model of the server at URL.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and end.")] = None,
    system: _System = "",
    think: _Think = None,
    temperature: _Temperature = None,
    max_tokens: _Most = None,
    mcp: _Mcp = None,
    api_key: _Key = None,
) -> None:
    """Talk to a model in the terminal: of a server at URL, of one that runs on port 8000, or of one to start.

    /? lists the commands in it.
    """
    with one_line_errors("chat"), ExitStack() as stack:
        key, base = api_key.rpartition(":")[2] if api_key else None, False
        if model is not None and model.startswith(("http://", "https://")):
            server = Server(model, key)
            served = server.model(name)
        elif model is not None and name is not None:
            raise ValueError(f"model: got both {model!r} and {name!r}; expected one, or a server's address")
        elif found := find(model := model or name, key):
            server, served = found
        else:
            served = named(model)
            server, base = stack.enter_context(_started(served))
        talk = Conversation(server, served, system=system, base=base)
        talk.sampling = {"temperature": temperature, "max_tokens": max_tokens}
        _talk(stack, talk, prompt, think, mcp)


@run_app.command(
    epilog='Examples:  farthing run qwen3-8b  |  farthing run gpt-oss-20b "Why is the sky blue?"'
)
def run(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model, as `farthing serve` takes it; default: ask which."),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="Answer this and end.")] = None,
    system: _System = "",
    think: _Think = None,
    temperature: _Temperature = None,
    max_tokens: _Most = None,
    mcp: _Mcp = None,
) -> None:
    """Download MODEL if it is not here, serve it with the options that fit, and talk to it."""
    with one_line_errors("run"), ExitStack() as stack:
        model = named(model)
        server, base = stack.enter_context(_started(model))
        talk = Conversation(server, model, system=system, base=base)
        talk.sampling = {"temperature": temperature, "max_tokens": max_tokens}
        _talk(stack, talk, prompt, think, mcp)


@contextlib.contextmanager
def _started(model: str) -> Iterator[tuple[Server, bool]]:
    """A server of a model, downloaded first, and whether the model continues texts instead of answering.

    Raises ValueError if it does not fit, before the download.
    """
    console = Console(stderr=True)
    found = find_model(model)
    if EngineConfig(model=model).on_this_cpu:
        chosen = fit(found.path, available_memory(), sequences=_SEQUENCES)
        console.print(Text(f"fit: {chosen}", style="dim"), soft_wrap=True)
    with step_progress(f"downloading {model}") as progress:
        found.fetch(progress)
    with ExitStack() as stack:
        with console.status(_one_line(f"starting {model}", console)) as status:
            server = stack.enter_context(
                started(model, _OPTIONS, lambda line: status.update(_one_line(line, console)))
            )
        said = f"{model} is served on {server.url} while this runs"
        note = base_note(model, found.path)
        for line in filter(None, (said, note)):
            console.print(Text(line, style="dim"), soft_wrap=True)
        yield server, note is not None


def _one_line(text: str, console: Console) -> Text:
    """What fits beside the spinner; brackets are no markup."""
    line = Text(text)
    line.truncate(console.width - 2, overflow="ellipsis")
    return line


def _talk(
    stack: ExitStack, talk: Conversation, prompt: str | None, think: str | None, mcp: Path | None
) -> None:
    screen = Screen()
    if think is not None:
        talk.effort = {"on": "high", "off": "none"}.get(think, think)
    servers = None
    if mcp is not None or default_file().is_file():
        servers = stack.enter_context(McpServers(mcp or default_file()))
        talk.tools = servers.tools
    if prompt is not None:
        if not reply(talk, prompt, screen, servers):
            raise typer.Exit(2)
    elif not sys.stdin.isatty():
        said = sys.stdin.read()
        if said.strip() and not reply(talk, said, screen, servers):
            raise typer.Exit(2)
    else:
        converse(talk, screen, servers)
