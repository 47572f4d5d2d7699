"""`farthing fleet`: run, scale and explain a fleet of replicas."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Run, scale and explain a fleet of replicas.")

_UP_EXAMPLES = """
Examples:

  farthing fleet up

  farthing fleet up ./DeepSeek-V3 --max-replicas 4 --api-key-file keys.txt

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
_EXPLAIN_EXAMPLES = """
Examples:

  farthing fleet explain

  farthing fleet explain --last 3 --changes --json
"""


@app.command(epilog=_UP_EXAMPLES)
def up(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or the embedded model.")] = "mite",
    host: Annotated[str, typer.Option(help="Address of the gateway.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the gateway; 0 picks a free one.")] = 8000,
    min_replicas: Annotated[int, typer.Option(min=0, help="Minimum number of replicas.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="Maximum number of replicas.")] = 2,
    capacity: Annotated[
        float, typer.Option(help="Requests/s per replica, as `farthing bench capacity` measures.")
    ] = 1.0,
    command: Annotated[
        str | None,
        typer.Option(help="Replica command instead of `farthing serve MODEL`; {port} is replaced."),
    ] = None,
    serve_args: Annotated[str, typer.Option(help="Additional arguments for `farthing serve`.")] = "",
    health_path: Annotated[
        str, typer.Option(help="Path that answers 200 once a replica is ready.")
    ] = "/ready",
    metrics_names: Annotated[
        str, typer.Option(help="Metric names: auto, farthing, vllm or sglang.")
    ] = "auto",
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys, one `name:key` or key per line.")
    ] = None,
    ready_timeout: Annotated[
        float, typer.Option(help="Maximum seconds for a replica to become ready.")
    ] = 600.0,
    warm: Annotated[
        bool, typer.Option(help="Keep a pre-imported standby process; not with --command.")
    ] = True,
    config: Annotated[Path | None, typer.Option(help="YAML file with policy, gateway and signals.")] = None,
    state: Annotated[Path, typer.Option(help="Directory for logs, decisions and state.")] = Path(
        "runs/fleet"
    ),
    metrics: Annotated[str, typer.Option(help="HOST:PORT of the controller's /metrics.")] = "127.0.0.1:9400",
    advise: Annotated[bool, typer.Option("--advise", help="Only recommend, never scale.")] = False,
) -> None:
    """Start a gateway and autoscaled replicas on this machine."""
    from farthing.fleet.actuators.local import LocalConfig
    from farthing.fleet.up import WARM, UpConfig, serve_command
    from farthing.fleet.up_defaults import local_fleet

    _log_to_stderr()
    words = shlex.split(command) if command else serve_command(model, tuple(shlex.split(serve_args)))
    with _errors_to_user():
        fleet = local_fleet(
            config,
            policy={"min_replicas": min_replicas, "max_replicas": max_replicas, "capacity": capacity},
            metrics_names=metrics_names,
            state=state,
            metrics=metrics,
            advise=advise,
        )
        local = LocalConfig(
            tuple(words),
            state / "replicas",
            health_path=health_path,
            ready_timeout_s=ready_timeout,
            **(WARM if warm and not command else {}),
        )
        asyncio.run(_up(UpConfig(fleet, local, host, port, api_key_file)))


async def _up(config: Any) -> None:
    from farthing.fleet.run import stop_event
    from farthing.fleet.up import LocalFleet, load_estimates

    stop = stop_event()
    async with LocalFleet(config) as fleet:
        _say(f"gateway: {fleet.url} (OpenAI API at {fleet.url}/v1), metrics on port {fleet.metrics_port}")
        forecasters = asyncio.create_task(load_estimates(fleet))
        scaling = asyncio.create_task(fleet.run(stop))
        ready = asyncio.create_task(fleet.wait_ready(config.local.ready_timeout_s, _say))
        await asyncio.wait([ready, scaling], return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and not ready.result():
            _say(f"no replica became ready: {fleet.replicas.given_up or 'timed out'}")
            stop.set()
            await scaling
            raise typer.Exit(1)
        if ready.done():
            _say("ready")
        ready.cancel()
        await scaling
        await asyncio.gather(forecasters)
        _say("shutting down: in-flight requests finish first")


@app.command(epilog=_RUN_EXAMPLES)
def run(
    config: Annotated[Path, typer.Argument(help="YAML file; docs/guide/scale.md lists its fields.")],
    advise: Annotated[bool, typer.Option("--advise", help="Only recommend, never scale.")] = False,
) -> None:
    """Scale a deployment, in Kubernetes or elsewhere, by the metrics of a Prometheus server."""
    from dataclasses import replace

    from farthing.fleet.config import load
    from farthing.fleet.estimates import make_estimates
    from farthing.fleet.run import run_controller, stop_event

    _log_to_stderr()

    async def main(fleet: Any) -> None:
        await run_controller(fleet, stop_event(), make_estimates(fleet))

    with _errors_to_user():
        loaded = load(config)
        asyncio.run(main(replace(loaded, advise=advise or loaded.advise)))


@app.command(epilog=_GATEWAY_EXAMPLES)
def gateway(
    replica: Annotated[list[str] | None, typer.Option(help="URL of a replica. Repeatable.")] = None,
    replicas_file: Annotated[
        Path | None, typer.Option(help="JSON file of replicas, reloaded on change.")
    ] = None,
    replicas_dns: Annotated[
        str | None, typer.Option(help="HOST:PORT whose addresses are the replicas (a headless Service).")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000,
    fd: Annotated[int | None, typer.Option(help="Take over this open socket instead.", hidden=True)] = None,
    health_path: Annotated[
        str, typer.Option(help="Path that answers 200 while a replica is ready.")
    ] = "/health",
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys, one `name:key` or key per line.")
    ] = None,
    drain: Annotated[float, typer.Option(help="Seconds for in-flight requests after SIGTERM.")] = 60.0,
    state: Annotated[
        Path | None, typer.Option(help="The controller's state directory, shown on the dashboard.")
    ] = None,
    usd_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price per replica-hour, for the dashboard.")
    ] = None,
    wake: Annotated[
        str | None,
        typer.Option(help="URL of the controller's /wake, which starts replicas for held requests."),
    ] = None,
    replica_key_file: Annotated[
        Path | None, typer.Option(help="File with a metrics key of the replicas, for their cache digests.")
    ] = None,
) -> None:
    """Serve one OpenAI-compatible address in front of many replicas."""
    from farthing.eventloop import loop_factory
    from farthing.fleet.config import split_address
    from farthing.fleet.discovery import follow
    from farthing.fleet.gateway import GatewayConfig
    from farthing.fleet.gateway.process import serve

    _log_to_stderr()
    if sum(map(bool, (replica, replicas_file, replicas_dns))) != 1:
        raise typer.BadParameter("expected one of --replica, --replicas-file and --replicas-dns")

    async def main(file: Path | None) -> None:
        serving = serve(
            GatewayConfig(health_path=health_path, drain_s=drain),
            replicas={f"r{i}": url for i, url in enumerate(replica or [], 1)},
            replicas_file=file,
            address=(host, port),
            fd=fd,
            api_key_file=api_key_file,
            state=state,
            usd_per_hour=usd_per_hour,
            wake=wake,
            replica_key_file=replica_key_file,
        )
        if replicas_dns is None or file is None:
            return await serving
        following = asyncio.create_task(follow(split_address(replicas_dns), file))
        try:
            await serving
        finally:
            following.cancel()

    with _errors_to_user(), tempfile.TemporaryDirectory(prefix="farthing-gateway-") as scratch:
        if replicas_dns is not None:
            split_address(replicas_dns)
            replicas_file = Path(scratch) / "replicas.json"
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(main(replicas_file))


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
    from farthing.fleet.explain import last_decisions, report

    with _errors_to_user():
        decisions = last_decisions(state, last, changes=changes)
    if as_json:
        typer.echo(json.dumps([json.loads(d.to_json()) for d in decisions], indent=2))
        return
    _print(report(decisions))


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable, end="")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s"
    )


class _errors_to_user:
    """User errors become one line and exit status 2; bugs keep their traceback."""

    def __enter__(self) -> None:
        """No setup."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from farthing.fleet.actuators.base import ActuatorError

        if isinstance(error, (ValueError, OSError, ActuatorError)):
            typer.echo(f"farthing fleet: {error}", err=True)
            raise typer.Exit(2) from error
