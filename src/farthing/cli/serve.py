"""`farthing serve`: a model behind OpenAI's API."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from farthing.engine.engine import Engine

app = typer.Typer(add_completion=False)

EPILOG = """
Examples:

  farthing serve

  farthing serve ./DeepSeek-V3 --port 9000 --max-num-seqs 128 --kv-cache-dtype fp8

  farthing serve --host 0.0.0.0 --api-key-file keys.txt --tokens-per-minute 100000
"""

_ENGINE, _RANKS, _HTTP, _LIMITS, _COST = "Engine", "Ranks", "HTTP", "Limits", "Cost"


@app.command(epilog=EPILOG)
def serve(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or the embedded model.")] = "mite",
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_HTTP)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.", rich_help_panel=_HTTP)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME:]KEY",
            help="Ask for this key. Repeatable; see also FARTHING_API_KEY.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys, `name:key` or a key on each line.", rich_help_panel=_HTTP)
    ] = None,
    insecure: Annotated[
        bool, typer.Option(help="Let other machines in without a key.", rich_help_panel=_HTTP)
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name in the API. Repeatable. Default: MODEL.", rich_help_panel=_HTTP),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="Path prefix behind a proxy that strips it.", rich_help_panel=_HTTP)
    ] = "",
    reasoning_parser: Annotated[
        str,
        typer.Option(
            help="auto, deepseek_r1 or none: whether <think> becomes reasoning_content.",
            rich_help_panel=_HTTP,
        ),
    ] = "auto",
    strict_fields: Annotated[
        bool, typer.Option(help="Refuse unknown request fields.", rich_help_panel=_HTTP)
    ] = False,
    access_log: Annotated[bool, typer.Option(help="Log every request.", rich_help_panel=_HTTP)] = False,
    prices: Annotated[
        str | None,
        typer.Option(help="A prices.toml over the packaged one.", rich_help_panel=_COST),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="Its row for this machine. Default: by device name.", rich_help_panel=_COST),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="For each key.", rich_help_panel=_LIMITS)
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Prompt and output, for each key.", rich_help_panel=_LIMITS)
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Largest body.", rich_help_panel=_LIMITS)] = 8
    << 20,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Waiting requests before 429.", rich_help_panel=_LIMITS)
    ] = 1024,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds for a whole answer.", rich_help_panel=_LIMITS)
    ] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds for running answers after SIGTERM.", rich_help_panel=_LIMITS)
    ] = 30.0,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_ENGINE)
    ] = "auto",
    backend: Annotated[
        str, typer.Option(help="auto, reference, cpu or gpu.", rich_help_panel=_ENGINE)
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: all cores.", rich_help_panel=_ENGINE)
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Round dense weights to int8 or int4.", rich_help_panel=_ENGINE)
    ] = None,
    packed: Annotated[
        str | None,
        typer.Option(
            help="A file written by `farthing compress --pack`; ranks write one each.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output together.", rich_help_panel=_ENGINE)
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences in one step.", rich_help_panel=_ENGINE)] = 64,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens in one step.", rich_help_panel=_ENGINE)
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens in a cache block.", rich_help_panel=_ENGINE)] = 16,
    num_blocks: Annotated[
        int | None, typer.Option(help="Cache blocks. Default: by memory.", rich_help_panel=_ENGINE)
    ] = None,
    kv_cache_memory: Annotated[
        int | None, typer.Option(help="Bytes of cache.", rich_help_panel=_ENGINE)
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, fp8 or int8.", rich_help_panel=_ENGINE)
    ] = "auto",
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Keep the cache of prompts for the next ones.", rich_help_panel=_ENGINE)
    ] = True,
    speculate: Annotated[
        str | None, typer.Option(help="mtp[:k], ngram[:k] or mtp+ngram[:k].", rich_help_panel=_ENGINE)
    ] = None,
    experts: Annotated[
        str, typer.Option(help="auto, all or adaptive:p[,min=2,max=8].", rich_help_panel=_ENGINE)
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of requests without a seed.", rich_help_panel=_ENGINE)] = 0,
    skip_tokenizer_init: Annotated[
        bool, typer.Option(help="Token ids in and out.", rich_help_panel=_ENGINE)
    ] = False,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size", "--tp", help="Ranks that share the heads.", rich_help_panel=_RANKS
        ),
    ] = 1,
    pipeline_parallel_size: Annotated[
        int,
        typer.Option("--pipeline-parallel-size", "--pp", help="Ranges of layers.", rich_help_panel=_RANKS),
    ] = 1,
    expert_parallel_size: Annotated[
        int,
        typer.Option(
            "--expert-parallel-size", "--ep", help="Ranks that share the experts.", rich_help_panel=_RANKS
        ),
    ] = 1,
    dp_attention: Annotated[
        bool,
        typer.Option(
            "--dp-attention", help="ep / tp groups attend to their own sequences.", rich_help_panel=_RANKS
        ),
    ] = False,
    transport: Annotated[
        str, typer.Option(help="Between ranks: auto, shared (memory) or gloo.", rich_help_panel=_RANKS)
    ] = "auto",
    redundant_experts: Annotated[
        int, typer.Option(min=0, help="Copies of each layer's busiest experts.", rich_help_panel=_RANKS)
    ] = 0,
    rebalance_steps: Annotated[
        int | None,
        typer.Option(help="Place experts by measured tokens every N steps.", rich_help_panel=_RANKS),
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="Of a Ray cluster, to spread ranks over.", rich_help_panel=_RANKS)
    ] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Of the cluster. Default: this host's.", rich_help_panel=_RANKS),
    ] = None,
    experts_on: Annotated[
        str | None,
        typer.Option(help="cpu: routed experts there, the rest on the GPU.", rich_help_panel=_RANKS),
    ] = None,
    hot_experts: Annotated[
        int,
        typer.Option(min=0, help="Of each layer, copied to the GPU by use.", rich_help_panel=_RANKS),
    ] = 0,
    disaggregate: Annotated[
        bool,
        typer.Option("--disaggregate", help="Compute prompts in another process.", rich_help_panel=_RANKS),
    ] = False,
) -> None:
    """Serve MODEL: /v1/chat/completions, /v1/completions, /v1/models, /metrics, /health, /ready."""
    from farthing.config import EngineConfig
    from farthing.server.config import ServerConfig, gather_keys

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        engine_config = EngineConfig(
            model=model,
            dtype=cast("Any", dtype),  # checked by EngineConfig
            backend=backend,
            threads=threads,
            quantization=cast("Any", quantization),
            packed=packed,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_queue=max_queue,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_memory=kv_cache_memory,
            kv_cache_dtype=cast("Any", kv_cache_dtype),
            enable_prefix_caching=enable_prefix_caching,
            speculate=speculate,
            experts=experts,
            seed=seed,
            skip_tokenizer_init=skip_tokenizer_init,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            expert_parallel_size=expert_parallel_size,
            dp_attention=dp_attention,
            transport=cast("Any", transport),
            redundant_experts=redundant_experts,
            rebalance_steps=rebalance_steps,
            nodes=nodes,
            ray_address=ray_address,
            experts_on=cast("Any", experts_on),
            hot_experts=hot_experts,
            disaggregate=disaggregate,
        )
        server_config = ServerConfig(
            host=host,
            port=port,
            served_model_name=tuple(served_model_name or ()),
            keys=gather_keys(api_key or [], api_key_file),
            insecure=insecure,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_body_bytes=max_body_bytes,
            request_timeout=request_timeout,
            drain_timeout=drain_timeout,
            reasoning_parser=cast("Any", reasoning_parser),
            strict_fields=strict_fields,
            root_path=root_path,
            access_log=access_log,
            prices=prices,
            hardware=hardware,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    def load() -> Engine:
        from farthing.engine.engine import Engine  # imports torch

        return Engine.from_config(engine_config)

    from farthing.server.run import serve as run

    try:
        raise typer.Exit(run(server_config, model, load))
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
