"""What every format costs in every part of the model, with one layer in memory at a time.

A part is one matrix, the gate and the up-projection of an MLP, or all routed experts of a layer, which other
programs want in one format. Each option is produced by the method that would write it (GPTQ for 4 bits), with
statistics from one part of the calibration text. On another part of the text its error is that of the layer's
output. One option per layer, every part in PROBE, also passes through the later layers: the KL divergence of
the next-token distributions that it causes, divided by its error, converts the errors of all options of that
layer to nats.

Legend: T sample tokens; D hidden size; V vocabulary; S states, the model's and those with one layer in PROBE.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from farthing.checkpoint import Checkpoint
from farthing.compress.calibrate import Recorder, Wanted
from farthing.compress.evaluate import Corpus, Window
from farthing.compress.export import encode, key_in
from farthing.compress.layer import Layer, Stream, TracedOps, bfloat16_products
from farthing.compress.recipe import Recipe
from farthing.compress.size import Reads, Sizes, measured_shares, reads_of
from farthing.compress.source import embedded, final_norm
from farthing.compress.transform import compress_layer
from farthing.compress.work import Done, forward
from farthing.files import replace_json, replace_tensors
from farthing.model.config import ModelConfig

FORMATS = ("int4-32", "int4-64", "int4-128", "int5-64", "int8")  # in addition to "keep"; by group size
PROBE = "int4-64"  # of a whole layer, passed through the later ones
SAMPLE = 2048  # tokens to measure a sensitivity on


@dataclass(frozen=True, slots=True)
class Option:
    """A storage format for one part."""

    part: str
    format: str
    sizes: Sizes  # of its matrices
    kl: float  # nats a token


def part_of(module: str) -> str:
    """The part a module belongs to."""
    layer, experts, _ = module.partition(".mlp.experts.")
    if experts:
        return f"{layer}.mlp.experts"
    parent, up, _ = module.rpartition(".up_proj")
    return f"{parent}.gate_proj" if up else module


class Judge:
    """Hidden states of the text that options are judged on, layer by layer."""

    def __init__(self, checkpoint: Checkpoint, windows: list[Window], states: Tensor | None) -> None:
        self._checkpoint = checkpoint
        self.config = ModelConfig.from_json(checkpoint.config)
        self._embedding = checkpoint.tensor("model.embed_tokens.weight")
        self._norm = final_norm(checkpoint, self.config)
        self._windows = windows
        self.states = self.embedded(windows).hidden[None] if states is None else states  # [S, T, D]

    def embedded(self, windows: list[Window]) -> Stream:
        """A text before the first layer."""
        ids = torch.cat([w.ids[:-1] for w in windows])
        hidden = embedded(self.config, self._embedding, ids)
        return Stream(hidden, ids, torch.cat([w.ids[1:] for w in windows]), [w.tokens for w in windows])

    def through(self, layer: Layer, stream: Stream, ops: TracedOps | None = None) -> Tensor:
        """Hidden states after `layer`, [T, D]."""
        return forward(layer, ops or TracedOps(), stream, self._embedding, self._norm)

    def of(self, layer: Layer, states: Tensor) -> Tensor:
        """`layer` of states [S, T, D]."""
        windows = self._windows * len(states)
        ids, next_ids = (torch.cat([w.ids[part] for w in windows]) for part in (slice(-1), slice(1, None)))
        stream = Stream(states.flatten(0, 1), ids, next_ids, [w.tokens for w in windows])
        return self.through(layer, stream).view_as(states)

    def divergences(self) -> list[float]:
        """Mean KL(model || model with one layer in PROBE) for every layer, nats per token."""
        tied = self.config.head.tie_word_embeddings
        head = self._embedding.float() if tied else self._checkpoint.weight("lm_head").dequantize()

        def log_probs(hidden: Tensor) -> Tensor:  # [t, D] -> [t, V]
            normed = F.rms_norm(hidden, hidden.shape[-1:], self._norm, self.config.rms_norm_eps)
            return (F.linear(normed, head) * self.config.head.logit_scale).log_softmax(-1)

        totals = [0.0] * (len(self.states) - 1)
        for rows in range(0, self.states.shape[1], ROWS):
            model, *others = self.states[:, rows : rows + ROWS]
            p = log_probs(model)
            for i, other in enumerate(others):
                totals[i] += float((p.exp() * (p - log_probs(other))).sum(dtype=torch.float64))
        return [max(total / self.states.shape[1], 0.0) for total in totals]


ROWS = 512  # tokens whose distributions are in memory at a time


@dataclass(slots=True)
class Measured:
    """What is known of the first layers."""

    options: list[Option] = field(default_factory=list)  # whose `kl` is still the error of the layer's output
    probes: list[float] = field(default_factory=list)  # that error of each layer with all parts in PROBE
    divergences: list[float] | None = None  # KL of each probe; known after the last layer

    def in_nats(self) -> list[Option]:
        """The options with their effect on the model."""
        assert self.divergences is not None
        rates = [kl / e if e else 0.0 for kl, e in zip(self.divergences, self.probes, strict=True)]
        return [replace(o, kl=o.kl * rates[int(o.part.split(".")[2])]) for o in self.options]


def measure(
    checkpoint: Checkpoint,
    recipe: Recipe,
    corpus: Corpus,
    progress: Callable[[str, int, int], None] | None = None,
    notes: Notes | None = None,
) -> list[Option]:
    """Measure every option of every part. notes: results kept between runs."""
    measured, hidden = notes.read() if notes else (Measured(), {})
    if measured.divergences is not None:
        return measured.in_nats()
    fit_windows, judge_windows = split(corpus)
    judge = Judge(checkpoint, judge_windows, hidden.get("states"))
    fit = judge.embedded(fit_windows)
    fit.hidden = hidden.get("fit", fit.hidden)
    layers = judge.config.num_hidden_layers
    for index in range(len(measured.probes), layers):
        if progress:
            progress(f"sensitivity of layer {index}", index, layers)
        layer = Layer.read(checkpoint, judge.config, index)
        checkpoint.release()
        recorder = Recorder(Wanted(gram=True))
        with bfloat16_products():
            fit.hidden = judge.through(layer, fit, recorder)
        _measure_layer(judge, layer, recorder, recipe, measured, len(fit.hidden))
        del layer, recorder  # free before the next one is read
        if index + 1 == layers:
            measured.divergences = judge.divergences()
        if notes:
            notes.write(measured, {"fit": fit.hidden, "states": judge.states})
    return measured.in_nats()


@dataclass(frozen=True, slots=True)
class Notes:
    """What was measured so far, so that a killed run resumes, and another budget is planned at once."""

    file: Path
    fingerprint: str

    def read(self) -> tuple[Measured, dict[str, Tensor]]:
        """Results of an earlier run of the same job, and the hidden states after its last layer."""
        content = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        if content.get("fingerprint") != self.fingerprint:
            return Measured(), {}
        found = Measured(**content["measured"])
        found.options = [Option(**o | {"sizes": Sizes(**o["sizes"])}) for o in content["measured"]["options"]]
        hidden = self._hidden(len(found.probes))
        return found, {} if found.divergences is not None else load_file(hidden)

    def write(self, measured: Measured, hidden: dict[str, Tensor]) -> None:
        """Store hidden states, then the file that refers to them."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        layers = len(measured.probes)
        if measured.divergences is None:
            replace_tensors(self._hidden(layers), hidden)
        content = {"fingerprint": self.fingerprint, "measured": asdict(measured)}
        replace_json(self.file, content, indent=None)
        self._hidden(layers - 1).unlink(missing_ok=True)

    def _hidden(self, layers: int) -> Path:
        return self.file.with_name(f"sensitivity-{layers}.safetensors")


def split(corpus: Corpus) -> tuple[list[Window], list[Window]]:
    """(windows to fit on, windows to evaluate on): about SAMPLE tokens from the end."""
    count, tokens = 0, 0
    while count < len(corpus.windows) // 2 and tokens < SAMPLE:
        count += 1
        tokens += corpus.windows[-count].tokens
    cut = len(corpus.windows) - max(count, 1)
    return corpus.windows[:cut] or corpus.windows, corpus.windows[cut:]


def _measure_layer(
    judge: Judge, layer: Layer, recorder: Recorder, recipe: Recipe, measured: Measured, tokens: int
) -> None:
    """Measure the options of one layer, and pass the states through it."""
    seen = recorder.experts.get(f"{layer.prefix}mlp")
    routed = {} if seen is None else {layer.index: measured_shares(seen.tolist(), tokens)}
    before, judge.states = judge.states[:1], judge.of(layer, judge.states)
    trial = _Trial(judge, before, judge.states[:1], reads_of(judge.config, routed))
    kept = compress_layer(replace(layer, tensors=dict(layer.tensors)), None, recipe, lambda module: "keep")
    options = [Option(part, "keep", trial.sizes(done), 0.0) for part, done in parts(kept.modules).items()]
    for kind in FORMATS:
        copy = replace(layer, tensors=dict(layer.tensors))
        result = compress_layer(copy, recorder, recipe, partial(_always, kind))
        options += trial.options(layer, copy, kind, parts(result.modules), options)
        if kind == PROBE:
            probe = judge.of(copy, before)
            measured.probes.append(trial.error(probe))
    judge.states = torch.cat((judge.states, probe))
    measured.options += options


def _always(kind: str, module: str) -> str:
    return kind


@dataclass(frozen=True, slots=True)
class _Trial:
    """Measures the options of one layer."""

    judge: Judge
    before: Tensor  # [1, T, D] input of the layer
    after: Tensor  # its output
    reads: Reads

    def options(
        self,
        layer: Layer,
        rounded: Layer,
        kind: str,
        done: Mapping[str, dict[str, Done]],
        known: list[Option],
    ) -> Iterator[Option]:
        """Every part in one format, as it is in `rounded`, except where the result equals a known option."""
        for part, modules in done.items():
            sizes = self.sizes(modules)
            # If a group size divides no matrix of the part, a smaller one was used.
            twins = (o for o in known if (o.part, o.sizes) == (part, sizes))
            if kind.startswith("int4") and any(o.format.startswith("int4") for o in twins):
                continue
            changed = {f"{m}.weight": rounded.weight(m) for m in modules}
            out = self.judge.of(replace(layer, tensors=layer.tensors | changed), self.before)
            yield Option(part, kind, sizes, self.error(out))

    def error(self, out: Tensor) -> float:
        """The mean squared error of the layer's output, relative to the output of each token."""
        missed, size = (out - self.after).square().sum(-1), self.after.square().sum(-1)
        return float((missed / size.clamp_min(1e-30)).mean(dtype=torch.float64))

    def sizes(self, done: Mapping[str, Done]) -> Sizes:
        """Of the files, which the kernels' layout equals: nothing is pruned here."""
        file, token = 0, 0.0
        for m, own in done.items():
            stored = encode("compressed-tensors", m, own.weight, key_in("compressed-tensors", m, own.key))
            bytes_ = sum(t.nbytes for t in stored.values())
            file += bytes_
            token += bytes_ * self.reads(m)
        return Sizes(file, file, round(token))


def parts(modules: Mapping[str, Done]) -> dict[str, dict[str, Done]]:
    """Modules by part."""
    grouped: dict[str, dict[str, Done]] = {}
    for module, done in modules.items():
        grouped.setdefault(part_of(module), {})[module] = done
    return grouped
