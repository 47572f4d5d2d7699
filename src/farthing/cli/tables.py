"""Tables and progress bars that several commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from farthing import process

if TYPE_CHECKING:
    from farthing.model.inspect import ContextCost, ModelCost, RoutingReport


# Progress on stderr of long-running commands: a bar on a terminal, else a line now and then.


@contextmanager
def token_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; the yielded function advances it."""
    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def step_progress(label: str, say: Callable[[str], object] | None = None) -> Iterator[process.Progress]:
    """Progress over named steps; the yielded function takes (name, done, total). say: prints a line where
    stderr is no terminal; None: on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield process.Lines(say or (lambda line: console.print(line, highlight=False)))
        return
    with _bar(TaskProgressColumn()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _bar(count: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    # Steps of a large layer are minutes apart, and the default period of 30 s would hold one of them.
    return Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=1800)


R = TypeVar("R", bound="Result")


def print_percentiles(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Milliseconds of each row at p50, p90 and p99; a row without values shows dashes."""
    points = ("p50", "p90", "p99")
    table = Table("", *points, title=title)
    for name, values in rows.items():
        table.add_row(f"{name}, ms", *(f"{values[p]:,.1f}" if values else "-" for p in points))
    Console().print(table)


class Result(Protocol):
    """What a load run measured."""

    @property
    def failed(self) -> int:
        """Number of failed requests."""

    @property
    def errors(self) -> Iterable[str]:
        """Messages of the failures."""

    def to_json(self) -> dict[str, Any]:
        """The result as a document."""


def report(result: R, as_json: bool, show: Callable[[R], None]) -> NoReturn:
    """Print a result, failures on stderr; exit status 1 if a request failed."""
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        show(result)
        for error in result.errors:
            print(f"failed: {error}", file=sys.stderr)
    raise typer.Exit(1 if result.failed else 0)


def print_cost(model: str, cost: ModelCost) -> None:
    """The per-token figures."""
    table = Table(title=f"{model}: cost per token", show_header=False)
    table.add_row("parameters", f"{cost.total_parameters:,}")
    table.add_row("  active per token", f"{cost.active_parameters:,}")
    table.add_row("  without the head", f"{cost.active_parameters - cost.head_parameters:,}")
    table.add_row("  with head and embedding", f"{cost.active_parameters + cost.head_parameters:,}")
    table.add_row("  in MTP layers", f"{cost.mtp_parameters:,}")
    table.add_row("  routed, all / active", f"{cost.routed_parameters:,} / {cost.active_routed_parameters:,}")
    table.add_row("stored weight bytes", f"{cost.weight_bytes:,}")
    table.add_row("  read per token (batch 1)", f"{cost.active_bytes:,}")
    table.add_row("KV cache bytes per token (bf16)", f"{cost.kv_bytes_per_token:,}")
    if cost.kv_bytes_per_sequence:
        table.add_row("  and per sequence, of windows and states", f"{cost.kv_bytes_per_sequence:,}")
    table.add_row("FLOPs per token", f"{cost.flops_per_token:,}")
    table.add_row("  plus, per token of context", f"{cost.attention_flops_per_context_token:,}")
    table.add_row("FLOPs of a dense model this size", f"{cost.dense_flops_per_token:,}")
    table.add_row("  saved, compared with it", f"{cost.compute_saved:.1%}")
    Console().print(table)


def print_contexts(contexts: Sequence[ContextCost], index_topk: int | None) -> None:
    """Attention cost by context length: dense and, if the model has an indexer, sparse."""
    sparse = ["sparse GFLOPs", "sparse MB"] if index_topk else []
    title = "attention, per token" + (f" (sparse: the {index_topk:,} highest scores)" if index_topk else "")
    table = Table("context", "dense GFLOPs", "dense MB", *sparse, title=title)
    for c in contexts:
        costs = [c.dense_flops / 1e9, c.dense_bytes / 1e6]
        costs += [c.flops / 1e9, c.bytes / 1e6] if index_topk else []
        table.add_row(f"{c.context:,}", *(f"{cost:,.1f}" for cost in costs))
    Console().print(table)


def print_routing(report: RoutingReport) -> None:
    """Routing of the prompts, one row per MoE layer."""
    title = (
        f"routing of {report.tokens:,} tokens: {report.experts_per_token:.2f} experts per token, "
        f"{report.compute_saved:.1%} compute saved (measured)"
    )
    table = Table("MoE layer", "least", "mean", "most", "busiest / mean", "unused", title=title)
    for i, (row, imbalance) in enumerate(zip(report.tokens_per_expert, report.imbalance, strict=True)):
        mean = sum(row) / len(row)
        table.add_row(
            str(i), f"{min(row):,}", f"{mean:,.0f}", f"{max(row):,}", f"{imbalance:.2f}", str(row.count(0))
        )
    Console().print(table)


def size(n: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"
