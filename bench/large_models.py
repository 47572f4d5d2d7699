"""The packed file of a random model that is too large to write in bfloat16 first, and its checkpoint.

    python bench/large_models.py V3S [--cache DIRECTORY]

V3S takes 28 GB in bfloat16 and 8 in 4 bits. The checkpoint has config.json, a tokenizer and what serving
reads besides the packed file: the embedding and vectors. All experts of a layer hold the values of one, in
memory of their own, so a step reads as many bytes as with others. bench/decode.py --no-peers finds both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from farthing.checkpoint.reader import Checkpoint
from farthing.config import Quantization
from farthing.model.load import config_of
from farthing.model.pack import write_parts
from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.formats import Plan
from farthing.ops.cpu.packed import PackedWriter
from farthing.ops.weights import Weight
from packed_layout import packed_file, stamp
from random_model import SIZES, config, tensors, value, write_tokenizer

_EXPERT = re.compile(r"experts\.\d+")


class RandomSource:
    """A `WeightSource` that draws every matrix when it is read."""

    def __init__(self, size: str) -> None:
        self._shapes = dict(tensors(config(size)))
        self._expert: dict[str, Tensor] = {}  # matrices of the first expert of the layer read last

    def has(self, name: str) -> bool:
        """Whether the model has a tensor of this name."""
        return name in self._shapes

    def holds(self, module: str) -> bool:
        """Always true: every expert is local."""
        return True

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Values that depend on the name alone; those of an expert are those of its layer's first."""
        first = _EXPERT.sub("experts.0", name)
        if first in self._expert:
            return self._expert[first]
        seed = int.from_bytes(hashlib.sha256(first.encode()).digest()[:7], "little")
        drawn = value(first, self._shapes[first], torch.Generator().manual_seed(seed))
        if _EXPERT.search(name):
            self._expert = {} if len(self._expert) == 3 else self._expert
            self._expert[first] = drawn
        return drawn

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        """A dense matrix."""
        return Weight("dense", self.tensor(f"{module}.weight", shape))


class OneExpertOps(CpuOps):
    """Packs a layer's first expert, and has the others share it until they are written."""

    def _pack_as(self, target: Plan, name: str, weights: Sequence[Weight], interleave: bool = False) -> Any:
        first = _EXPERT.sub("experts.0", name)
        if first != name and first in self._blobs:
            return self._keep(name, self._blobs[first])
        return super()._pack_as(target, name, weights, interleave)


def write_checkpoint(size: str, out: Path, source: RandomSource) -> None:
    """What serving reads besides the packed file."""
    c = config(size)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(c, indent=1))
    write_tokenizer(out, c["vocab_size"])
    kept = {name: source.tensor(name) for name, shape in tensors(c) if len(shape) == 1 or "embed" in name}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(kept, "model.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def write_packed(out: Path, source: RandomSource, weights: Quantization, threads: int) -> None:
    """The packed file, in the memory of a layer or two."""
    checkpoint = Checkpoint.open(out)
    target = packed_file(out, weights)
    with PackedWriter(target, weights, checkpoint.fingerprint()) as writer:
        for _ in write_parts(writer, config_of(checkpoint), source, lambda: OneExpertOps(threads, weights)):
            pass
        writer.finish()
    stamp(target)


def main() -> None:
    """Parse and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("size", choices=SIZES)
    p.add_argument("--weights", choices=("int4", "int8"), default="int4")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--cache", type=Path, default=Path.home() / ".cache/farthing/bench")
    a = p.parse_args()
    source, out = RandomSource(a.size), a.cache / a.size
    if not (out / "model.safetensors.index.json").exists():
        write_checkpoint(a.size, out, source)
    write_packed(out, source, a.weights, a.threads)


if __name__ == "__main__":
    main()
