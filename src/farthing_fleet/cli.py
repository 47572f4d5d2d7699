"""`farthing fleet`: run, scale and explain a fleet of replicas."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from farthing.cli.errors import with_options
from farthing.config import check, option
from farthing.cpus import own_cpus
from farthing_fleet.actuators.base import ActuatorError
from farthing_fleet.decision_log import last_decisions, report
from farthing_fleet.gateway.config import GatewayOptions

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Run, scale and explain a fleet of replicas."
)

_UP_EXAMPLES = """
Examples:

  farthing fleet up

  farthing fleet up ./DeepSeek-V3 --max-replicas 4 --api-key-file keys.txt

  farthing fleet up ./Qwen3-8B ./gpt-oss-20b --min-replicas 0

  farthing fleet up ./gpt-oss-120b --numa

  farthing fleet up --command "vllm serve ./model --port {port}" --health-path /health --metrics-names vllm
"""
_RUN_EXAMPLES = """
Examples:

  farthing fleet run fleet.yaml

  farthing fleet run fleet.yaml --advise
"""
_GATEWAY_EXAMPLES = """
Examples:

  farthing fleet gateway --replica http://127.0.0.1:8001 --replica http://127.0.0.1:8002

  farthing fleet gateway --replicas-file replicas.json --port 8000 --api-key-file keys.txt

  farthing fleet gateway --replicas-dns farthing-replicas.farthing.svc:8000 --health-path /ready
"""
_TUNE_EXAMPLES = """
Examples:

  farthing fleet tune fleet.yaml

  farthing fleet tune fleet.yaml --advise
"""
_EXPLAIN_EXAMPLES = """
Examples:

  farthing fleet explain

  farthing fleet explain --last 3 --changes --json
"""


_option = partial(option, group="Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """Replicas of models, and how they are scaled."""

    model: tuple[str, ...] = _option((), "Directories or hub ids; default: the embedded model", argument=True)

    host: str = _option("127.0.0.1", "Address of the gateway")
    port: int = _option(8000, "Port of the gateway; 0: any free port")
    min_replicas: int | None = _option(None, "Minimum number of replicas; default: 1", minimum=0)
    max_replicas: int | None = _option(None, "Maximum number of replicas; default: 2", minimum=1)
    capacity: float | None = _option(
        None, "Requests/s per replica, as `farthing bench capacity` measures; default: 1"
    )
    rule: str | None = _option(
        None, "How replicas are ordered: rehearsed (default), published, lstm, regression or prophet"
    )
    command: str | None = _option(
        None, "Replica command instead of `farthing serve MODEL`; {port}, {model} and {served} are replaced"
    )
    serve_args: str = _option("", "Additional arguments for `farthing serve`")
    health_path: str = _option("/ready", "Path that answers 200 once a replica is ready")
    api_key_file: Path | None = _option(
        None, "File of keys, one `name:key` or key per line, for the gateway and `farthing serve`"
    )
    ready_timeout: float = _option(600.0, "Maximum seconds for a replica to become ready")
    config: Path | None = _option(
        None, "YAML file with policy and signals; replica counts, capacity and --state take precedence"
    )
    state: Path | None = _option(None, "Directory for logs, decisions and state; default: runs/fleet")
    advise: bool = _option(False, "Only recommend, never scale")

    def __post_init__(self) -> None:
        check(self)

    @property
    def policy(self) -> dict[str, Any]:
        """The fields of PolicyConfig that are set."""
        names = ("min_replicas", "max_replicas", "capacity", "rule")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def commands(self) -> dict[str, tuple[str, ...]]:
        """The command of a replica by its model's name. Raises ValueError for two models of one name."""
        models = self.model or ("mite",)
        made = {Path(model).name: self._command_of(model) for model in models}
        if len(made) < len(models):
            raise ValueError(f"model: got {', '.join(models)}; expected names that differ")
        return made

    def _command_of(self, model: str) -> tuple[str, ...]:
        from farthing_fleet.up import serve_command

        served = Path(model).name
        if self.command:
            words = shlex.split(self.command)
            return tuple(word.replace("{model}", model).replace("{served}", served) for word in words)
        extra = ("--served-model-name", served) if len(self.model) > 1 else ()
        return serve_command(model, (*extra, *shlex.split(self.serve_args)), self.api_key_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions(FleetOptions):
    """A local fleet."""

    metrics_names: str = _option("auto", "Metric names: auto, farthing, vllm or sglang")
    standby: bool = _option(True, "Keep a pre-imported standby process; not with --command or --numa")
    numa: bool = _option(False, "Bind replicas to memory nodes in turn; by default one on each node")
    metrics: str | None = _option(
        None,
        "HOST:PORT of the controller's /metrics; default: 127.0.0.1:9400; further models take the next ports",
    )


@app.command(epilog=_UP_EXAMPLES)
@with_options(options=UpOptions)
def up(options: dict[str, Any]) -> None:
    """Start a gateway and autoscaled replicas on this machine."""
    from farthing_fleet.config import local_fleet
    from farthing_fleet.up import UpConfig, local_config

    log_to_stderr()
    with errors_to_user():
        chosen = UpOptions(**options)
        cores = own_cpus().nodes.values() if chosen.numa else ()
        nodes = tuple(tuple(chain.from_iterable(each)) for each in cores)
        one_each = {"min_replicas": len(nodes), "max_replicas": len(nodes)} if nodes else {}
        fleet = local_fleet(
            chosen.config,
            one_each | chosen.policy,
            metrics_names=chosen.metrics_names,
            state=chosen.state,
            metrics=chosen.metrics,
            advise=chosen.advise,
        )
        commands = chosen.commands
        models = {
            name: local_config(
                command,
                fleet.state / "replicas",
                standby=chosen.standby and not chosen.command and not nodes,
                health_path=chosen.health_path,
                ready_timeout_s=chosen.ready_timeout,
                prefix=f"{name}-" if len(commands) > 1 else "r",
                nodes=nodes,
            )
            for name, command in commands.items()
        }
        asyncio.run(_up(UpConfig(fleet, models, chosen.host, chosen.port, chosen.api_key_file)))


async def _up(config: Any) -> None:
    from farthing_fleet.run import stop_event
    from farthing_fleet.up import LocalFleet

    stop = stop_event()
    async with LocalFleet(config) as fleet:
        ports = ", ".join(str(model.metrics_port) for model in fleet.models)
        say(f"gateway: {fleet.url} (OpenAI API at {fleet.url}/v1), metrics on port {ports}")
        scaling = asyncio.create_task(fleet.run(stop))
        waits = (m.wait_ready(m.replicas.config.ready_timeout_s, say) for m in fleet.models)
        ready: asyncio.Future[list[bool]] = asyncio.gather(*waits)
        either: list[asyncio.Future[Any]] = [ready, scaling]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and not all(ready.result()):
            lost = next(m for m, good in zip(fleet.models, ready.result(), strict=True) if not good)
            say(f"{lost.name}: no replica became ready: {lost.replicas.given_up or 'timed out'}")
            stop.set()
            await scaling
            raise typer.Exit(1)
        if ready.done():
            say("ready")
        ready.cancel()
        with suppress(asyncio.CancelledError):
            await ready
        await scaling
        say("shutting down: in-flight requests finish first")


@app.command(epilog=_RUN_EXAMPLES)
def run(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file; docs/guide/scale.md lists its fields.")
    ],
    advise: Annotated[bool, typer.Option("--advise", help="Only recommend, never scale.")] = False,
) -> None:
    """Scale a deployment, in Kubernetes or elsewhere, by the metrics of a Prometheus server."""
    from farthing_fleet.config import load
    from farthing_fleet.estimates import make_estimates
    from farthing_fleet.run import run_controller, stop_event

    log_to_stderr()

    async def main(fleet: Any) -> None:
        await run_controller(fleet, stop_event(), make_estimates(fleet))

    with errors_to_user():
        loaded = load(config)
        asyncio.run(main(replace(loaded, advise=advise or loaded.advise)))


@app.command(epilog=_GATEWAY_EXAMPLES)
@with_options(options=GatewayOptions)
def gateway(
    options: dict[str, Any],
    fd: Annotated[int | None, typer.Option(help="Take over this open socket instead.", hidden=True)] = None,
) -> None:
    """Serve one OpenAI-compatible address in front of many replicas."""
    from farthing_fleet.gateway.process import run

    log_to_stderr()
    with errors_to_user():
        run(GatewayOptions(**options), fd)


@app.command(epilog=_TUNE_EXAMPLES)
def tune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The controller's YAML file.")],
    advise: Annotated[bool, typer.Option("--advise", help="Only print the table.")] = False,
) -> None:
    """Choose rule and utilization by replaying the controller's recorded load; it reads the choice itself."""
    from farthing_fleet.config import load
    from farthing_fleet.tune import table, tune, write

    with errors_to_user():
        fleet = load(config)
        found = tune(fleet)
        if found is None:
            say(f"{fleet.state}: less than a day of recorded load; the default stays")
            return
        _print(table(found))
        if not advise:
            write(fleet, found)


@app.command(epilog=_EXPLAIN_EXAMPLES)
def explain(
    state: Annotated[Path, typer.Option(help="The controller's state directory.")] = Path("runs/fleet"),
    last: Annotated[int, typer.Option(min=1, help="Number of decisions.")] = 10,
    changes: Annotated[
        bool, typer.Option("--changes", help="Only decisions that changed the replica count.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Print the last decisions with their reasons."""

    with errors_to_user():
        decisions = last_decisions(state, last, changes=changes)
    if as_json:
        typer.echo(json.dumps([json.loads(d.to_json()) for d in decisions], indent=2))
        return
    _print(report(decisions))


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable, end="")


def say(text: str) -> None:
    typer.echo(text, err=True)


def log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s"
    )


@contextmanager
def errors_to_user() -> Iterator[None]:
    """User errors become one line and exit status 2; bugs keep their traceback."""
    try:
        yield
    except (ValueError, OSError, ActuatorError) as error:
        typer.echo(f"farthing fleet: {error}", err=True)
        raise typer.Exit(2) from error
