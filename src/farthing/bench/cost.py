"""`farthing bench cost`: the savings and quality loss of each lever.

Every row is one way to serve the same checkpoint on this machine's CPU, measured in its own process (see
`cost_probe`): the original (Hugging Face, eager, bfloat16), then Farthing with one more lever per row
(`levers`). Rows are interleaved in rounds, so a change in the machine's speed affects all of them;
figures are medians over rounds. Every row runs with one thread and with all, and the faster run counts: on a
small model or a busy machine threads may cost more than they gain, especially for the original.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from farthing.bench.levers import Lever, Quality
from farthing.cost import Machine, usable_cpus
from farthing.files import replace_json

# Published for this class of system: share saved relative to the original.
CLAIMS = {"latency": 0.62, "memory": 0.40, "power": 0.58}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The same for every row: greedy decoding of `concurrency` prompts at once."""

    model: str  # a directory
    prompts: tuple[tuple[int, ...], ...]  # token ids
    output_tokens: int = 64
    tiny: str = ""  # tiny checkpoint, run to import everything before memory is measured

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ValueError("prompts: expected at least one, none of them empty")
        if self.output_tokens < 2:
            raise ValueError(f"output_tokens: got {self.output_tokens}; expected at least 2")


@dataclass(frozen=True, slots=True)
class Probe:
    """One measurement of one row."""

    latency_ms: float  # mean time between two tokens of a request, after the first
    seconds: float  # wall time of the whole workload
    cpu_seconds: float
    joules: float
    joules_source: str
    memory_bytes: int  # peak resident set while serving, minus the libraries' share
    tokens: int  # generated


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the rounds; the schema of `--json`."""

    name: str
    latency_ms_per_token: float
    memory_bytes: int
    joules_per_token: float
    joules_source: str
    usd_per_million_tokens: float
    quality: Quality | None = None  # relative to the first row, which has none


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, and the published claims next to what was measured."""

    rows: Sequence[Row]
    machine: Machine
    rounds: int
    concurrency: int
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """{"rows": […], "claims": {…}, and the hardware with its price}."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "claims": self.claims,
            "hardware": f"{self.machine.count} x {self.machine.hardware.name}",
            "usd_per_hour": self.machine.usd_per_hour,
            "prices_declared": self.machine.declared,
            "rounds": self.rounds,
            "concurrency": self.concurrency,
        }


def prompts_for(model: Path, vocabulary: int, count: int, length: int) -> tuple[tuple[int, ...], ...]:
    """`count` prompts of `length` token ids: from the checkpoint's held-out text if it has one (so that
    speculation sees realistic text), otherwise fixed random ids."""
    if (model / "heldout.jsonl").exists() and (model / "tokenizer.json").exists():
        from farthing.tokenizer_file import read_tokenizer

        tokenizer = read_tokenizer(model / "tokenizer.json")
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
    qualities: Mapping[str, Quality | None] | None = None,
    budget: float = 0.01,
) -> Comparison:
    """Measure every row `rounds` times, interleaved. Raises RuntimeError naming the row that failed.

    record: a file that stores every measurement, so that an interrupted run resumes. Raises ValueError if it
    belongs to other rows or another workload. qualities: by row name. budget: maximum perplexity increase of
    all levers together.
    """
    book = _Record(record, workload, rows)
    for turn in range(rounds):
        # The two rows needed for the claims run first, in case the run is interrupted.
        for lever in (rows[0], *reversed(rows[1:])):
            if len(book.probes[lever.name]) <= turn:
                tries = [_probe(lever, workload, machine, n) for n in sorted({1, usable_cpus()})]
                book.add(lever.name, min(tries, key=lambda probe: probe.latency_ms))
            on_probe(lever.name)
    known = qualities or {}
    table = [_row(name, probes, machine, known.get(name)) for name, probes in book.probes.items()]
    return Comparison(table, machine, rounds, len(workload.prompts), claims(table[0], table[-1], budget))


class _Record:
    """The measurements so far, in memory and (if there is a path) in a JSON file."""

    def __init__(self, path: Path | None, workload: Workload, rows: Sequence[Lever]) -> None:
        self._path = path
        self._asked = {
            "prompts": [len(ids) for ids in workload.prompts],
            "output_tokens": workload.output_tokens,
            "rows": [[lever.name, lever.options] for lever in rows],
        }
        self.probes: dict[str, list[Probe]] = {lever.name: [] for lever in rows}
        if path is None or not path.exists():
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] != self._asked:
            raise ValueError(
                f"record: got {str(path)!r}, from other rows or another workload; expected a new file"
            )
        self.probes |= {name: [Probe(**p) for p in probes] for name, probes in kept["probes"].items()}

    def add(self, name: str, probe: Probe) -> None:
        self.probes[name].append(probe)
        if self._path is not None:
            probes = {name: [asdict(p) for p in found] for name, found in self.probes.items()}
            replace_json(self._path, {"asked": self._asked, "probes": probes})


def claims(original: Row, final: Row, budget: float = 0.01) -> dict[str, dict[str, Any]]:
    """The share saved compared with the published one (power: energy per token), and quality vs its budget.

    Quality is met when the upper end of the interval is within the budget.
    """
    pairs = {
        "latency": (original.latency_ms_per_token, final.latency_ms_per_token),
        "memory": (original.memory_bytes, final.memory_bytes),
        "power": (original.joules_per_token, final.joules_per_token),
    }
    saved = {name: 1 - after / before if before else 0.0 for name, (before, after) in pairs.items()}
    found: dict[str, dict[str, Any]] = {
        name: {"published": CLAIMS[name], "measured": saved[name], "met": saved[name] >= CLAIMS[name]}
        for name in CLAIMS
    }
    if (q := final.quality) is not None:
        interval = [q.low, q.high]
        found["quality"] = {
            "budget": budget, "measured": q.change, "interval": interval, "met": q.high <= budget,
        }  # fmt: skip
    return found


def _probe(lever: Lever, workload: Workload, machine: Machine, threads: int) -> Probe:
    """One row in its own process, so that memory and threads are not shared."""
    request = {
        **asdict(workload),
        "model": lever.model or workload.model,
        "options": lever.options,
        "watts": machine.watts / machine.count,
        "idle_watts": machine.idle_watts / machine.count,
        "count": machine.count,
        "threads": threads,
    }
    command = [sys.executable, "-m", "farthing.bench.cost_probe"]
    run = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RuntimeError(f"{lever.name}: exit status {run.returncode}: {last[0]}")
    return Probe(**json.loads(run.stdout.splitlines()[-1]))


def _row(name: str, probes: Sequence[Probe], machine: Machine, quality: Quality | None) -> Row:
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
        quality=quality,
    )
