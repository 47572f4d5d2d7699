"""`farthing serve`: a model behind OpenAI's API."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farthing import extras
from farthing.cli.errors import one_line_errors
from farthing.cli.options import with_options
from farthing.cli.preflight import preflight
from farthing.cli.read_ahead import remember
from farthing.config import EngineConfig
from farthing.page_in import page_in
from farthing.server.auth import KeyRing
from farthing.server.config import ServerConfig, gather_keys

if TYPE_CHECKING:
    from farthing.engine.engine import Engine

app = typer.Typer(add_completion=False)
log = logging.getLogger("farthing.server")

EPILOG = """
Examples:

  farthing serve

  farthing serve ./DeepSeek-V3 --port 9000 --max-num-seqs 128 --kv-cache-dtype fp8

  farthing serve --host 0.0.0.0 --api-key-file keys.txt --tokens-per-minute 100000
"""
_SERVING_EXTRAS = ("fast", "structured")


def _keys(help: str) -> Any:
    return typer.Option(metavar="[NAME:]KEY", help=help, rich_help_panel="HTTP")


@app.command(epilog=EPILOG)
@with_options(engine=EngineConfig, server=ServerConfig)
def serve(
    engine: dict[str, Any],
    server: dict[str, Any],
    api_key: Annotated[
        list[str] | None, _keys("Required API key (repeatable); also FARTHING_API_KEY.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys, `name:key` or a key per line.", rich_help_panel="HTTP")
    ] = None,
    admin_api_key: Annotated[
        list[str] | None, _keys("Key that also sees every key's spending (repeatable).")
    ] = None,
    metrics_api_key: Annotated[
        list[str] | None, _keys("Key for /metrics, required from other machines once set (repeatable).")
    ] = None,
) -> None:
    """Serve MODEL over HTTP: chat completions, responses, messages and completions; metrics and health."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    with one_line_errors("serve"):
        engine_config = EngineConfig(**engine)
        server_config = ServerConfig(
            **server,
            keys=gather_keys(api_key or [], api_key_file),
            admin_keys=KeyRing(admin_api_key or []),
            metrics_keys=KeyRing(metrics_api_key or []),
        )
        if engine_config.packed is not None:
            page_in(Path(engine_config.packed))
        if not extras.has_torch():  # otherwise the import waits until the server listens
            from farthing.engine.load import require_torch

            require_torch(engine_config)
        from farthing.server.run import serve as run

        preflight(engine_config)
        _suggest_extras()
        raise typer.Exit(run(server_config, engine_config.model, lambda: _load(engine_config)))


def _load(config: EngineConfig) -> Engine:
    from farthing.engine.build import build_engine  # imports torch

    engine = build_engine(config)
    remember("serve")
    return engine


def _suggest_extras() -> None:
    """Log the extras missing for serving, with the command that installs them."""
    absent = [extra for extra in _SERVING_EXTRAS if extras.missing(extra)]
    if absent:
        gains = ", ".join(extras.EXTRAS[extra] for extra in absent)
        log.info("not installed: %s; %s", gains, extras.how_to_install(*absent))
