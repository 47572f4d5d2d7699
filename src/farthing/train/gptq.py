"""GPTQ of a training model: the rounding that needs no training, as a baseline and as a starting point.

Layer by layer, the weights of every projection are rounded column by column so that the remaining columns
compensate (`compress/quantize/sweep.py`). Their inputs come from the layers rounded so far and are themselves
rounded. Drafting layers are rounded to nearest: nothing that they read is scored.

Shapes: B matrices, R rows, J columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from farthing.compress.quantize.grid import int4_grid
from farthing.compress.quantize.sweep import Feedback, sweep
from farthing.train.functional import spans
from farthing.train.grouped import Routing, dispatch
from farthing.train.lsq import Precision, QuantizedProduct, Tap
from farthing.train.qat_model import QatModel

PART = 4  # windows per forward pass


@torch.no_grad()
def round_by_gptq(student: QatModel, tokens: Tensor, precision: Precision) -> None:
    """Round `student` to 4-bit weights from statistics on tokens [N, T]. Its weights move onto the grid.

    Raises ValueError for other weights, which no range search here covers.
    """
    if precision.weights != 4:
        raise ValueError(f"precision: got {precision}; expected 4-bit weights")
    net, training = student.net, student.training
    student.train(False)
    turn = net.turn[: tokens.shape[1]]
    hidden = nn.functional.embedding(tokens, net.embed_tokens)
    for i, layer in enumerate(net.layers):
        prefix = f"layers.{i}."
        student.start(dataclasses.replace(precision, weights=16), prefix)
        weights = {name: w for name, w in student.weights().items() if name.startswith(prefix)}
        with _second_moments(student, weights) as grams:
            for part in hidden.split(PART):
                layer(part, turn)
        for name, w in weights.items():
            _round(student.product_of(name), w, grams[name])
        hidden = torch.cat([layer(part, turn) for part in hidden.split(PART)])
    student.start(precision)
    student.train(training)


def _round(product: QuantizedProduct, w: Tensor, gram: Tensor) -> None:
    """Move w [B, R, J] onto the grid of least expected error, and set the product's scales to that grid."""
    quantizer = product.weight_quantizer
    own, gram = quantizer.pruned(w).float().cpu(), gram.cpu()
    keep = None if quantizer.keep is None else quantizer.pruned(torch.ones_like(w)).bool().cpu()
    grid = int4_grid(own, quantizer.group, gram.diagonal(dim1=1, dim2=2))
    w.copy_(sweep(own, Feedback.of(gram), grid, keep)[0])
    quantizer.bits = 4
    quantizer.log_scale.copy_(grid.scale[..., None].log())


@contextmanager
def _second_moments(student: QatModel, weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Inside the context, every product adds x^T x of its rounded inputs to the yielded grams [B, J, J]."""
    found = {name: w.new_zeros(len(w), w.shape[2], w.shape[2]) for name, w in weights.items()}
    for name, gram in found.items():
        student.product_of(name).tap = _adder(gram)
    try:
        yield found
    finally:
        for name in found:
            student.product_of(name).tap = None


def _adder(gram: Tensor) -> Tap:
    def add(x: Tensor, sizes: list[int], routing: Routing | None) -> None:
        rows = (x if routing is None else dispatch(x, routing)).float()
        for e, s in spans(sizes):
            gram[e].addmm_(rows[s].T, rows[s])

    return add
