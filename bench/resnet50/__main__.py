"""ResNet-50, 4-bit and 40 % block-sparse, against the float net and other runtimes.

python -m bench.resnet50 train --data CIFAR-10-images --out runs/resnet50   # float, then quantized
python -m bench.resnet50 compare --out runs/resnet50 --size 224 --threads 1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from bench.resnet50.compare import contestants, race
from bench.resnet50.model import ResNet50
from bench.resnet50.train import Settings, quantized, train
from rich.console import Console

from farthing.compress.statistics import ratio_interval
from farthing.train.lsq import ActivationQuantizer


def run_training(settings: Settings, console: Console) -> None:
    """Both runs; a finished one is not repeated."""
    first = dataclasses.replace(settings, out=settings.out / "float")
    second = dataclasses.replace(settings, out=settings.out / "w4a4", epochs=settings.epochs / 2)
    if not (first.out / "net.pt").is_file() and train(first, None, _begun(first), console) is None:
        raise SystemExit("interrupted; the same command continues")
    state = torch.load(first.out / "net.pt", weights_only=True)
    teacher = ResNet50(len(state["fc.bias"]))
    teacher.load_state_dict(state)
    if not (second.out / "net.pt").is_file() and train(second, teacher, _begun(second), console) is None:
        raise SystemExit("interrupted; the same command continues")
    print(json.dumps(accuracy(settings.out), indent=1))


def _begun(settings: Settings) -> bool:
    return (settings.out / "state.pt").is_file()


def accuracy(out: Path) -> dict[str, float | list[float]]:
    """Top-1 of both nets and the paired 95 % interval of the drop, in points."""
    a, b = (torch.load(out / part / "right.pt", weights_only=True).float() for part in ("float", "w4a4"))
    drop = (a - b).double()
    interval = ratio_interval(drop.tolist(), [1] * len(drop), 0.95)
    return {
        "top1_float": float(a.mean()) * 100,
        "top1_w4a4": float(b.mean()) * 100,
        "drop_points": float(drop.mean()) * 100,
        "interval": [interval.low * 100, interval.high * 100],
        "pictures": len(drop),
    }


def run_compare(out: Path, size: int, threads: int, rounds: int) -> None:
    """The table; the nets of `out`, or random ones (latency does not depend on the weights' values)."""
    torch.manual_seed(0)
    net = ResNet50().eval()
    file = out / "float" / "net.pt"
    if file.is_file():
        state = torch.load(file, weights_only=True)
        net = ResNet50(len(state["fc.bias"])).eval()
        net.load_state_dict(state)
    student = quantized(net, size)
    file = out / "w4a4" / "net.pt"
    if not file.is_file():
        raise SystemExit(f"{file} does not exist; run `train` first")
    student.load_state_dict(torch.load(file, weights_only=True))
    for module in student.modules():
        if isinstance(module, ActivationQuantizer):
            module.started = True
    runs, missing = contestants(net, student.eval(), size, threads, out)
    for name, ms in sorted(race(runs, size, rounds).items(), key=lambda item: item[1]):
        print(f"{name:>28}  {ms:8.2f} ms")
    for name in missing:
        print(f"{name:>28}  not installed")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("--data", type=Path, required=True)
    for field, kind in (("size", int), ("epochs", float), ("batch", int), ("lr", float), ("seed", int)):
        one.add_argument(f"--{field}", type=kind, default=getattr(Settings, field))
    one.add_argument("--limit", type=int, help="pictures a class")
    one.add_argument("--sparsity", type=float, default=Settings.sparsity)
    one.add_argument("--device", default="cpu")
    two = commands.add_parser("compare")
    two.add_argument("--size", type=int, default=224)
    two.add_argument("--rounds", type=int, default=20)
    for command in (one, two):
        command.add_argument("--out", type=Path, default=Path("runs/resnet50"))
        command.add_argument("--threads", type=int, default=1)
    args = vars(parser.parse_args())
    if args.pop("command") == "train":
        run_training(Settings(**args), Console(stderr=True))
    else:
        run_compare(args["out"], args["size"], args["threads"], args["rounds"])


if __name__ == "__main__":
    main()
