"""Labelled pictures: DIR/train/CLASS/*.jpg|png and DIR/test/CLASS/*, as uint8 tensors at one size.

The public JPEG copy of CIFAR-10 has this layout. Decoded pictures are cached beside the run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png")
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10


@dataclasses.dataclass(frozen=True)
class Pictures:
    """images uint8 [N, 3, S, S], labels int64 [N]."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def load(root: Path, part: str, size: int, cache: Path, limit: int | None = None) -> Pictures:
    """The pictures of DIR/part, resized; `limit` a class. Raises FileNotFoundError where there are none."""
    folder = root / part
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir())) if folder.is_dir() else ()
    if not classes:
        raise FileNotFoundError(f"{folder} holds no class folders; expected {part}/CLASS/*.jpg under --data")
    file = cache / f"{part}-{size}-{limit or 'all'}.npz"
    if not file.is_file():
        images, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)[:limit]
            for path in found:
                with Image.open(path) as picture:
                    square = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
                images.append(np.asarray(square).transpose(2, 0, 1))
                labels.append(label)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, images=np.stack(images), labels=np.array(labels))
    stored = np.load(file)
    return Pictures(torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]), classes)


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float32, zero mean and unit variance a channel."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


class Batches:
    """Endless shuffled batches, flipped and shifted; its place is two integers."""

    def __init__(self, pictures: Pictures, size: int, seed: int, shift: int = 6) -> None:
        self.pictures, self.size, self.seed, self.shift = pictures, size, seed, shift
        self.passes, self.index = 0, 0

    def next(self) -> tuple[Tensor, Tensor]:
        """(normalized images [B, 3, S, S], labels [B])."""
        count = len(self.pictures.labels)
        if self.index + self.size > count:
            self.passes, self.index = self.passes + 1, 0
        rng = np.random.default_rng([self.seed, self.passes])
        chosen = torch.from_numpy(rng.permutation(count)[self.index : self.index + self.size])
        moves = np.random.default_rng([self.seed, self.passes, self.index])
        self.index += self.size
        images = self.pictures.images[chosen]
        dx, dy = moves.integers(-self.shift, self.shift + 1, 2)
        images = torch.roll(images, (int(dy), int(dx)), (2, 3))
        flip = torch.from_numpy(moves.random(len(images)) < 0.5)
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        return normalize(images), self.pictures.labels[chosen]

    def state_dict(self) -> dict[str, int]:
        """Where the next batch starts."""
        return {"passes": self.passes, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues there."""
        self.passes, self.index = state["passes"], state["index"]
