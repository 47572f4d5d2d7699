"""INT8 with calibrated input ranges in the serving kernels: one row per method of finding the range.

usage: python bench/activations.py [--model mite] [--tokens 16384] [--work DIR] [--json]
All rows share weights, smoothing, rotation and calibration text; only the ranges differ. The serving kernels
measure perplexity on held-out text, with a paired 95 % interval against the original model.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from farthing.compress.api import held_out_sample, load_for
from farthing.compress.evaluate import calibration_corpus, compare_with, load_corpus, remember
from farthing.compress.recipe import Recipe
from farthing.compress.stream import Compression, run
from farthing.files import to_json
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing_lab.compress.recipe import RECIPES

BASE = RECIPES["int8-kl"]


def recipes() -> dict[str, Recipe]:
    """The rows: dynamic rounding, each observer alone, and the observer with the least measured error."""
    rows = {"dynamic": replace(BASE, activations="token")}
    for observer in ("minmax", "percentile", "mse", "kl"):
        rows[f"static {observer}"] = replace(BASE, observer=observer)  # type: ignore[arg-type]
    return rows | {"static measured": BASE, "static or dynamic": replace(BASE, activations="best")}


def measure(model: str, tokens: int, work: Path, backend: str) -> list[dict[str, Any]]:
    """One row per recipe."""
    source = resolve_model(model)
    config = ModelConfig.from_directory(source)
    held_out = load_corpus(held_out_sample(), source, config, 1024, tokens)
    calibration = calibration_corpus(source, config, held_out_sample(), BASE.calibration_tokens, BASE.window)
    before = load_for(source, backend)
    baseline = remember(before, held_out)
    rows = []
    for name, recipe in recipes().items():
        out = work / name.replace(" ", "-")
        run(Compression(source, out, recipe, calibration))
        found = compare_with(baseline, remember(load_for(out, backend), held_out), held_out)
        rows.append({"inputs": name, "backend": before.ops.name, **found.to_json()})
        print(to_json(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="mite")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--work", type=Path, help="directory for the compressed models")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with TemporaryDirectory() as temporary:
        rows = measure(given.model, given.tokens, given.work or Path(temporary), given.backend)
    if given.json:
        print(to_json(rows))
        return
    print("| inputs | perplexity | 95 % interval | KL, nats | same token |\n|---|---|---|---|---|")
    for row in rows:
        low, high = row["interval"]
        print(
            f"| {row['inputs']} | {row['relative_increase']:+.2%} | {low:+.2%} … {high:+.2%} "
            f"| {row['kl']:.4f} | {row['greedy_agreement']:.1%} |"
        )


if __name__ == "__main__":
    main()
