"""What people run instead of eager bfloat16, beside the rows of `farthing bench cost`, in one run.

    farthing bench cost mite --record DIR                  # leaves its calibrated checkpoints in DIR
    python bench/cost_peer.py mite --record DIR --llama-bench PATH/llama-bench --gguf A.gguf B.gguf

One request of 128 tokens and 64 new ones. In every round, every checkpoint of DIR and every GGUF run once
with one thread and once with all, GGUFs also with and without repacking at load; the fastest counts.
llama-bench reports the decode rate; its CPU time per request is that of 21 requests less that of one. Its
memory is the peak resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from farthing.bench.cost import HEAD, Lever, Workload, bf16_checkpoint, compare, prompts_for
from farthing.cost.prices import Machine, Prices
from farthing.cpus import cpu_name, usable_cpus
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from peers import LlamaCpp

PROMPT, NEW, REPEATS = 128, 64, 20


@dataclass(frozen=True)
class Reading:
    """One row in one round."""

    ms_per_token: float
    memory_mb: float
    mj_per_token: float


def peer(binary: Path, gguf: Path, flags: list[str], machine: Machine) -> Reading:
    """A GGUF with llama-bench's flags."""
    seconds, cpu, peak = zip(*(_run(binary, gguf, flags, n) for n in (1, REPEATS + 1)), strict=True)
    per_request = (cpu[1] - cpu[0]) / REPEATS
    idle = max(0.0, (seconds[1] * NEW) * machine.count - per_request)
    watts, rest = machine.watts / machine.count, machine.idle_watts / machine.count
    return Reading(seconds[1] * 1e3, max(peak) / 1e6, (per_request * watts + idle * rest) / NEW * 1e3)


def _run(binary: Path, gguf: Path, flags: list[str], repeats: int) -> tuple[float, float, int]:
    """Seconds per new token, CPU seconds, and peak resident bytes of one process."""
    command = [str(binary.resolve()), "-m", str(gguf.resolve()), "-p", "0", "-n", "0"]
    command += ["-gp", f"{PROMPT},{NEW}", "-r", str(repeats), "-o", "json", *flags]
    with tempfile.TemporaryDirectory() as where:  # some leave a log where they run
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=where
        )
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    samples = json.loads(text[text.index("[\n") : text.rindex("]") + 1])[-1]["samples_ns"]
    return statistics.median(samples) / 1e9 / NEW, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def ours(lever: Lever, workload: Workload, machine: Machine) -> Reading:
    """A row of `farthing bench cost`, measured once."""
    row = compare(workload, [lever], machine, 1).rows[0]
    return Reading(row.latency_ms_per_token, row.memory_bytes / 1e6, row.joules_per_token * 1e3)


def main() -> None:
    """Print a table of medians with the spread of the first column."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    machine = Prices.load(None).machine("cpu", cpu_name(), usable_cpus(), None)
    path = resolve_model(given.model)
    repacking = (["-rtr", "0"], ["-rtr", "1"]) if LlamaCpp("", given.llama_bench.parent).repacks else ([],)
    ways = [["-t", str(n), *repack] for n in sorted({1, usable_cpus()}) for repack in repacking]
    with bf16_checkpoint(path) as dense:
        prompts = prompts_for(path, ModelConfig.from_directory(path).vocab_size, 1, PROMPT)
        tiny = str(given.record / "tiny")
        workload = Workload(model=str(dense), prompts=prompts, output_tokens=NEW, tiny=tiny)
        levers = [Lever("Farthing bf16", {})]
        levers += [Lever("Farthing int4, rounded while loading", {"quantization": "int4"})]
        levers += [Lever(f"Farthing {n}", HEAD, str(given.record / n)) for n in ("int8", "int4")]
        last = str(given.record / "adaptive")
        levers += [Lever("Farthing, every lever", HEAD | {"speculate": "mtp+ngram"}, last)]
        found: dict[str, list[Reading]] = {}
        for _ in range(given.rounds):
            for lever in levers:
                found.setdefault(lever.name, []).append(ours(lever, workload, machine))
            for gguf in given.gguf:
                tries = [peer(given.llama_bench, gguf, flags, machine) for flags in ways]
                found.setdefault(gguf.name, []).append(min(tries, key=lambda r: r.ms_per_token))
    print(f"| {given.rounds} rounds | ms/token | least … most | memory, MB | mJ/token |")
    print("|---|---|---|---|---|")
    for name, rows in found.items():
        times = sorted(r.ms_per_token for r in rows)
        memory = statistics.median(r.memory_mb for r in rows)
        energy = statistics.median(r.mj_per_token for r in rows)
        spread = f"{times[0]:.2f} … {times[-1]:.2f}"
        print(f"| {name} | {statistics.median(times):.2f} | {spread} | {memory:.0f} | {energy:.2f} |")


if __name__ == "__main__":
    main()
