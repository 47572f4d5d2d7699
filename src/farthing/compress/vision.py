"""Top-1 accuracy of exported ONNX networks on labelled images, by ONNX Runtime.

Legend: N images of C channels, H x W.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from farthing.compress.module import TopOne, compare_top1

_BATCH = 32


def top1_of_files(a: Path, b: Path, data: Path) -> TopOne:
    """Compare two .onnx files on an .npz of `images` [N, C, H, W] (as the network expects) and `labels` [N].

    Raises ValueError with the file and its missing arrays.
    """
    images, labels = _labelled(data)
    batches = zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    return compare_top1(_session(a), _session(b), batches)


def _labelled(data: Path) -> tuple[Tensor, Tensor]:
    with np.load(data) as arrays:
        missing = {"images", "labels"} - set(arrays)
        if missing:
            raise ValueError(f"{str(data)!r} has no {sorted(missing)}; expected arrays 'images' and 'labels'")
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{str(data)!r} has images {list(images.shape)} and labels {list(labels.shape)}; "
            "expected [N, C, H, W] and [N]"
        )
    return images.float(), labels.long()


def _session(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    taken = session.get_inputs()[0]
    together = 1 if taken.shape[0] == 1 else _BATCH  # 1: the file was exported for single images

    def run(x: Tensor) -> Tensor:
        parts = [session.run(None, {taken.name: part.numpy()})[0] for part in x.split(together)]
        return torch.from_numpy(np.concatenate(parts))

    return run
