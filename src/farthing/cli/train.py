"""`farthing train`: train the embedded model, quantize or prune a model with training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from farthing.cli.exits import errors_as_one_line, exit_on_verdict

app = typer.Typer(
    no_args_is_help=True, help="Train the embedded model; quantize or prune a model with training."
)


@app.callback()
def _root() -> None:
    """Train models."""


@app.command()
def mite(
    out: Annotated[Path, typer.Option(help="Run directory: state, record, checkpoint.")] = Path("runs/mite"),
    minutes: Annotated[float | None, typer.Option(help="Run length in CPU minutes per thread.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Run length in tokens, instead of --minutes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Directory of .py files. Default: the standard library.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed for weights and data order.")] = 0,
    precision: Annotated[
        str, typer.Option(help="Precision of the projections' products: bf16 or fp8.")
    ] = "bf16",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe field as NAME=VALUE. Repeatable.")
    ] = None,
    sparse_attention: Annotated[
        bool,
        typer.Option(
            "--sparse-attention", help="Train an indexer for the embedded model instead, in two stages."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Train a small DeepSeek-V3 that completes Python; Ctrl-C saves, --resume continues.

    Examples:

      farthing train mite --minutes 80 --threads 2

      farthing train mite --resume --minutes 120

      farthing train mite --out /tmp/quick --tokens 200000 --set muon_lr=0.03

      farthing train mite --precision fp8 --set fp8_scaling='"delayed"'

      farthing train mite --sparse-attention --out runs/mite-sparse --tokens 80000
    """
    if sparse_attention:
        _sparse(out, minutes, tokens, resume, data, device, threads, seed, precision, settings or [], as_json)
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # one entry per matrix shape
    from farthing.files import to_json
    from farthing.train.mite import train_mite

    if minutes is None and tokens is None:
        minutes = 90.0
    with errors_as_one_line(resumes=True):
        summary = train_mite(
            out, minutes, tokens, resume, data, device, threads, seed, settings or [], precision
        )
    if summary is not None and as_json:
        typer.echo(to_json(summary))


def _sparse(
    out: Path, minutes: float | None, tokens: int | None, resume: bool, data: Path | None, device: str,
    threads: int, seed: int, precision: str, overrides: list[str], as_json: bool,
) -> None:  # fmt: skip
    """`mite --sparse-attention`."""
    import dataclasses

    from farthing.train.sparse_run import configured, train_sparse

    def run() -> dict[str, Any] | None:
        if minutes is not None or device not in ("auto", "cpu"):
            raise ValueError("--sparse-attention takes --tokens and runs on the CPU; expected no --minutes")
        if precision != "bf16":
            raise ValueError(f"--precision is {precision!r}; expected 'bf16' with --sparse-attention")
        config, changed = configured(overrides)
        settings = _settings("mite", out, tokens or 80_000, 512, 1024, 40_000, data, "cpu", threads, seed)
        return train_sparse(dataclasses.replace(settings, **changed), config, resume)

    _finish(run, as_json)


Model = Annotated[str, typer.Argument(help="A checkpoint directory, or `mite`.")]
Tokens = Annotated[int, typer.Option(min=1, help="Run length in tokens.")]
Window = Annotated[int, typer.Option(min=1, help="Context length in tokens.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens per step.")]
EvalTokens = Annotated[int, typer.Option(min=1, help="Held-out tokens per evaluation.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Data = Annotated[Path | None, typer.Option(help="Directory of .py files. Default: the standard library.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Seed = Annotated[int, typer.Option(help="Seed for the data order.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]


@app.command()
def qat(
    model: Model = "mite",
    out: Annotated[Path, typer.Option("--out", "-o", help="Run directory.")] = Path("runs/qat"),
    stages: Annotated[
        str, typer.Option(help="Stages as START:BITS; START is a share of the run, BITS W8A8, W4A8 or W4A4.")
    ] = "0:W8A8,0.01:W4A8,0.08:W4A4",
    inputs: Annotated[
        str, typer.Option(help="Input ranges: group (dynamic, learned clip) or tensor (LSQ+, not exported).")
    ] = "group",
    smoothing: Annotated[
        float, typer.Option(help="Strength of input smoothing, 0 (off) to 1 (all channels equal).")
    ] = 0.5,
    hard: Annotated[
        float, typer.Option(help="Weight of the text's cross entropy in the loss; the rest is distillation.")
    ] = 0.0,
    tokens: Tokens = 1_500_000,
    window: Window = 1024,
    batch_tokens: BatchTokens = 4096,
    eval_tokens: EvalTokens = 12_000,
    resume: Resume = False,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Quantization-aware training from a trained checkpoint, with the float model as the teacher.

    Examples:

      farthing train qat -o runs/qat && farthing serve runs/qat/checkpoint

      farthing train qat ./model --stages 0:W4A8 --tokens 2000000 --device cuda --batch-tokens 65536
    """
    from farthing.train.qat import QatConfig, parse_stages
    from farthing.train.qat_run import train_qat

    def run() -> dict[str, Any] | None:
        settings = _settings(
            model, out, tokens, window, batch_tokens, eval_tokens, data, device, threads, seed
        )
        if inputs not in ("group", "tensor"):
            raise ValueError(f"--inputs {inputs!r}: expected group or tensor")
        kind: Any = inputs
        config = QatConfig(parse_stages(stages), inputs=kind, smoothing=smoothing, hard=hard)
        return train_qat(settings, config, resume)

    _finish(run, as_json)


@app.command()
def prune(
    model: Model = "mite",
    out: Annotated[Path, typer.Option("--out", "-o", help="Run directory.")] = Path("runs/prune"),
    target: Annotated[float, typer.Option(help="Share of the MLP parameters to remove.")] = 0.28,
    tau: Annotated[
        float, typer.Option(help="Activity threshold of a neuron, in units of the token's mean.")
    ] = 0.3,
    bound: Annotated[float, typer.Option(help="Pause pruning above this perplexity increase.")] = 0.03,
    tokens: Tokens = 400_000,
    window: Window = 512,
    batch_tokens: BatchTokens = 2048,
    eval_tokens: EvalTokens = 12_000,
    resume: Resume = False,
    data: Data = None,
    device: Device = "cpu",
    threads: Threads = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Prune neurons and experts that contribute least, step by step while training.

    Exits with 4 if the final perplexity on held-out text exceeds --bound; the checkpoint is still written.

    Examples:

      farthing train prune -o runs/prune && farthing eval --against runs/prune/checkpoint

      farthing train prune ./model --target 0.4 --tokens 5000000 --device cuda --batch-tokens 65536
    """
    from farthing.train.pruning import PruneConfig
    from farthing.train.pruning_run import train_prune

    def run() -> dict[str, Any] | None:
        settings = _settings(
            model, out, tokens, window, batch_tokens, eval_tokens, data, device, threads, seed
        )
        return train_prune(settings, PruneConfig(target=target, tau=tau, bound=bound), resume)

    summary = _finish(run, as_json)
    if summary is not None and not summary["within_bound"]:
        rise = summary["relative_increase"]
        exit_on_verdict("fail", f"perplexity rose by {rise:.2%}; the bound is {bound:.2%} (--bound)")


def _settings(
    model: str, out: Path, tokens: int, window: int, batch_tokens: int, eval_tokens: int,
    data: Path | None, device: str, threads: int, seed: int,
) -> Any:  # fmt: skip
    """Validate the settings and set up the process as `mite` does."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    import torch

    from farthing.hub import resolve_model
    from farthing.train.finetune import Settings
    from farthing.train.mite import tune_allocator

    tune_allocator()
    torch.set_num_threads(threads)
    return Settings(
        resolve_model(model),
        out,
        tokens,
        window,
        batch_tokens,
        seed,
        threads,
        device,
        data,
        eval_tokens=eval_tokens,
    )


def _finish(run: Callable[[], dict[str, Any] | None], as_json: bool) -> dict[str, Any] | None:
    """Run, print the summary and return it; None if the run was interrupted."""
    from farthing.files import to_json

    with errors_as_one_line(resumes=True):
        summary = run()
    if summary is None:
        return None
    if as_json:
        typer.echo(to_json(summary))
        return summary
    for name, value in summary.items():
        if name not in ("curve", "events", "layer_sizes"):
            typer.echo(f"{name:>18}  {value}")
    return summary
