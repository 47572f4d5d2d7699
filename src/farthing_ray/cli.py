"""`farthing ray`: run a fleet of replicas on a Ray cluster, by Ray Serve."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from typing import Any

import typer

from farthing.cli.errors import with_options
from farthing.config import option
from farthing_fleet.cli import FleetOptions, errors_to_user, log_to_stderr, say
from farthing_fleet.config import make_fleet

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Replicas on a Ray cluster, by Ray Serve.")

_EXAMPLES = """
Examples:

  farthing ray up

  farthing ray up ./DeepSeek-V3 ./Mixtral --address auto --max-replicas 4 --gpus 1
"""

_option = partial(option, group="Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions(FleetOptions):
    """A fleet on a Ray cluster."""

    address: str | None = _option(None, "HOST:PORT of a cluster, or auto; default: a new one on this machine")
    cpus: float = _option(1.0, "CPUs that a replica reserves", minimum=0)
    gpus: float = _option(0.0, "GPUs that a replica reserves", minimum=0)
    drain: float = _option(60.0, "Seconds for in-flight requests of a replica that goes", minimum=0)


@app.callback()
def _root() -> None:
    """Replicas on a Ray cluster, by Ray Serve."""


@app.command(epilog=_EXAMPLES)
@with_options(options=RayOptions)
def up(options: dict[str, Any]) -> None:
    """Serve models by Ray Serve, scaled by Farthing's policy, until Ctrl-C."""
    log_to_stderr()
    with errors_to_user():
        chosen = RayOptions(**options)
        fleet = make_fleet(chosen.config, chosen.policy, state=chosen.state, advise=chosen.advise)
        try:
            from farthing_ray.serve import ServeConfig, serving
        except ImportError as problem:
            raise ValueError(f"Ray Serve needs the extra `ray`: {problem}") from problem
        config = ServeConfig(
            commands=chosen.commands,
            fleet=fleet,
            health_path=chosen.health_path,
            ready_timeout_s=chosen.ready_timeout,
            drain_s=chosen.drain,
            cpus=chosen.cpus,
            gpus=chosen.gpus,
        )
        with serving(config, chosen.address, chosen.host, chosen.port) as url:
            say(f"ready: OpenAI API at {url}/v1")
            signal.sigwait((signal.SIGINT, signal.SIGTERM))
            say("shutting down: in-flight requests finish first")
