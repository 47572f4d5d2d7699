"""Apply a recipe to a checkpoint, one layer in memory at a time; resumable after a kill.

Legend: T calibration tokens; D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from farthing.checkpoint import CheckpointWriter, GroupKey
from farthing.checkpoint.compressed_tensors import MARK, VALUES
from farthing.checkpoint.reader import unquantized
from farthing.compress.evaluate import Corpus
from farthing.compress.export import encode, key_in, quantization_config
from farthing.compress.layer import Layer, Stream, TracedOps, bfloat16_products, check_finite
from farthing.compress.recipe import Recipe
from farthing.compress.source import PlainCheckpoint, embedded, final_norm
from farthing.compress.transform import Plan, compress_layer
from farthing.compress.work import Advance, LayerResult, LayerWork
from farthing.files import replace_json, replace_tensors
from farthing.model.config import ModelConfig

STEPS = 100  # of progress per layer
PASSES, ROUNDING = 25, 40  # about the steps of a pass over the calibration text, and of rounding
Progress = Callable[[str, int, int], None]  # (what, steps done, steps)
STATE = ".farthing"


@dataclass(frozen=True, slots=True)
class Compression:
    """A compression job: source, destination and recipe."""

    source: Path
    out: Path
    recipe: Recipe
    calibration: Corpus | None
    plan: Plan | None = None  # module -> format; None: the recipe's scheme everywhere
    export: str = "compressed-tensors"  # see `export.py`

    def __post_init__(self) -> None:
        if self.recipe.scheme == "auto" and self.plan is None:
            raise ValueError(f"recipe {self.recipe.name} needs a plan; see farthing.compress.plan.make_plan")
        if self.recipe.needs_data and self.calibration is None:
            raise ValueError(f"recipe {self.recipe.name} needs calibration text; expected a calibration file")


@dataclass(slots=True)
class Progressed:
    """The state of a run after some layers; with the shards, all that a resumed run needs."""

    fingerprint: str
    next_layer: int = -1  # -1: the embedding is not written yet
    shards: int = 0
    modules: list[dict[str, Any]] = field(default_factory=list)
    coverage: list[dict[str, Any]] = field(default_factory=list)
    healed: list[dict[str, Any]] = field(default_factory=list)  # errors of each layer, before and after
    keys: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)  # of config.json
    complete: bool = False  # the model is written; what follows, such as a report, is not

    def group_keys(self) -> dict[str, GroupKey | None]:
        """The config group of every module written so far."""
        return {module: GroupKey(**key) if key else None for module, key in self.keys.items()}


def run(job: Compression, progress: Progress | None = None, keep: bool = False) -> Progressed:
    """Compress `job.source` into `job.out`. Raises CheckpointError or ValueError with the next step.

    keep: leave the state of the run for a caller with more to do, which ends with `finish`; until then the
    same job returns at once, and another one is refused.
    """
    checkpoint = PlainCheckpoint.open(job.source)
    config = ModelConfig.from_json(checkpoint.config)
    if not config.runs_by_layer:
        raise ValueError(
            f"model_type: got {config.model_type!r}, which compression does not support; "
            "expected a type without sparse attention, shortcuts, identity experts, parallel feed-forwards "
            "and norms of the experts' outputs"
        )
    job.recipe.check(config)
    layers = _layers(checkpoint, config)
    state, hidden = _resume(job)
    if state.complete:
        return state
    job = replace(job, recipe=job.recipe.begin(_each(checkpoint, config, layers)))
    writer = CheckpointWriter(job.out, resume=state.next_layer >= 0)
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    norm = final_norm(checkpoint, config)
    stream = _stream(job, config, embedding, hidden)
    if state.next_layer < 0:
        _write_top(checkpoint, config, writer, state)
        state.next_layer = 0
        _save(job, state, writer, stream)
    for index in range(state.next_layer, layers):
        steps = _Steps(progress, index, layers)
        layer = Layer.read(checkpoint, config, index)
        checkpoint.release()
        result = _one_layer(job, layer, stream, embedding, norm, state, steps)
        _write_layer(job, checkpoint, layer, result, writer, state)
        del layer, result  # free before the next one is read
        state.next_layer = index + 1
        _save(job, state, writer, stream)
    writer.close(_final_config(job, checkpoint, state), copy_from=job.source)
    state.complete = True
    replace_json(job.out / STATE / "state.json", asdict(state), indent=None)
    if not keep:
        finish(job.out)
    if progress:
        progress("written", STEPS * layers, STEPS * layers)
    return state


def finish(out: Path) -> None:
    """Remove what a resumed run needs."""
    shutil.rmtree(out / STATE, ignore_errors=True)


class _Steps:
    """Progress within one layer."""

    def __init__(self, progress: Progress | None, index: int, layers: int) -> None:
        self._progress, self._index, self._layers = progress, index, layers
        self._done = 0.0
        self.part(0)(0)

    def part(self, steps: int) -> Advance:
        """The next part of the layer, which takes about this many of its steps."""
        start, self._done = self._done, min(self._done + steps, STEPS - 1)
        end = self._done

        def advance(share: float) -> None:
            if self._progress:
                done = self._index * STEPS + start + share * (end - start)
                what = f"layer {self._index + 1} of {self._layers}"
                self._progress(what, int(done), self._layers * STEPS)

        return advance


def _layers(checkpoint: PlainCheckpoint, config: ModelConfig) -> int:
    """Decoder layers in the files, including MTP layers (transformers drops those)."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    while layers > config.num_hidden_layers and not checkpoint.has(f"model.layers.{layers - 1}.enorm.weight"):
        layers -= 1
    return layers


def _each(checkpoint: PlainCheckpoint, config: ModelConfig, layers: int) -> Iterator[Layer]:
    """Every layer, one in memory at a time."""
    for index in range(layers):
        yield Layer.read(checkpoint, config, index)
        checkpoint.release()


# -- one layer


def _one_layer(
    job: Compression,
    layer: Layer,
    stream: Stream | None,
    embedding: Tensor,
    final_norm: Tensor,
    state: Progressed,
    steps: _Steps,
) -> LayerResult:
    recipe = job.recipe
    work = LayerWork(layer, recipe.recorder, stream, embedding, final_norm, steps.part(PASSES))
    recipe.prepare(work)
    plan = job.plan or (lambda module: recipe.scheme)
    result = compress_layer(
        layer, work.recorder, recipe, plan, work.masks, work.originals, steps.part(ROUNDING)
    )
    recipe.finish(work, result)
    work.forget()
    state.changes |= work.changes
    if work.healed is not None:
        state.healed.append({"layer": layer.index} | work.healed)
    if stream is not None and not layer.is_mtp:
        if recipe.coarse or work.out is None:
            work.advance = steps.part(PASSES)
            with bfloat16_products():
                work.out = work.forward(TracedOps())
        stream.hidden = work.out
    return result


# -- writing


def _write_top(
    checkpoint: PlainCheckpoint, config: ModelConfig, writer: CheckpointWriter, state: Progressed
) -> None:
    for name in (n for n in checkpoint.names() if not n.startswith(("model.layers.", "lm_head."))):
        check_finite(name, checkpoint.tensor(name))
        writer.add(checkpoint.stored(name), checkpoint.tensor(name))
    for name, tensor in checkpoint.skipped():
        writer.add(name, tensor)
    if not config.head.tie_word_embeddings:
        head = checkpoint.weight("lm_head")
        value = head.data if head.format == "dense" else head.dequantize(torch.bfloat16)
        check_finite("lm_head.weight", value)
        writer.add(checkpoint.stored("lm_head.weight"), value)
    state.keys["lm_head"] = None
    writer.flush()


def _write_layer(
    job: Compression,
    checkpoint: PlainCheckpoint,
    layer: Layer,
    result: LayerResult,
    writer: CheckpointWriter,
    state: Progressed,
) -> None:
    stored = checkpoint.stored
    for module, done in result.modules.items():
        key = key_in(job.export, module, done.key)
        for name, tensor in encode(job.export, module, done.weight, key).items():
            writer.add(stored(name), tensor)
        if done.input_scale is not None:
            writer.add(stored(f"{module}.input_scale"), torch.tensor([done.input_scale]))
        state.keys[module] = asdict(key) if key else None
        state.modules.append(done.report)
    for name, tensor in layer.tensors.items():
        if name.removesuffix(".weight") in result.modules:
            continue
        module = name.removesuffix(".weight")
        if (own := layer.parameters.find(module)) is not None and own.role == "linear":
            state.keys[module] = None
        dtype = layer.stored.get(name, torch.float32)
        exact = torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
        writer.add(stored(name), tensor.to(dtype) if exact else tensor)
    if result.coverage is not None:
        state.coverage.append({"layer": layer.index} | result.coverage)
    writer.flush()


def _final_config(job: Compression, checkpoint: PlainCheckpoint, state: Progressed) -> dict[str, Any]:
    config = unquantized(checkpoint.config)
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = unquantized(text)
    for name, value in state.changes.items():  # under the names that the file has
        config |= {own: value for own in _NAMES.get(name, ()) if own in config} or {name: value}
    keys = {checkpoint.stored(module): key for module, key in state.group_keys().items()}
    others = (n for n, tensor in checkpoint.skipped() if n.endswith(".weight") and tensor.ndim == 2)
    keys |= {name.removesuffix(".weight"): None for name in others}
    quantization = quantization_config(job.export, keys)
    mark = VALUES if any(key and key.format == "nl4" for key in keys.values()) else {}
    if job.recipe.head == "int8":
        mark = mark | {"head": "int8"}
    if mark:
        config[MARK] = mark
    return config | ({"quantization_config": quantization} if quantization else {})


_NAMES = {"n_routed_experts": ("n_routed_experts", "num_local_experts", "num_experts")}


# -- resuming


def _stream(
    job: Compression, config: ModelConfig, embedding: Tensor, hidden: dict[str, Tensor] | None
) -> Stream | None:
    if job.calibration is None or not job.recipe.needs_data:
        return None
    windows = job.calibration.windows
    ids = torch.cat([w.ids[:-1] for w in windows])
    start = embedded(config, embedding, ids)
    held = hidden or dict.fromkeys(("hidden", *job.recipe.streams()), start)
    next_ids, lengths = torch.cat([w.ids[1:] for w in windows]), [w.tokens for w in windows]
    others = {name: held[name] for name in job.recipe.streams()}
    return Stream(held["hidden"], ids, next_ids, lengths, others)


def fingerprint(source: Path, recipe: Recipe, export: str, calibration: Corpus | None) -> str:
    """A digest of everything that determines the output."""
    digest = hashlib.sha256(json.dumps([recipe.to_json(), export], sort_keys=True).encode())
    for file in sorted(source.glob("*.safetensors")):
        digest.update(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    for window in calibration.windows if calibration else ():
        digest.update(window.ids.numpy().tobytes())
    return digest.hexdigest()


def refuse_finished(out: Path) -> None:
    """Raise ValueError if `out` has a model that is not an unfinished run's."""
    if (out / "config.json").exists() and not (out / STATE / "state.json").exists():
        raise ValueError(f"{out} {_TAKEN}")


_TAKEN = "already has a model; choose another directory or remove it first"


def _resume(job: Compression) -> tuple[Progressed, dict[str, Tensor] | None]:
    """The state of an earlier run of the same job, or a new one. Rejects a directory with other files."""
    refuse_finished(job.out)
    digest = fingerprint(job.source, job.recipe, job.export, job.calibration)
    directory = job.out / STATE
    file = directory / "state.json"
    if file.is_file():
        state = Progressed(**json.loads(file.read_text(encoding="utf-8")))
        if state.complete and state.fingerprint != digest:
            raise ValueError(f"{job.out} {_TAKEN}")
        if state.complete:
            return state, None
        parts = sorted(job.out.glob("part-*.safetensors"))
        # Fewer parts than shards: a run was killed while renaming them to their final names.
        if state.fingerprint == digest and len(parts) >= state.shards:
            for part in parts[state.shards :]:
                part.unlink()
            hidden = directory / f"hidden-{state.next_layer}.safetensors"
            return state, load_file(hidden) if hidden.is_file() else None
        shutil.rmtree(directory)
    return Progressed(digest), None


def _save(job: Compression, state: Progressed, writer: CheckpointWriter, stream: Stream | None) -> None:
    """Write the shards, then the hidden states, then the file that refers to both."""
    directory = job.out / STATE
    directory.mkdir(exist_ok=True)
    state.shards = writer.shards
    old = list(directory.glob("hidden-*.safetensors"))
    if stream is not None:
        target = directory / f"hidden-{state.next_layer}.safetensors"
        hidden = {"hidden": stream.hidden} | {name: t.clone() for name, t in stream.others.items()}
        replace_tensors(target, {k: t.contiguous() for k, t in hidden.items()})
    replace_json(directory / "state.json", asdict(state), indent=None)
    for file in old:
        if file.name != f"hidden-{state.next_layer}.safetensors":
            file.unlink()
