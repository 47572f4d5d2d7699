"""`farthing serve`: a model behind OpenAI's API; `farthing generate`: the same model on the command line."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farthing import LLM, extras
from farthing.cli.errors import one_line_errors, with_options
from farthing.cli.preflight import preflight
from farthing.config import EngineConfig
from farthing.process import page_in, remember
from farthing.server.config import KeyRing, ServerConfig, gather_keys

if TYPE_CHECKING:
    from farthing.engine.engine import Engine
    from farthing.engine.request import SamplingParams
    from farthing.hub import Found


# `farthing generate`: complete prompts on the command line.

generate_app = typer.Typer(add_completion=False)

GENERATE_EPILOG = """
Examples:

  farthing generate --prompt "def fibonacci(n):" --temperature 0

  farthing generate MODEL --prompt "Hello" --chat --max-tokens 200

  echo "import " | farthing generate --prompt - --json
"""


@generate_app.command(epilog=GENERATE_EPILOG)
@with_options(engine=EngineConfig, skip=("Limits",))
def generate(
    engine: dict[str, Any],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to complete; '-' reads stdin (repeatable).")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Prompts as user messages, through the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of output tokens.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature, 0 for greedy; default: the checkpoint's.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Probability mass of the tokens to sample from.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Number of most likely tokens to sample from.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Sampling seed; the same seed gives the same tokens.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before (repeatable).")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of completions per prompt.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Complete prompts, streaming to the terminal or as one JSON document."""
    if not prompt:
        raise typer.BadParameter("no prompt; expected --prompt TEXT, or --prompt - to read stdin")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop}
    parameters: dict[str, Any] = {name: value for name, value in sampling.items() if value not in (None, [])}
    with one_line_errors("generate"):
        texts = [sys.stdin.read() if text == "-" else text for text in prompt]

        with LLM(**engine) as llm:
            params = replace(llm.get_default_sampling_params(), max_tokens=max_tokens, n=n, **parameters)
            _print(llm, texts, params, chat, as_json)


def _print(llm: LLM, texts: list[str], params: SamplingParams, chat: bool, as_json: bool) -> None:
    prompts = [llm.engine.chat_prompt([{"role": "user", "content": t}]) for t in texts] if chat else texts
    if as_json:
        outputs = llm.generate(prompts, params, use_tqdm=False, add_special_tokens=not chat)
        typer.echo(json.dumps({"model": llm.engine.config.model, "requests": [asdict(o) for o in outputs]}))
    elif params.n > 1 or len(texts) > 1:
        for output in llm.generate(prompts, params, add_special_tokens=not chat):
            for completion in output.outputs:
                typer.echo(f"{output.prompt}{completion.text}\n")
    else:
        for part in llm.stream(prompts[0], params, add_special_tokens=not chat):
            typer.echo("".join(c.text for c in part.outputs), nl=False)
        typer.echo()


app = typer.Typer(add_completion=False)
log = logging.getLogger("farthing.server")

EPILOG = """
Examples:

  farthing serve

  farthing serve ./DeepSeek-V3 --port 9000 --max-num-seqs 128 --kv-cache-dtype fp8

  farthing serve --host 0.0.0.0 --api-key-file keys.txt --tokens-per-minute 100000
"""
_SERVING_EXTRAS = ("fast", "structured")
# What `--help` shows: most users never need another option.
_COMMON = frozenset({
    "model", "packed", "quantization", "backend", "threads", "max_model_len", "max_num_seqs",
    "kv_cache_dtype", "kv_cache_memory", "speculate", "experts", "prefix_cache_dir", "host", "port",
    "served_model_name", "api_key_file",
})  # fmt: skip


def _keys(help: str) -> Any:
    return typer.Option(metavar="[NAME:]KEY", help=help, rich_help_panel="HTTP")


@app.command(epilog=EPILOG)
@with_options(engine=EngineConfig, server=ServerConfig, common=_COMMON)
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
            from farthing.engine.build import require_torch

            require_torch(engine_config)
        from farthing.server.run import serve as run

        model = preflight(engine_config)
        _suggest_extras()
        raise typer.Exit(run(server_config, engine_config.model, lambda: _load(engine_config, model)))


def _load(config: EngineConfig, model: Found) -> Engine:
    path = model.fetch()
    from farthing.engine.build import build_engine  # imports torch

    engine = build_engine(replace(config, model=str(path)))
    remember("serve")
    return engine


def _suggest_extras() -> None:
    """Log the extras missing for serving, with the command that installs them."""
    absent = [extra for extra in _SERVING_EXTRAS if extras.missing(extra)]
    if absent:
        gains = ", ".join(extras.EXTRAS[extra] for extra in absent)
        log.info("not installed: %s; %s", gains, extras.how_to_install(*absent))
