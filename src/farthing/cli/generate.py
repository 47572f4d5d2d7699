"""`farthing generate`: complete prompts on the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Annotated, Any, cast

import typer

app = typer.Typer(add_completion=False)

EPILOG = """
Examples:

  farthing generate --prompt "def fibonacci(n):" --temperature 0

  farthing generate MODEL --prompt "Hello" --chat --max-tokens 200

  echo "import " | farthing generate --prompt - --json
"""


@app.command(epilog=EPILOG)
def generate(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or the embedded model.")] = "mite",
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to complete; '-' reads stdin. Repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Treat each prompt as a user's message.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the checkpoint's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many of the most likely tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Completions of each prompt.")] = 1,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu or gpu.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="Round dense weights to int8 or int4.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, fp8 or int8.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and output together.")] = None,
    speculate: Annotated[str | None, typer.Option(help="mtp[:k], ngram[:k] or mtp+ngram[:k].")] = None,
    experts: Annotated[str, typer.Option(help="auto, all or adaptive:p[,min=2,max=8].")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Complete prompts, streaming to the terminal or as one JSON document."""
    if not prompt:
        raise typer.BadParameter("no prompt; expected --prompt TEXT, or --prompt - to read stdin")
    texts = [sys.stdin.read() if text == "-" else text for text in prompt]
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop}
    try:
        from farthing.llm import LLM  # imports torch

        with LLM(
            model,
            backend=backend,
            quantization=cast("Any", quantization),  # checked by EngineConfig
            kv_cache_dtype=cast("Any", kv_cache_dtype),
            max_model_len=max_model_len,
            speculate=speculate,
            experts=experts,
            threads=threads,
        ) as llm:
            given: dict[str, Any] = {
                name: value for name, value in sampling.items() if value not in (None, [])
            }
            params = replace(llm.get_default_sampling_params(), max_tokens=max_tokens, n=n, **given)
            prompts = (
                [llm.engine.chat_prompt([{"role": "user", "content": t}]) for t in texts] if chat else texts
            )
            if as_json:
                outputs = llm.generate(prompts, params, use_tqdm=False, add_special_tokens=not chat)
                typer.echo(json.dumps({"model": model, "requests": [asdict(o) for o in outputs]}))
            elif n > 1 or len(texts) > 1:
                for output in llm.generate(prompts, params, add_special_tokens=not chat):
                    for completion in output.outputs:
                        typer.echo(f"{output.prompt}{completion.text}\n")
            else:
                for part in llm.stream(prompts[0], params, add_special_tokens=not chat):
                    typer.echo("".join(c.text for c in part.outputs), nl=False)
                typer.echo()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        typer.secho(f"farthing generate: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
