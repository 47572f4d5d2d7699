"""The effect of every format on the whole model, part by part.

A part is a layer's attention, its routed experts, its shared expert or its dense MLP. Each option is produced
by the method that would write it (GPTQ for 4 bits), with statistics from one part of the calibration text.
Its damage is the KL divergence of the model's next-token distributions on another part of the text, with only
that part of the model changed.

Legend: T sample tokens; D hidden size; V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.compress.calibrate import Recorder, Wanted
from farthing.compress.evaluate import Corpus, Window
from farthing.compress.export import encode, key_in
from farthing.compress.layer import Layer, Stream, TracedOps
from farthing.compress.recipe import Recipe
from farthing.compress.size import Reads, Sizes, measured_shares, reads_of
from farthing.compress.source import embedded, final_norm
from farthing.compress.transform import compress_layer
from farthing.compress.work import Done, forward
from farthing.files import replace_json
from farthing.model.config import ModelConfig

FORMATS = ("int4-32", "int4-64", "int4-128", "int8")  # in addition to "keep"; INT4 by group size
SAMPLE = 2048  # tokens to measure a sensitivity on


@dataclass(frozen=True, slots=True)
class Option:
    """A storage format for one part."""

    part: str
    format: str
    sizes: Sizes  # of its matrices
    kl: float  # nats a token


def part_of(module: str) -> str:
    """The part a module belongs to; an MTP layer's eh_proj is its own."""
    pieces = module.split(".")
    if len(pieces) < 5:
        return module
    layer = ".".join(pieces[:3])
    if pieces[3] in ("self_attn", "linear_attn"):
        return f"{layer}.{pieces[3]}"
    return f"{layer}.mlp.{pieces[4]}" if pieces[4] in ("experts", "shared_experts") else f"{layer}.mlp"


class LayerwiseModel:
    """The source in memory, run layer by layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = ModelConfig.from_json(checkpoint.config)
        self.layers = [Layer.read(checkpoint, self.config, i) for i in range(self.config.num_hidden_layers)]
        self.embedding = checkpoint.tensor("model.embed_tokens.weight")
        self.final_norm = final_norm(checkpoint, self.config)
        tied = self.config.tie_word_embeddings
        self.head = self.embedding.float() if tied else checkpoint.weight("lm_head").dequantize()

    def stream(self, windows: list[Window]) -> Stream:
        """Embedded tokens, the input of the first layer."""
        ids = torch.cat([w.ids[:-1] for w in windows])
        hidden = embedded(self.config, self.embedding, ids)
        return Stream(hidden, torch.cat([w.ids[1:] for w in windows]), [w.tokens for w in windows])

    def through(self, layer: Layer, stream: Stream, ops: TracedOps | None = None) -> Tensor:
        """Hidden states after `layer`, [T, D]."""
        return forward(layer, ops or TracedOps(), stream, self.embedding, self.final_norm)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[t, D] after the last layer -> [t, V]."""
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.final_norm, self.config.rms_norm_eps)
        return (F.linear(normed, self.head) * self.config.logit_scale).log_softmax(-1)


class Meter:
    """KL between the model and the model with some matrices of one layer replaced."""

    def __init__(self, model: LayerwiseModel, windows: list[Window]) -> None:
        self._model = model
        self._before = model.stream(windows)  # input of the current layer
        self._base = self._rest(0, model.layers[0], self._before)

    def kl(self, index: int, changed: Mapping[str, Tensor]) -> float:
        """Mean KL(base || changed) in nats per token; `index` must be the current layer."""
        layer = self._model.layers[index]
        other = self._rest(index, replace(layer, tensors={**layer.tensors, **changed}), self._before)
        total = 0.0
        for a, b in zip(self._base.split(512), other.split(512), strict=True):
            p, q = self._model.log_probs(a), self._model.log_probs(b)
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        return max(total / len(other), 0.0)

    def advance(self, index: int) -> None:
        """Move on from layer `index` to the next one."""
        self._before.hidden = self._model.through(self._model.layers[index], self._before)

    def _rest(self, index: int, layer: Layer, stream: Stream) -> Tensor:
        """Hidden states after the last layer."""
        for following in (layer, *self._model.layers[index + 1 :]):
            stream = replace(stream, hidden=self._model.through(following, stream))
        return stream.hidden


def measure(
    checkpoint: Checkpoint,
    recipe: Recipe,
    corpus: Corpus,
    progress: Callable[[str, int, int], None] | None = None,
    notes: Notes | None = None,
) -> list[Option]:
    """Measure every option of every part, with the model in memory. notes: results kept between runs."""
    model = LayerwiseModel(checkpoint)
    fit_windows, judge_windows = split(corpus)
    meter, fit = Meter(model, judge_windows), model.stream(fit_windows)
    options: list[Option] = []
    for index, layer in enumerate(model.layers):
        if progress:
            progress(f"sensitivity of layer {index}", index, len(model.layers))
        measured = notes.read(index) if notes else None
        recorder = None if measured else Recorder(Wanted(gram=True))
        after = model.through(layer, fit, recorder)
        if recorder is not None:
            measured = _layer_options(model, meter, layer, recorder, recipe, len(fit.hidden))
            if notes:
                notes.add(index, measured)
        options += measured or []
        fit.hidden = after
        meter.advance(index)
    return options


@dataclass(frozen=True, slots=True)
class Notes:
    """A file of the options of the layers measured so far, so that a killed run resumes."""

    file: Path
    fingerprint: str

    def read(self, layer: int) -> list[Option] | None:
        """Options of `layer` from an earlier run of the same job, or None."""
        entry = self._all().get(str(layer))
        return None if entry is None else [Option(**o | {"sizes": Sizes(**o["sizes"])}) for o in entry]

    def add(self, layer: int, options: list[Option]) -> None:
        """Store a layer's options."""
        layers = self._all() | {str(layer): [asdict(o) for o in options]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_json(self.file, {"fingerprint": self.fingerprint, "layers": layers}, indent=None)

    def _all(self) -> dict[str, Any]:
        if not self.file.is_file():
            return {}
        content = json.loads(self.file.read_text(encoding="utf-8"))
        layers: dict[str, Any] = content["layers"] if content["fingerprint"] == self.fingerprint else {}
        return layers


def split(corpus: Corpus) -> tuple[list[Window], list[Window]]:
    """(windows to fit on, windows to evaluate on): about SAMPLE tokens from the end."""
    count, tokens = 0, 0
    while count < len(corpus.windows) // 2 and tokens < SAMPLE:
        count += 1
        tokens += corpus.windows[-count].tokens
    cut = len(corpus.windows) - max(count, 1)
    return corpus.windows[:cut] or corpus.windows, corpus.windows[cut:]


def _layer_options(
    model: LayerwiseModel, meter: Meter, layer: Layer, recorder: Recorder, recipe: Recipe, tokens: int
) -> list[Option]:
    seen = recorder.experts.get(f"{layer.prefix}mlp")
    routed = {} if seen is None else {layer.index: measured_shares(seen.tolist(), tokens)}
    trial = _Trial(meter, recorder, recipe, reads_of(model.config, routed))
    options = list(trial.kept(layer))
    for kind in FORMATS:
        options += trial.rounded(layer, kind, options)
    return options


@dataclass(frozen=True, slots=True)
class _Trial:
    """Produces and measures the options of one layer."""

    meter: Meter
    recorder: Recorder
    recipe: Recipe
    reads: Reads

    def kept(self, layer: Layer) -> Iterator[Option]:
        """The format of the source."""
        copy = replace(layer, tensors=dict(layer.tensors))
        done = compress_layer(copy, None, self.recipe, lambda module: "keep").modules
        for part, modules in parts(list(done)).items():
            yield Option(part, "keep", self._sizes(done, modules), 0.0)

    def rounded(self, layer: Layer, kind: str, known: Sequence[Option]) -> list[Option]:
        """Every part in one format, except where the result equals a known option."""
        copy = replace(layer, tensors=dict(layer.tensors))
        done = compress_layer(copy, self.recorder, self.recipe, lambda module: kind).modules
        options = []
        for part, modules in parts(list(done)).items():
            sizes = self._sizes(done, modules)
            # If a group size divides no matrix of the part, a smaller one was used.
            twins = (o for o in known if (o.part, o.sizes) == (part, sizes))
            if kind.startswith("int4") and any(o.format.startswith("int4") for o in twins):
                continue
            kl = self.meter.kl(layer.index, {f"{m}.weight": done[m].weight.dequantize() for m in modules})
            options.append(Option(part, kind, sizes, kl))
        return options

    def _sizes(self, done: Mapping[str, Done], modules: list[str]) -> Sizes:
        """Of the files, which the kernels' layout equals: nothing is pruned here."""
        file, token = 0, 0.0
        for m in modules:
            key = key_in("compressed-tensors", m, done[m].key)
            stored = encode("compressed-tensors", m, done[m].weight, key)
            bytes_ = sum(t.nbytes for t in stored.values())
            file += bytes_
            token += bytes_ * self.reads(m)
        return Sizes(file, file, round(token))


def parts(modules: list[str]) -> dict[str, list[str]]:
    """Modules by part."""
    grouped: dict[str, list[str]] = {}
    for module in modules:
        grouped.setdefault(part_of(module), []).append(module)
    return grouped
