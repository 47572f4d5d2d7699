"""The speed that removing neurons gains while decoding, from sizes alone.

Copies of a model that keep the first neurons of every MLP are timed in turn with the whole model. Quality is
not judged: the neurons are not chosen.

  python bench/prune_sizes.py mite --out runs/sizes --cuts 0.25 0.5 --quantization int4
  python bench/prune_sizes.py build/bench/L576 --out runs/sizes --cuts 0.28
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from farthing.checkpoint.reader import Checkpoint
from farthing.checkpoint.writer import CheckpointWriter
from farthing.hub import resolve_model
from farthing.model.load import load
from farthing.model.pack import pack_checkpoint
from farthing.ops.select import select
from training import decode, rounds, show

WIDTHS = ("intermediate_size", "moe_intermediate_size")


def kept(width: int, cut: float, multiple: int) -> int:
    """Neurons left of `width`, the nearest multiple that is not 0."""
    return max(1, round(width * (1 - cut) / multiple)) * multiple


def shrink(model: Path, out: Path, cut: float, multiple: int) -> Path:
    """Write `model` in bfloat16 with the first neurons of every MLP; an existing copy is reused."""
    if (out / "config.json").is_file():
        return out
    checkpoint, writer = Checkpoint.open(model), CheckpointWriter(out)
    for name in sorted(checkpoint.names()):
        module, _, kind = name.rpartition(".")
        if kind == "weight_scale_inv":
            continue
        if kind != "weight" or (not module.endswith("_proj") and "kv_a_proj" not in module):
            writer.add(name, checkpoint.tensor(name))
            continue
        w = checkpoint.weight(module).dequantize().bfloat16()
        if module.endswith(("gate_proj", "up_proj")):
            w = w[: kept(len(w), cut, multiple)]
        elif module.endswith("down_proj"):
            w = w[:, : kept(w.shape[1], cut, multiple)]
        writer.add(name, w.clone())
        checkpoint.release()
    config = dict(checkpoint.config) | {key: kept(checkpoint.config[key], cut, multiple) for key in WIDTHS}
    config.pop("quantization_config", None)
    writer.close(config, copy_from=model)
    return out


def measure(
    models: dict[str, Path], quantization: Any, threads: int, batches: list[int], count: int
) -> list[dict[str, Any]]:
    """Microseconds of a step by batch size, and the median ratio to the first model with its quartiles."""
    loaded = {}
    for name, path in models.items():
        file = path.with_name(f"{path.name}-{quantization or 'bf16'}.packed")
        if not file.is_file():
            pack_checkpoint(path, file, quantization, threads)
        loaded[name] = load(path, select("cpu", threads=threads, quantization=quantization, packed=str(file)))
    rows: list[dict[str, Any]] = [{"model": name} for name in models]
    for batch in batches:
        times = rounds(loaded, decode(batch), count)
        first = next(iter(times.values()))
        for row, own in zip(rows, times.values(), strict=True):
            low, middle, high = statistics.quantiles([a / b for a, b in zip(first, own, strict=True)])
            row[f"batch {batch}, us"] = statistics.median(own) * 1e6
            row[f"batch {batch}, x"] = f"{middle:.3f} ({low:.3f}-{high:.3f})"
    return rows


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="for the copies and their packed files")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.28], help="shares of neurons to remove")
    parser.add_argument("--multiple", type=int, default=32, help="of which sizes are multiples")
    parser.add_argument("--quantization", choices=["int8", "int4"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--prepare", action="store_true", help="only write and pack the copies")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = resolve_model(args.model)
    models = {}
    for cut in (0.0, *args.cuts):
        label = f"{source.name}-{cut:.0%}-{args.multiple}"
        models[label] = shrink(source, args.out / label, cut, args.multiple)
    batches = [] if args.prepare else args.batches
    show(measure(models, args.quantization, args.threads, batches, args.rounds))


if __name__ == "__main__":
    main()
