"""`farthing train`: train the embedded model, quantize or prune a model with training."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from farthing.cli.errors import errors_as_one_line, exit_on_verdict, with_options
from farthing.config import check, option
from farthing.files import to_json
from farthing.hub import resolve_model

if TYPE_CHECKING:
    from farthing_lab.train.finetune import Settings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train the embedded model; quantize or prune a model with training.",
)


Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]
_option = partial(option, group="Options")
_THEN = "add --resume to continue from the last state.pt in --out, if there is one"


@app.callback()
def _root() -> None:
    """Train models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MiteOptions:
    """A run that trains the embedded model."""

    out: Path = _option(Path("runs/mite"), "Run directory: state, record, checkpoint", flags=("-o",))
    arch: Literal["v3", "v4"] = _option("v3", "Architecture: DeepSeek-V3's or DeepSeek-V4's")
    minutes: float | None = _option(None, "Run length in CPU minutes per thread; default: 90")
    tokens: int | None = _option(None, "Run length in tokens, instead of --minutes")
    resume: bool = _option(False, "Continue the run in --out")
    data: Path | None = _option(None, "Directory of .py files; default: the standard library")
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "Device")
    threads: int = _option(1, "CPU threads", minimum=1)
    seed: int = _option(0, "Seed for weights and data order")
    precision: Literal["bf16", "fp8"] = _option("bf16", "Precision of the projections' products")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """A run that continues a trained checkpoint."""

    model: str = _option("mite", "A checkpoint directory, or `mite`", argument=True)
    out: Path = _option(Path("runs"), "Run directory", flags=("-o",))
    tokens: int = _option(400_000, "Run length in tokens", minimum=1)
    window: int = _option(512, "Context length in tokens", minimum=1)
    batch_tokens: int = _option(2048, "Tokens per step", minimum=1)
    eval_tokens: int = _option(12_000, "Held-out tokens per evaluation", minimum=1)
    resume: bool = _option(False, "Continue the run in --out")
    data: Path | None = _option(None, "Directory of .py files; default: the standard library")
    device: Literal["cpu", "cuda"] = _option("cpu", "Device")
    threads: int = _option(1, "CPU threads", minimum=1)
    seed: int = _option(0, "Seed for the data order")

    def __post_init__(self) -> None:
        check(self)

    def settings(self) -> Settings:
        """Set up the process as `mite` does, and return the run's settings."""
        _allocate_for_training()
        import torch

        from farthing.memory import keep_freed_memory
        from farthing_lab.train.finetune import Settings

        keep_freed_memory()
        torch.set_num_threads(self.threads)
        return Settings(
            resolve_model(self.model),
            self.out,
            self.tokens,
            self.window,
            self.batch_tokens,
            self.seed,
            self.threads,
            self.device,
            self.data,
            eval_tokens=self.eval_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QatOptions(RunOptions):
    """A run of quantization-aware training."""

    out: Path = _option(Path("runs/qat"), "Run directory", flags=("-o",))
    tokens: int = _option(614_400, "Run length in tokens", minimum=1)
    window: int = _option(1024, "Context length in tokens", minimum=1)
    batch_tokens: int = _option(2048, "Tokens per step", minimum=1)
    stages: str | None = _option(
        None,
        "Stages as START:BITS; START is a share of the run, BITS W16A16 (not rounded) to W4A4; default: "
        "0:W4A4, with --blocks 0:W16A16,0.6:W4A8",
    )
    blocks: Literal["16x16", "16x64"] | None = _option(
        None, "Also prune blocks of the feed-forwards, of ROWSxCOLUMNS, which the CPU kernels skip"
    )
    sparsity: float | None = _option(None, "Share of zero blocks at the end, with --blocks; default: 0.4")
    inputs: Literal["group", "tensor"] = _option(
        "group", "Input ranges: group (dynamic, learned clip) or tensor (LSQ+, not exported)"
    )
    group: int = _option(
        64, "Columns per scale of weights and of input ranges; the kernels have 32 and 64", minimum=1
    )
    smoothing: float = _option(0.5, "Strength of input smoothing, 0 (off) to 1 (all channels equal)")
    hard: float = _option(0.0, "Weight of the text's cross entropy in the loss; the rest is distillation")

    def __post_init__(self) -> None:
        check(self)
        if self.sparsity is not None and self.blocks is None:
            raise ValueError(f"sparsity: got {self.sparsity} without --blocks; expected both")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions(RunOptions):
    """A run that prunes while training."""

    out: Path = _option(Path("runs/prune"), "Run directory", flags=("-o",))
    target: float = _option(0.28, "Share of the MLP parameters to remove")
    units: Literal["both", "neurons", "experts"] = _option("both", "What to remove")
    multiple: int | None = _option(
        None, "Neurons to remove at a time; 4-bit kernels need 32 (default) and are faster with 64", minimum=1
    )
    rank: Literal["energy", "loss"] = _option(
        "energy", "Rank units by their energy or by the loss without them, measured at every event"
    )
    tau: float = _option(0.3, "Activity threshold of a neuron, in units of the token's mean")
    bound: float = _option(0.03, "Pause pruning above this perplexity increase")
    hard: float = _option(0.5, "Weight of the text's cross entropy in the loss; the rest is distillation")

    def __post_init__(self) -> None:
        check(self)
        if self.multiple is not None and self.units == "experts":
            raise ValueError(
                f"multiple: got {self.multiple} with units 'experts'; expected units with neurons"
            )


@app.command()
@with_options(options=MiteOptions)
def mite(
    options: dict[str, Any],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe field as NAME=VALUE (repeatable).")
    ] = None,
    sparse_attention: Annotated[
        bool,
        typer.Option(
            "--sparse-attention", help="Train an indexer for the embedded model instead, in two stages."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a small DeepSeek-V3 that completes Python; Ctrl-C saves, --resume continues.

    Examples:

      farthing train mite --minutes 80 --threads 2

      farthing train mite --arch v4 --out runs/mite-v4

      farthing train mite --resume --minutes 120

      farthing train mite --out /tmp/quick --tokens 200000 --set muon_lr=0.03

      farthing train mite --precision fp8 --set fp8_scaling='"delayed"'

      farthing train mite --sparse-attention --out runs/mite-sparse --tokens 80000
    """
    with errors_as_one_line():
        given, overrides = MiteOptions(**options), settings or []
    if sparse_attention:
        _finish(lambda: _sparse(given, overrides), as_json)
        return
    _allocate_for_training()
    from farthing_lab.train.mite import train_mite

    minutes = 90.0 if given.minutes is None and given.tokens is None else given.minutes
    with errors_as_one_line(_THEN):
        _require_matplotlib()
        summary = train_mite(
            given.out,
            minutes,
            given.tokens,
            given.resume,
            given.data,
            given.device,
            given.threads,
            given.seed,
            overrides,
            given.precision,
            arch=given.arch,
        )
    if summary is not None and as_json:
        typer.echo(to_json(summary))


def _sparse(given: MiteOptions, overrides: list[str]) -> dict[str, Any] | None:
    """`mite --sparse-attention`."""
    from farthing_lab.train.sparse_run import configured, train_sparse

    if given.minutes is not None or given.device == "cuda":
        raise ValueError("--sparse-attention takes --tokens and runs on the CPU; expected no --minutes")
    if given.precision != "bf16":
        raise ValueError(f"--precision: got {given.precision!r}; expected 'bf16' with --sparse-attention")
    config, found = configured(overrides)
    changed: dict[str, Any] = dict(found)
    run = RunOptions(
        out=given.out,
        tokens=given.tokens or 80_000,
        window=512,
        batch_tokens=1024,
        eval_tokens=40_000,
        data=given.data,
        threads=given.threads,
        seed=given.seed,
    )
    return train_sparse(replace(run.settings(), **changed), config, given.resume)


@app.command()
@with_options(options=QatOptions)
def qat(options: dict[str, Any], as_json: Json = False) -> None:
    """Quantization-aware training from a trained checkpoint, with the float model as the teacher.

    Examples:

      farthing train qat -o runs/qat && farthing serve runs/qat/checkpoint

      farthing train qat --blocks 16x16 -o runs/blocks && farthing serve runs/blocks/checkpoint

      farthing train qat ./model --stages 0:W4A8 --tokens 2000000 --device cuda --batch-tokens 65536
    """
    from farthing_lab.compress.masks import BLOCKS
    from farthing_lab.train.qat import train_qat
    from farthing_lab.train.qat_model import QatConfig, parse_stages

    def run() -> dict[str, Any] | None:
        given = QatOptions(**options)
        _require_matplotlib()
        stages = given.stages or ("0:W16A16,0.6:W4A8" if given.blocks else "0:W4A4")
        config = QatConfig(
            parse_stages(stages),
            group=given.group,
            inputs=given.inputs,
            smoothing=given.smoothing,
            hard=given.hard,
            block=BLOCKS[given.blocks] if given.blocks else None,
            sparsity=QatConfig.sparsity if given.sparsity is None else given.sparsity,
        )
        return train_qat(given.settings(), config, given.resume)

    _finish(run, as_json)


@app.command()
@with_options(options=PruneOptions)
def prune(options: dict[str, Any], as_json: Json = False) -> None:
    """Prune neurons and experts that contribute least, step by step while training.

    Exits with 4 if the final perplexity on held-out text exceeds --bound; the checkpoint is still written.

    Examples:

      farthing train prune -o runs/prune && farthing eval --against runs/prune/checkpoint

      farthing train prune ./model --target 0.4 --tokens 5000000 --device cuda --batch-tokens 65536
    """
    from farthing_lab.train.pruning import PruneConfig, train_prune

    def run() -> dict[str, Any] | None:
        given = PruneOptions(**options)
        _require_matplotlib()
        config = PruneConfig(
            target=given.target,
            units=given.units,
            multiple=PruneConfig.multiple if given.multiple is None else given.multiple,
            rank=given.rank,
            tau=given.tau,
            bound=given.bound,
            hard=given.hard,
        )
        return train_prune(given.settings(), config, given.resume)

    summary = _finish(run, as_json)
    if summary is not None and not summary["within_bound"]:
        rise, bound = summary["relative_increase"], options["bound"]
        exit_on_verdict("fail", f"perplexity rose by {rise:.2%}; the bound is {bound:.2%} (--bound)")


def _allocate_for_training() -> None:
    """Settings that torch reads at its first allocation."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # one entry per matrix shape


def _require_matplotlib() -> None:
    """Fail before the run, not when it draws its curves at the end."""
    import matplotlib  # noqa: F401


def _finish(run: Callable[[], dict[str, Any] | None], as_json: bool) -> dict[str, Any] | None:
    """Run, print the summary and return it; None if the run was interrupted."""

    with errors_as_one_line(_THEN):
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
