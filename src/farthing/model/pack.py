"""Pack a checkpoint for the CPU kernels one layer at a time, in the memory of a layer or two."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.reader import Checkpoint
from farthing.config import Quantization
from farthing.model.config import ModelConfig
from farthing.model.decoder import EMBEDDING, Rotations, head_ops, routers_of
from farthing.model.load import IGNORED, config_of, form_of, source_of, unread
from farthing.model.source import LayerSource, WeightSource
from farthing.ops import Ops, Weight
from farthing.ops.cpu import create
from farthing.process import Progress, unseen

if TYPE_CHECKING:
    from farthing.ops.cpu import CpuOps
    from farthing.ops.cpu.packed import PackedWriter

_SMALL = 64 << 20  # bytes of weights that fit in memory whole and that one thread packs before others wake up


def pack_checkpoint(
    path: str | Path,
    target: str | Path,
    quantization: Quantization | None = None,
    threads: int | None = None,
    progress: Progress = unseen,
) -> None:
    """Write the file that `select("cpu", packed=target)` maps; the same bytes as `Ops.save_packed` of the
    loaded model. A run that was killed continues where it was. Torch is not imported for a checkpoint that
    numpy can read.

    Raises ConfigError, CheckpointError or FileNotFoundError as `load` does, OSError if the disk is full.
    """
    from farthing.ops.cpu.packed import PackedWriter  # the native module

    checkpoint = Checkpoint.open(Path(path))
    checkpoint.arrays = arrays = checkpoint.plain()
    small = checkpoint.stored_bytes() <= _SMALL
    threads = 1 if small else threads
    config = config_of(checkpoint)
    source = source_of(checkpoint, config)
    with (
        PackedWriter(Path(target), quantization, checkpoint.fingerprint()) as writer,
        checkpoint.read_ahead(reading_order(checkpoint.names(), writer, config)),
    ):
        whole, total = True, config.num_hidden_layers + 1 + config.num_nextn_predict_layers
        written = write_parts(
            writer, config, source, lambda: create(None, threads, quantization, None, arrays=arrays)
        )
        for done, part in enumerate(written, 1):
            if not small:
                checkpoint.release()
            progress("packing", done, total)
            whole = whole and part is not None
        if whole:
            checkpoint.finish(ignore=IGNORED + unread(config))
        writer.finish()


def write_parts(
    writer: PackedWriter, config: ModelConfig, source: WeightSource, ops: Callable[[], CpuOps]
) -> Iterator[str | None]:
    """Pack the parts that the file lacks. Yields each one's name, or None for one that it has.

    ops: makes a backend that owns the packed weights of one part alone.
    """
    for part, build in parts(config, source):
        if part in writer:
            yield None
            continue
        backend = ops()
        build(backend)
        writer.add(part, backend.packed_weights(), backend.input_rounding())
        yield part


_LAYER = re.compile(r"layers\.(\d+)\.")
_NUMBERS = re.compile(r"(\d+)")


def reading_order(names: Iterable[str], done: Container[str], config: ModelConfig) -> list[str]:
    """The tensors of parts that are not done, roughly as `parts` reads them: attention before experts."""

    def key(name: str) -> tuple[Any, ...]:
        match = _LAYER.search(name)
        layer = int(match[1]) if match else config.num_hidden_layers - 0.5  # the head
        numbers = [(0, int(w)) if w.isdecimal() else (1, w) for w in _NUMBERS.split(name)]
        return layer, "experts" in name, numbers

    def part(name: str) -> str:
        layer = _LAYER.search(name)
        return f"layer {layer[1]}" if layer else "head"

    return sorted((name for name in names if part(name) not in done), key=key)


def parts(config: ModelConfig, source: WeightSource) -> Iterator[tuple[str, Callable[[Ops], object]]]:
    """(name, a function that packs it) in the order in which `DecoderModel` packs."""
    shape = (config.vocab_size, config.hidden_size)
    ropes = Rotations(config).tables
    routers, form = routers_of(config), form_of(config)

    def at(ops: Ops, layer: int) -> LayerSource:
        return LayerSource(config, ops, source, layer, routers[layer], ops.tensor(ropes[layer]))

    def layer(i: int) -> Callable[[Ops], object]:
        def build(ops: Ops) -> object:
            return form.build_layer(at(ops, i))

        return build

    def head_weight() -> Weight:
        if config.head.tie_word_embeddings:
            return source.weight(EMBEDDING, shape)
        return source.weight("lm_head", shape)

    def head(ops: Ops) -> object:
        source.weight(EMBEDDING, shape)  # read from the checkpoint, also when serving
        source.tensor("model.norm.weight", (config.hidden_size,))
        ending = form.build_ending(config, ops, source)
        return ending, head_ops(config, ops).pack_head("lm_head", head_weight)

    def mtp(i: int) -> Callable[[Ops], object]:
        def build(ops: Ops) -> object:
            embedding = source.tensor("model.embed_tokens.weight", shape)
            return form.draft_layer(at(ops, i), embedding, None, head_weight)

        return build

    hidden = config.num_hidden_layers
    for i in range(hidden):
        yield f"layer {i}", layer(i)
    yield "head", head
    for i in range(hidden, hidden + config.num_nextn_predict_layers):
        yield f"layer {i}", mtp(i)
