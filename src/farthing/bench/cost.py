"""What each lever takes off the cost of a token: `farthing bench cost`.

Every row is one way to serve the same checkpoint on this machine's CPU, measured in a process of its own
(see `cost_probe`): the original (Hugging Face, eager, bfloat16), then Farthing with one lever more in each
row. The rows of a round follow each other, so that a machine that changes its mind changes it for all;
figures are medians over rounds. Every row is tried with one thread and with all, and the faster counts:
on a small model or a busy machine threads may cost more than they bring, to the original most of all.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from farthing.cost import Machine, usable_cpus

# Published for this class of system: how much of the original's is saved.
CLAIMS = {"latency": 0.62, "memory": 0.40, "power": 0.58}


@dataclass(frozen=True, slots=True)
class Lever:
    """A row: `options` are fields of EngineConfig, None is the original."""

    name: str
    options: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The same for every row: greedy decoding of `concurrency` prompts at once."""

    model: str  # a directory
    prompts: tuple[tuple[int, ...], ...]  # token ids
    output_tokens: int = 64

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ValueError("prompts: expected at least one, none of them empty")
        if self.output_tokens < 2:
            raise ValueError(f"output_tokens is {self.output_tokens}; expected at least 2")


@dataclass(frozen=True, slots=True)
class Probe:
    """One measurement of one row."""

    latency_ms: float  # between two tokens of a request, median
    seconds: float  # of wall for the whole workload
    cpu_seconds: float
    joules: float
    joules_source: str
    memory_bytes: int  # resident at most while serving, less what the libraries take
    tokens: int  # generated


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the rounds; the contract of `--json`."""

    name: str
    latency_ms_per_token: float
    memory_bytes: int
    joules_per_token: float
    joules_source: str
    usd_per_million_tokens: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, and the published claims beside what was measured."""

    rows: Sequence[Row]
    machine: Machine
    rounds: int
    concurrency: int
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """{"rows": […], "claims": {…}, and what was paid for}."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "claims": self.claims,
            "hardware": f"{self.machine.count} x {self.machine.hardware.name}",
            "usd_per_hour": self.machine.usd_per_hour,
            "prices_declared": self.machine.declared,
            "rounds": self.rounds,
            "concurrency": self.concurrency,
        }


def levers(
    mtp: bool, experts: str | None = "adaptive:0.8", quantization: Sequence[str] = ("int8", "int4")
) -> list[Lever]:
    """The rows, each with the levers of those before it. mtp: the model has a layer to speculate with."""
    rows = [Lever("original: Hugging Face eager, bf16"), Lever("Farthing kernels and engine", {})]
    options: dict[str, Any] = {}
    for bits in quantization:
        options = options | {"quantization": bits}
        rows.append(Lever(f"+ {bits} weights", options))
    if experts is not None:
        options = options | {"experts": experts}
        rows.append(Lever(f"+ experts {experts}", options))
    options = options | {"speculate": "mtp+ngram" if mtp else "ngram"}
    return [*rows, Lever("+ speculation: all together", options)]


def prompts_for(model: Path, vocabulary: int, count: int, length: int) -> tuple[tuple[int, ...], ...]:
    """`count` prompts of `length` token ids: of the checkpoint's held-out text where it brings one (so that
    speculation meets what the model was made for), else drawn at random, always the same."""
    if (model / "heldout.jsonl").exists() and (model / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        texts = (json.loads(line)["text"] for line in (model / "heldout.jsonl").open(encoding="utf-8"))
        found = [ids[:length] for text in texts if len(ids := tokenizer.encode(text).ids) >= length]
        if len(found) >= count:
            return tuple(tuple(ids) for ids in found[:count])
    rng = random.Random(0)
    return tuple(tuple(rng.randrange(3, vocabulary) for _ in range(length)) for _ in range(count))


def compare(
    workload: Workload,
    rows: Sequence[Lever],
    machine: Machine,
    rounds: int = 3,
    on_probe: Callable[[str], None] = lambda name: None,
    record: Path | None = None,
) -> Comparison:
    """Measure every row `rounds` times, interleaved. Raises RuntimeError naming the row that failed.

    record: a file that keeps every measurement, so that a run that was cut off goes on where it was. Raises
    ValueError if it is of other rows or another workload.
    """
    book = _Record(record, workload, rows)
    for turn in range(rounds):
        # The two that the claims need come first, in case the run is cut off.
        for lever in (rows[0], *reversed(rows[1:])):
            if len(book.probes[lever.name]) <= turn:
                tries = [_probe(lever, workload, machine, n) for n in sorted({1, usable_cpus()})]
                book.add(lever.name, min(tries, key=lambda probe: probe.latency_ms))
            on_probe(lever.name)
    table = [_row(name, probes, machine) for name, probes in book.probes.items()]
    return Comparison(table, machine, rounds, len(workload.prompts), claims(table[0], table[-1]))


class _Record:
    """The measurements so far, in memory and (if there is a path) in a JSON file."""

    def __init__(self, path: Path | None, workload: Workload, rows: Sequence[Lever]) -> None:
        self._path = path
        self._asked = {
            "prompts": [len(ids) for ids in workload.prompts],
            "output_tokens": workload.output_tokens,
            "rows": [asdict(lever) for lever in rows],
        }
        self.probes: dict[str, list[Probe]] = {lever.name: [] for lever in rows}
        if path is None or not path.exists():
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] != self._asked:
            raise ValueError(
                f"record is {str(path)!r}, of other rows or another workload; expected a new file"
            )
        self.probes |= {name: [Probe(**p) for p in probes] for name, probes in kept["probes"].items()}

    def add(self, name: str, probe: Probe) -> None:
        self.probes[name].append(probe)
        if self._path is not None:
            probes = {name: [asdict(p) for p in found] for name, found in self.probes.items()}
            self._path.write_text(json.dumps({"asked": self._asked, "probes": probes}), encoding="utf-8")


def claims(original: Row, final: Row) -> dict[str, dict[str, Any]]:
    """What was saved, of 1, beside what is published; power is read as energy per token."""
    pairs = {
        "latency": (original.latency_ms_per_token, final.latency_ms_per_token),
        "memory": (original.memory_bytes, final.memory_bytes),
        "power": (original.joules_per_token, final.joules_per_token),
    }
    saved = {name: 1 - after / before if before else 0.0 for name, (before, after) in pairs.items()}
    return {
        name: {"published": CLAIMS[name], "measured": saved[name], "met": saved[name] >= CLAIMS[name]}
        for name in CLAIMS
    }


def _probe(lever: Lever, workload: Workload, machine: Machine, threads: int) -> Probe:
    """One row in a process of its own, so that its memory and its threads are its own."""
    request = {
        **asdict(workload),
        "options": lever.options,
        "watts": machine.watts / machine.count,
        "idle_watts": machine.idle_watts / machine.count,
        "count": machine.count,
        "threads": threads,
    }
    command = [sys.executable, "-m", "farthing.bench.cost_probe"]
    run = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(f"{lever.name}: exit status {run.returncode}: {last[0]}")
    return Probe(**json.loads(run.stdout.splitlines()[-1]))


def _row(name: str, probes: Sequence[Probe], machine: Machine) -> Row:
    def median(value: Callable[[Probe], float]) -> float:
        return statistics.median(value(probe) for probe in probes)

    return Row(
        name=name,
        latency_ms_per_token=median(lambda p: p.latency_ms),
        memory_bytes=int(median(lambda p: p.memory_bytes)),
        joules_per_token=median(lambda p: p.joules / p.tokens),
        joules_source=probes[0].joules_source,
        usd_per_million_tokens=median(
            lambda p: (p.seconds * machine.usd_per_second + p.joules * machine.usd_per_joule) / p.tokens * 1e6
        ),
    )
