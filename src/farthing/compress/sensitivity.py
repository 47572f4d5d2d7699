"""What every format and every share of zero blocks does to the whole model, part by part.

A part is a layer's attention, its routed experts, its shared expert or its dense MLP. Each option is made by
the method that would write it (GPTQ for 4 bits; optimal brain surgery and a short healing for zero blocks),
with statistics of one part of the calibration text. Its damage is the KL divergence of the model's next-token
distributions with only that part changed, on another part of the text.

Legend: T sample tokens; D hidden size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.compress.calibrate.recorder import Recorder, Wanted
from farthing.compress.corpus import Corpus, Window
from farthing.compress.layer import Layer, Stream
from farthing.compress.prune.heal import heal
from farthing.compress.pruning import prune_layer
from farthing.compress.recipe import Prune, Recipe
from farthing.compress.stream import Progress, feed_forward_input, forward
from farthing.compress.trace import TracedOps
from farthing.compress.transform import Done, compress_layer, layer_stats
from farthing.model import ModelConfig
from farthing.ops.weights import Weight

FORMATS = ("int4", "int8")  # beside "keep"
SAMPLE = 2048  # tokens a sensitivity is measured on
HEAL_STEPS = 30  # a quarter of what the written model gets: an upper bound of the damage
BLOCK = 16
SPARSE_FROM = 0.2  # share of zero blocks from which the kernels leave them out
MOST_WORK = 2e12  # operations of brain surgery a layer; about ten seconds


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store one part."""

    part: str
    format: str
    bytes: int  # of the matrices, as the kernels hold them
    kl: float  # nats a token
    sparsity: float = 0.0  # share of 16x16 blocks that are zero

    @property
    def name(self) -> str:
        """For the report."""
        return f"{self.format}, {self.sparsity:.0%} of blocks zero" if self.sparsity else self.format


def part_of(module: str) -> str:
    """The part a module belongs to."""
    pieces = module.split(".")
    layer = ".".join(pieces[:3])
    if "self_attn" in pieces:
        return f"{layer}.self_attn"
    return f"{layer}.mlp.{pieces[4]}" if pieces[4] in ("experts", "shared_experts") else f"{layer}.mlp"


class Model:
    """The source in memory, run layer by layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = ModelConfig.from_json(checkpoint.config)
        self.layers = [Layer.read(checkpoint, self.config, i) for i in range(self.config.num_hidden_layers)]
        self.embedding = checkpoint.tensor("model.embed_tokens.weight")
        self.final_norm = checkpoint.tensor("model.norm.weight").float()
        tied = self.config.tie_word_embeddings
        self.head = self.embedding.float() if tied else checkpoint.weight("lm_head").dequantize()

    def stream(self, windows: list[Window]) -> Stream:
        """Embedded tokens in front of the first layer."""
        ids = torch.cat([w.ids[:-1] for w in windows])
        hidden = torch.nn.functional.embedding(ids, self.embedding).float()
        return Stream(hidden, torch.cat([w.ids[1:] for w in windows]), [w.tokens for w in windows])

    def through(self, layer: Layer, stream: Stream, ops: TracedOps | None = None) -> Tensor:
        """Hidden states behind `layer`, [T, D]."""
        return forward(layer, ops or TracedOps(), stream, self.embedding, self.final_norm)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[t, D] behind the last layer -> [t, V]."""
        normed = TracedOps().rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)
        return torch.nn.functional.linear(normed, self.head).log_softmax(-1)


class Meter:
    """KL of the model with some matrices of one layer replaced against the model as it is."""

    def __init__(self, model: Model, windows: list[Window]) -> None:
        self._model = model
        self._before = model.stream(windows)  # in front of the layer in turn
        self._base = self._rest(0, model.layers[0], self._before)

    def kl(self, index: int, changed: Mapping[str, Tensor]) -> float:
        """Mean KL(base || changed) in nats a token; `index` is the layer in turn."""
        layer = self._model.layers[index]
        other = self._rest(index, replace(layer, tensors={**layer.tensors, **changed}), self._before)
        total = 0.0
        for a, b in zip(self._base.split(512), other.split(512), strict=True):
            p, q = self._model.log_probs(a), self._model.log_probs(b)
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        return max(total / len(other), 0.0)

    def advance(self, index: int) -> None:
        """Layer `index` is done; the next one's turn."""
        self._before.hidden = self._model.through(self._model.layers[index], self._before)

    def _rest(self, index: int, layer: Layer, stream: Stream) -> Tensor:
        """Hidden states behind the last layer."""
        for following in (layer, *self._model.layers[index + 1 :]):
            stream = replace(stream, hidden=self._model.through(following, stream))
        return stream.hidden


def measure(
    checkpoint: Checkpoint, recipe: Recipe, corpus: Corpus, progress: Progress | None = None
) -> list[Option]:
    """Every option of every part. Holds the model in memory."""
    model = Model(checkpoint)
    fit_windows, judge_windows = split(corpus)
    meter, fit = Meter(model, judge_windows), model.stream(fit_windows)
    options: list[Option] = []
    for index, layer in enumerate(model.layers):
        if progress:
            progress(f"sensitivity of layer {index}", index, len(model.layers))
        recorder = Recorder(Wanted(gram=True))
        after = model.through(layer, fit, recorder)
        options += _kept(layer, recipe)
        for sparsity, variant, masks in _variants(model, layer, recorder, recipe, fit, after):
            for kind in FORMATS:
                options += _options(meter, variant, recorder, recipe, kind, masks, sparsity)
        fit.hidden = after
        meter.advance(index)
    return options


def split(corpus: Corpus) -> tuple[list[Window], list[Window]]:
    """Windows to fit by and, from the end, about SAMPLE tokens to judge by (at most half of the windows)."""
    count, tokens = 0, 0
    while count < len(corpus.windows) // 2 and tokens < SAMPLE:
        count += 1
        tokens += corpus.windows[-count].tokens
    cut = len(corpus.windows) - max(count, 1)
    return corpus.windows[:cut] or corpus.windows, corpus.windows[cut:]


def _variants(
    model: Model, layer: Layer, recorder: Recorder, recipe: Recipe, fit: Stream, after: Tensor
) -> Iterator[tuple[float, Layer, dict[str, Tensor]]]:
    """(share of zero blocks, the layer with them, masks), from none on."""
    yield 0.0, layer, {}
    if not prunable(layer):
        return
    x = feed_forward_input(layer, fit, model.embedding, model.final_norm)
    for sparsity in recipe.sparsities:
        variant = replace(layer, tensors=dict(layer.tensors))
        cut = replace(recipe, prune=Prune("16x16", sparsity))
        masks = prune_layer(variant, layer_stats(variant, recorder)[0], cut)
        heal(variant, masks, x, after, HEAL_STEPS)
        yield sparsity, variant, masks


def prunable(layer: Layer) -> bool:
    """Whether 16x16 blocks tile the feed-forwards and brain surgery on them takes bearable time."""
    shapes = [layer.weight(m).shape for m in layer.modules() if ".mlp." in m]
    work = sum(n / BLOCK * k**3 for n, k in shapes)
    return all(n % BLOCK == 0 and k % BLOCK == 0 for n, k in shapes) and work <= MOST_WORK


def _options(
    meter: Meter,
    variant: Layer,
    recorder: Recorder,
    recipe: Recipe,
    kind: str,
    masks: dict[str, Tensor],
    sparsity: float,
) -> Iterator[Option]:
    rounded = replace(variant, tensors=dict(variant.tensors))
    done = compress_layer(rounded, recorder, recipe, lambda module: kind, masks).modules
    for part, modules in parts(list(done)).items():
        if sparsity and not all(m in masks for m in modules):
            continue
        size = sum(served_bytes(done[m].weight, masks.get(m)) for m in modules)
        kl = meter.kl(variant.index, {f"{m}.weight": done[m].weight.dequantize() for m in modules})
        yield Option(part, kind, size, kl, sparsity)


def _kept(layer: Layer, recipe: Recipe) -> Iterator[Option]:
    """As the source has it."""
    copy = replace(layer, tensors=dict(layer.tensors))
    done: dict[str, Done] = compress_layer(copy, None, recipe, lambda module: "keep").modules
    for part, modules in parts(list(done)).items():
        yield Option(part, "keep", sum(done[m].weight.nbytes for m in modules), 0.0)


def parts(modules: list[str]) -> dict[str, list[str]]:
    """Modules by part."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(part_of(module), []).append(module)
    return found


def served_bytes(weight: Weight, mask: Tensor | None) -> int:
    """What the kernels hold: zero blocks are left out where they are enough, at one bit a block."""
    if mask is None:
        return weight.nbytes
    blocks = mask[::BLOCK, ::BLOCK]
    share = 1 - float(blocks.float().mean())
    if share < SPARSE_FROM:
        return weight.nbytes
    return weight.nbytes - round(weight.data.nbytes * share) + blocks.numel() // 8
