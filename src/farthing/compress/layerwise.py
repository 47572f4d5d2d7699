"""What a model makes of a text, with one layer in memory at a time, on the ops that serve it.

A model of any size is judged so in the memory of its largest layer and of the text's hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from farthing.checkpoint.compressed_tensors import MARK
from farthing.checkpoint.reader import Checkpoint
from farthing.compress.calibrate import SimulatedOps
from farthing.compress.evaluate import Baseline, Corpus, cache_for, paged_batches
from farthing.compress.layer import layers_of
from farthing.config import Quantization
from farthing.model import ModelConfig, form_of
from farthing.model.load import config_of, routers_for, source_of
from farthing.ops import Ops
from farthing.ops.select import select


def ops_for(path: Path, backend: str, quantization: Quantization | None = None) -> Ops:
    """The ops of a backend; "simulate": those that round inputs as the checkpoint at `path` specifies;
    "exact": the best that round none."""
    if backend == "simulate":
        return SimulatedOps(path)
    exact = backend == "exact"
    return select("auto" if exact else backend, torch.float32 if exact else None, quantization=quantization)


def has_fitted_values(path: Path) -> bool:
    """Whether other programs read other weights from the files than Farthing does."""
    return "int4_values" in Checkpoint.open(path).config.get(MARK, {})


def spans(config: ModelConfig) -> Iterator[range]:
    """Layers that depend on each other by more than the hidden states: those that reuse an indexer's
    selection follow its layer, and experts that are added a layer later are in one span with all others."""
    layers = config.num_hidden_layers
    apart = [0, *range(1, layers)]
    if any(feed.delayed for feed in config.feeds):
        apart = [0]
    elif config.index_topk is not None:
        apart = [0, *filter(config.has_indexer, range(1, layers))]
    for start, stop in zip(apart, [*apart[1:], layers], strict=True):
        yield range(start, stop)


def baseline(
    path: Path,
    corpus: Corpus,
    backend: str = "auto",
    progress: Callable[[int], None] | None = None,
    quantization: Quantization | None = None,
    exact: bool = True,
) -> Baseline:
    """Hidden states of the model at `path` on a backend, its norm and its head.

    backend: "simulate" is one. progress: called with tokens, the corpus in total. quantization: of dense
    weights while loading. exact: False to read the files as other programs do, which ignore what only
    Farthing writes.
    """
    ops = ops_for(path, backend, quantization)
    checkpoint = Checkpoint.open(path)
    if not exact:
        checkpoint.config.pop(MARK, None)
    whole = config_of(checkpoint)
    routers = routers_for(whole, checkpoint.config, "auto" if exact else "all")
    config = replace(whole, num_nextn_predict_layers=0)
    source = source_of(checkpoint, config)
    steps = list(paged_batches(corpus.windows, config))
    none, form = config.part(range(0)), form_of(config)
    with torch.inference_mode():
        table = form(none, ops, source, [], last=False)
        hidden = [table.embed(ids) for _, ids, _, _ in steps]
        del table
        for span in spans(config):
            ops.forget("")
            model = layers_of(config, ops, source, span, routers[span.start : span.stop])
            cache = None
            for i, (_, _, batch, blocks) in enumerate(steps):
                cache = cache_for(model, blocks, cache)
                hidden[i] = model.run_layers(hidden[i], batch, cache).clone()
            del model, cache
            checkpoint.release()
            if progress:
                done = [corpus.tokens * at // config.num_hidden_layers for at in (span.start, span.stop)]
                progress(done[1] - done[0])
        ops.forget("")
        tail = form(none, ops, source, [], first=False)
        return Baseline([tail.end(h) for h in hidden], tail)
