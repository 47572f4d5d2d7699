"""`farthing serve`: a model behind OpenAI's API."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from farthing import extras
from farthing.cli.errors import log_lines, one_line_errors, with_options
from farthing.cli.offered import named
from farthing.cli.packed import load, read_packed, with_packed
from farthing.cli.preflight import preflight, with_fit
from farthing.config import AUTO, EngineConfig
from farthing.hub import EMBEDDED
from farthing.server.config import ADMIN_ENVIRONMENT, Given, KeyRing, ServerConfig, gather_keys

app = typer.Typer(add_completion=False)
log = logging.getLogger("farthing.server")

EPILOG = """
Examples:

  farthing serve

  farthing serve ./DeepSeek-V3 --port 9000 --max-num-seqs 128 --kv-cache-dtype fp8

  farthing serve --models ./models --models-memory 20GB

  farthing serve --host 0.0.0.0 --api-key-file keys.txt --tokens-per-minute 100000
"""
# What `--help` shows: most users never need another option.
_COMMON = frozenset({
    "model", "packed", "quantization", "backend", "threads", "max_model_len", "max_num_seqs",
    "kv_cache_dtype", "fit", "speculate", "experts", "prefix_cache_dir", "host", "port",
    "served_model_name", "api_key_file", "models",
})  # fmt: skip


def _keys(help: str) -> Any:
    return typer.Option(metavar="[NAME:]KEY", help=help, rich_help_panel="HTTP")


def _several(help: str, metavar: str | None = None) -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel="Several models")


@app.command(epilog=EPILOG)
@with_options(engine=EngineConfig, server=ServerConfig, common=_COMMON)
def serve(
    engine: dict[str, Any],
    server: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A directory, a GGUF file, a hub id, or a name of `farthing models`; default: ask which.",
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="Choose format, context and cache by the memory.", rich_help_panel="Engine"
        ),
    ] = False,
    api_key: Annotated[
        list[str] | None, _keys("Required API key (repeatable); also FARTHING_API_KEY.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys, `name:key` or a key per line.", rich_help_panel="HTTP")
    ] = None,
    admin_api_key: Annotated[
        list[str] | None,
        _keys("Key that also sees every key's spending (repeatable); also FARTHING_ADMIN_API_KEY."),
    ] = None,
    metrics_api_key: Annotated[
        list[str] | None, _keys("Key for /metrics, required from other machines once set (repeatable).")
    ] = None,
    models: Annotated[
        Path | None,
        _several("Several models instead of MODEL: a folder of them, or a TOML file with a table per model."),
    ] = None,
    models_memory: Annotated[
        str | None,
        _several("Memory of all loaded models (20GB); default: 80 % of what is available.", "BYTES"),
    ] = None,
    unload_after: Annotated[
        float, _several("Seconds without a request after which a model is unloaded.", "SECONDS")
    ] = 600.0,
) -> None:
    """Serve MODEL over HTTP: chat completions, responses, messages and completions; metrics and health."""
    log_lines()
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it repeats what the server says
    with one_line_errors("serve"), ExitStack() as stack:
        engine["model"] = named(model) if models is None else model or EMBEDDED
        engine_config = EngineConfig(**engine)
        server_config = ServerConfig(
            **server,
            keys=gather_keys(api_key or [], api_key_file),
            admin_keys=KeyRing(admin_api_key or []) | KeyRing.from_environment(ADMIN_ENVIRONMENT),
            metrics_keys=KeyRing(metrics_api_key or []),
        )
        if models is not None:
            from farthing.server.front import serve_models  # imports an extra
            from farthing.server.tools import page_routes

            given = Given(engine, server, api_key or (), admin_api_key or (), api_key_file)
            page = stack.enter_context(page_routes(server_config))
            raise typer.Exit(serve_models(server_config, models, given, models_memory, unload_after, page))
        found = preflight(replace(engine_config, check_memory=engine_config.check_memory and not fit))
        if fit:
            engine_config = with_fit(engine_config, found.path)
        if not found.absent:
            engine_config = with_packed(engine_config, found.path, progress=None)
        read_packed(engine_config)
        if not extras.has_torch():  # otherwise the import waits until the server listens
            from farthing.engine.build import require_torch

            packed = None if engine_config.packed == AUTO else engine_config.packed
            require_torch(replace(engine_config, packed=packed))  # to read or to pack the checkpoint
        from farthing.server.run import serve as run
        from farthing.server.tools import page_routes

        page = stack.enter_context(page_routes(server_config))
        raise typer.Exit(run(server_config, engine_config.model, partial(load, engine_config, found), page))
