"""Labelled pictures: DIR/train/CLASS/*.jpg|png and DIR/test/CLASS/*, decoded once to one uint8 array.

The public JPEG copy of CIFAR-10 has this layout. Batches are cropped, flipped and resized when drawn.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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


def load(root: Path, part: str, stored: int, cache: Path, limit: int | None = None) -> Pictures:
    """Load the pictures of DIR/part at stored x stored, at most `limit` per class.

    Raises FileNotFoundError if there are none.
    """
    folder = root / part
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir())) if folder.is_dir() else ()
    if not classes:
        raise FileNotFoundError(f"{folder} has no class folders; expected {part}/CLASS/*.jpg under --data")
    file = cache / f"{part}-{stored}-{limit or 'all'}.npz"
    if not file.is_file():
        images, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)[:limit]
            for path in found:
                with Image.open(path) as picture:
                    rgb = picture.convert("RGB")
                    if rgb.size != (stored, stored):
                        rgb = rgb.resize((stored, stored), Image.Resampling.BILINEAR)
                images.append(np.asarray(rgb).transpose(2, 0, 1))
                labels.append(label)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, images=np.stack(images), labels=np.array(labels))
    content = np.load(file)
    return Pictures(torch.from_numpy(content["images"]), torch.from_numpy(content["labels"]), classes)


def normalize(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 [B, 3, size, size], normalized per channel, channels last."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = (images.float() / 255 - mean) / std
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)


class Batches:
    """Endless shuffled batches with a random flip and shift per picture; the position is two integers."""

    def __init__(self, pictures: Pictures, batch: int, seed: int, share: float = 0.125) -> None:
        self.pictures, self.batch, self.seed = pictures, batch, seed
        self.shift = round(share * pictures.images.shape[-1])
        self.passes, self.index = 0, 0

    def next(self) -> tuple[Tensor, Tensor]:
        """(uint8 images [B, 3, S, S], labels [B])."""
        count, side = len(self.pictures.labels), self.pictures.images.shape[-1]
        if self.index + self.batch > count:
            self.passes, self.index = self.passes + 1, 0
        order = np.random.default_rng([self.seed, self.passes]).permutation(count)
        chosen = torch.from_numpy(order[self.index : self.index + self.batch])
        moves = np.random.default_rng([self.seed, self.passes, self.index])
        self.index += self.batch
        padded = F.pad(self.pictures.images[chosen].float(), (self.shift,) * 4, mode="reflect").to(
            torch.uint8
        )
        windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # [B, 3, 2 shift + 1, 2 shift + 1, S, S]
        dy, dx = torch.from_numpy(moves.integers(0, 2 * self.shift + 1, (2, len(chosen))))
        images = windows[torch.arange(len(chosen)), :, dy, dx]
        flip = torch.from_numpy(moves.random(len(images)) < 0.5)
        return torch.where(flip[:, None, None, None], images.flip(3), images), self.pictures.labels[chosen]

    def state_dict(self) -> dict[str, int]:
        """Position of the next batch."""
        return {"passes": self.passes, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position of `state_dict`."""
        self.passes, self.index = state["passes"], state["index"]
