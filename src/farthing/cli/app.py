"""The `farthing` command: subcommands, each imported only when it runs."""

from __future__ import annotations

import importlib.util
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core
import typer.main

from farthing import __version__, import_whole
from farthing.cli.errors import Exit, exit_on_error

# name -> (module under farthing.cli, help line). It defines `app: typer.Typer`, or MODULE:NAME.
# The fleet and the laboratory add theirs through the entry points of GROUP.
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("serve", "Serve a model over the OpenAI-compatible HTTP API."),
    "run": ("chat:run_app", "Download, serve and talk to a model."),
    "chat": ("chat:chat_app", "Talk to a model in the terminal."),
    "pull": ("models:pull_app", "Download the files of a model that serving reads."),
    "models": ("offered:models_app", "List what can be downloaded, and what of it fits this machine."),
    "list": ("models:list_app", "List the models on this machine."),
    "show": ("show:show_app", "Show what a model is and how it fits this machine."),
    "rm": ("models:rm_app", "Remove a downloaded model."),
    "ps": ("servers:ps_app", "Show the servers that run on this machine, and their memory."),
    "stop": ("servers:stop_app", "Stop a server."),
    "check": ("check", "Check a model directory: configuration, tokenizer, first layers."),
    "generate": ("generate", "Complete prompts on the command line."),
    "inspect": ("check:inspect_app", "Show parameters, bytes and FLOPs per token, and routing."),
    "eval": ("compress:eval_app", "Perplexity, bits per byte, MTP acceptance; or one model against another."),
    "compress": ("compress", "Write a smaller, faster checkpoint and check its accuracy."),
    "export": ("export", "Write a GGUF file for llama.cpp, with the values of a compressed model."),
    "pack": ("check:pack_app", "Write the file that CPU replicas map instead of packing at start."),
    "bench": ("bench", "Measure serving, capacity and the cost of a token."),
    "plan": ("plan", "Memory and throughput of a deployment before it is loaded."),
    "doctor": ("check:doctor_app", "Show what this machine supports and what to install."),
}
ALIASES = {"help": ["--help"], "version": ["--version"]}  # what people type, and what it stands for
FIRST = """\
First steps:
  farthing run                 talk to a model that fits this machine, in the terminal
  farthing serve               the same with a page, and OpenAI's API: http://127.0.0.1:8000
  farthing models              what can be downloaded, and what of it fits"""

GROUP = "farthing.commands"


class LazyGroup(typer.core.TyperGroup):
    """Lists commands without importing them, which keeps `--help` and start-up fast."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *sorted(installed())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS:
            where: str | None = f"farthing.cli.{COMMANDS[cmd_name][0]}"
        else:
            where = installed().get(cmd_name)
        if where is None:
            return None if ctx.resilient_parsing else self._unknown(cmd_name)
        name, _, attribute = where.partition(":")
        module = import_whole(name)
        command = typer.main.get_command(getattr(module, attribute or "app"))
        command.name = cmd_name
        return command

    def _unknown(self, name: str) -> NoReturn:
        """Exit with the nearest commands."""
        close = get_close_matches(name, [*self.list_commands(None), *ALIASES], n=2, cutoff=0.5)
        said = f"did you mean {' or '.join(close)}?" if close else "`farthing help` lists the commands"
        typer.echo(f"error: command: got {name!r}; {said}", err=True)
        raise typer.Exit(Exit.INPUT)

    def get_help(self, ctx: Any) -> str:
        """Help text built without importing a command."""
        lines = {name: line for name, (_, line) in COMMANDS.items()}
        lines |= {name: _first_line(module) for name, module in sorted(installed().items())}
        width = max(len(name) for name in lines) + 2
        return "\n".join(
            [
                "Usage: farthing COMMAND [OPTIONS]",
                "",
                self.help or "",
                "",
                FIRST,
                "",
                *(f"  {name:<{width}}{line}" for name, line in lines.items()),
                "",
                "`farthing COMMAND --help` shows the options and examples of a command.",
            ]
        )


def installed() -> dict[str, str]:
    """Commands of other packages: name -> module."""
    from importlib.metadata import entry_points  # 20 ms that the commands above do not need

    return {entry.name: entry.value for entry in entry_points(group=GROUP)}


def _first_line(module: str) -> str:
    """What a command does, from its module's docstring: "`farthing NAME`: does this."."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    with Path(spec.origin).open(encoding="utf-8") as file:
        said = file.readline().strip().strip('"').partition(": ")[2]
    return said[:1].upper() + said[1:]


app = typer.Typer(
    cls=LazyGroup,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="Serve, compress and scale mixture-of-experts language models.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"farthing {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Serve, compress and scale mixture-of-experts language models."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Entry point of the `farthing` script."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ALIASES:  # `farthing help serve`
        arguments = (
            [*arguments[1:2], *ALIASES[arguments[0]]] if arguments[0] == "help" else ALIASES["version"]
        )
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    try:
        sys.exit(app(arguments))
    except Exception:
        exit_on_error(command)


if __name__ == "__main__":
    main()
