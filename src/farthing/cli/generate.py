"""`farthing generate`: complete prompts on the command line, without a server."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farthing import LLM
from farthing.cli.errors import one_line_errors, sampling_option, with_options
from farthing.config import EngineConfig

if TYPE_CHECKING:
    from farthing.engine.request import SamplingParams

app = typer.Typer(add_completion=False)

EPILOG = """
Examples:

  farthing generate --prompt "def fibonacci(n):" --temperature 0

  farthing generate MODEL --prompt "Hello" --chat --max-tokens 200

  echo "import " | farthing generate --prompt - --json
"""


@app.command(epilog=EPILOG)
@with_options(engine=EngineConfig, skip=("Limits",))
def generate(
    engine: dict[str, Any],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to complete; '-' reads stdin (repeatable).")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Prompts as user messages, through the chat template.")] = False,
    max_tokens: Annotated[int, sampling_option("max_tokens", "Maximum number of output tokens.")] = 128,
    temperature: Annotated[
        float | None,
        sampling_option("temperature", "Sampling temperature, 0 for greedy; default: the checkpoint's."),
    ] = None,
    top_p: Annotated[
        float | None, sampling_option("top_p", "Probability mass of the tokens to sample from.")
    ] = None,
    top_k: Annotated[
        int | None, sampling_option("top_k", "Number of most likely tokens to sample from.")
    ] = None,
    seed: Annotated[
        int | None, sampling_option("seed", "Sampling seed; the same seed gives the same tokens.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before (repeatable).")] = None,
    n: Annotated[int, sampling_option("n", "Number of completions per prompt.", "-n")] = 1,
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
