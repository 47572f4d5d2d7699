"""The `farthing` command: subcommands, each imported only when it runs."""

from __future__ import annotations

import importlib.util
import sys
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from farthing import __version__, import_whole
from farthing.cli.errors import exit_on_error

# name -> (module under farthing.cli, help line). Each module defines `app: typer.Typer`.
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("serve", "Serve a model over the OpenAI-compatible HTTP API."),
    "check": ("check", "Check a model directory: configuration, tokenizer, first layers."),
    "generate": ("generate", "Complete prompts on the command line."),
    "inspect": ("inspect", "Show parameters, bytes and FLOPs per token, and routing."),
    "eval": ("eval", "Perplexity, bits per byte, MTP acceptance; or one model against another."),
    "compress": ("compress", "Write a smaller, faster checkpoint and check its accuracy."),
    "pack": ("pack", "Write the file that CPU replicas map instead of packing at start."),
    "train": ("train", "Train the embedded model; quantize or prune a model with training."),
    "bench": ("bench", "Measure serving, capacity and the cost of a token."),
    "plan": ("plan", "Memory and throughput of a deployment before it is loaded."),
    "fleet": ("fleet", "Run, scale and explain a fleet of replicas."),
    "replay": ("replay", "Replay a load trace against scaling policies."),
    "forecast": ("forecast", "Backtest the load forecasters on a series."),
    "doctor": ("doctor", "Show what this machine supports and what to install."),
}


class LazyGroup(typer.core.TyperGroup):
    """Lists commands without importing them, which keeps `--help` and start-up fast."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if _exists(COMMANDS[name][0])]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS or not _exists(COMMANDS[cmd_name][0]):
            return None
        module = import_whole(f"farthing.cli.{COMMANDS[cmd_name][0]}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def get_help(self, ctx: Any) -> str:
        """Help text built only from COMMANDS."""
        width = max(len(name) for name in COMMANDS) + 2
        lines = [f"  {name:<{width}}{COMMANDS[name][1]}" for name in self.list_commands(ctx)]
        return "\n".join(
            [
                "Usage: farthing COMMAND [OPTIONS]",
                "",
                self.help or "",
                "",
                *lines,
                "",
                "`farthing COMMAND --help` shows the options and examples of a command.",
            ]
        )


def _exists(module: str) -> bool:
    return importlib.util.find_spec(f"farthing.cli.{module}") is not None


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Farthing: mixture-of-experts models at the lowest cost per token.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"farthing {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Farthing: mixture-of-experts models at the lowest cost per token."""


def main() -> None:
    """Entry point of the `farthing` script."""
    command = next((argument for argument in sys.argv[1:] if argument in COMMANDS), "")
    try:
        sys.exit(app())
    except Exception:
        exit_on_error(command)


if __name__ == "__main__":
    main()
