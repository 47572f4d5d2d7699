"""What the layers of a model keep of a sequence, by kind: rows per token, or a state per sequence.

Everything that manages memory (allocator, prefix cache, disk cache, planner, `inspect`) works from these
descriptions and knows no model type. Layers that keep the same are one kind. A kind has tensors, blocks (or
slots) and a block table of its own; block j of a sequence holds the tokens from j * block_size on in every
kind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING

from farthing.model.forms import CompressedHeads, Mixer

if TYPE_CHECKING:
    from farthing.model.config import ModelConfig

_ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1}
_SCALES = ("fp8", "int8")  # dtypes with float32 scales: two per row and token, one per index key


@dataclass(frozen=True, slots=True)
class Entries:
    """What layers with a compressed past keep in the blocks of a kind: a row for so many tokens."""

    layers: tuple[int, ...]
    past: int  # their rate
    rate: int  # tokens of a row: 1 in a window
    width: int
    index_width: int = 0  # of index keys beside them


@dataclass(frozen=True, slots=True)
class StateShape:
    """A float32 tensor that layers keep of a sequence, whatever its length."""

    layers: tuple[int, ...]
    shape: tuple[int, ...]  # per layer and sequence


@dataclass(frozen=True, slots=True)
class CacheKind:
    """What some layers keep of a sequence.

    Layers are numbered as in the cache: hidden layers, then MTP layers.
    """

    layers: tuple[int, ...]
    rows: int = 0  # per layer and token
    width: int = 0  # values per row
    index_rows: int = 0  # index keys per token, over all layers
    index_width: int = 0
    window: int | None = None  # tokens that a token sees, itself included; None: all before it
    state: tuple[StateShape, ...] = ()  # instead of rows
    entries: tuple[Entries, ...] = ()

    @property
    def name(self) -> str:
        """For logs and tables."""
        if self.state:
            return "state"
        return "full" if self.window is None else f"window of {self.window:,}"

    def token_bytes(self, dtype: str) -> int:
        """Bytes per token of these layers; 0 for states."""
        item, scale = _ITEM_BYTES[dtype], 4 * (dtype in _SCALES)
        rows = len(self.layers) * self.rows * (self.width * item + 2 * scale)
        past = 0.0
        for e in self.entries:
            index = e.index_width and e.index_width * item + scale
            past += len(e.layers) * (e.width * item + 2 * scale + index) / e.rate
        return rows + self.index_rows * (self.index_width * item + scale) + ceil(past)

    @property
    def state_bytes(self) -> int:
        """Bytes per sequence of these layers, whatever its length."""
        return 4 * sum(len(each.layers) * prod(each.shape) for each in self.state)

    def held_by(self, layers: Collection[int]) -> CacheKind:
        """What these of the layers keep, without index keys of sparse attention."""

        def kept(of: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(i for i in of if i in layers)

        return replace(
            self,
            layers=kept(self.layers),
            index_rows=0,
            state=tuple(replace(each, layers=kept(each.layers)) for each in self.state),
            entries=tuple(replace(each, layers=kept(each.layers)) for each in self.entries),
        )


def cache_place(config: ModelConfig, layer: int) -> tuple[int | None, int]:
    """A layer's window, and its first row in the cache of the layers with the same one, or in the states.

    A layer with a compressed past gets the whole cache, and its row among those of its rate.
    """
    own, before = config.mixer(layer), [config.mixer(i) for i in range(layer)]
    if _past({layer: own}):
        return None, sum(m.entry_tokens == own.entry_tokens for m in before)
    if own.states:
        return None, sum(bool(m.states) for m in before)
    return own.window, own.cache_rows * sum(m.window == own.window and not m.states for m in before)


def cache_kinds(config: ModelConfig, tp: int = 1) -> tuple[CacheKind, ...]:
    """The kinds of a model, on one of `tp` ranks that share its heads.

    The first keeps all tokens; it exists even if no layer is of this kind, because its blocks are what the
    prefix cache finds a sequence by. Windows follow, and states come last.
    """
    config = config.per_rank(tp)
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    mixers = {layer: config.mixer(layer) for layer in layers}
    if past := _past(mixers):
        return _compressed(past)
    found: dict[int | None, list[int]] = {None: []}
    for layer, mixer in mixers.items():
        if not mixer.states:
            found.setdefault(mixer.window, []).append(layer)
    index = config.attention.index
    paged = [
        CacheKind(
            tuple(held),
            (form := mixers[held[0]] if held else config.attention).cache_rows,
            form.cache_width,
            config.index_rows if window is None else 0,
            index.width if index else 0,
            window,
        )
        for window, held in found.items()
    ]
    own = tuple(layer for layer, mixer in mixers.items() if mixer.states)
    if own:
        state = tuple(StateShape(own, shape) for shape in mixers[own[0]].states)
        paged.append(CacheKind(own, state=state))
    return tuple(paged)


def _past(mixers: Mapping[int, Mixer]) -> dict[int, CompressedHeads]:
    """The layers with a compressed past."""
    return {layer: mixer for layer, mixer in mixers.items() if isinstance(mixer, CompressedHeads)}


def _compressed(mixers: Mapping[int, CompressedHeads]) -> tuple[CacheKind, ...]:
    """Entries of all tokens, a window, and the tokens of which there will be entries."""
    by_rate = {
        rate: tuple(layer for layer, mixer in mixers.items() if mixer.rate == rate)
        for rate in sorted({mixer.rate for mixer in mixers.values()})
    }
    past, opened, own = [], [], []
    for rate, layers in by_rate.items():
        form = mixers[layers[0]]
        own.append(Entries(layers, rate, 1, form.head_dim))
        if rate:
            past.append(Entries(layers, rate, rate, form.head_dim, form.index.width if form.index else 0))
            opened.append(StateShape(layers, form.open_tokens))
    window = next(iter(mixers.values())).window
    kinds = [CacheKind((), entries=tuple(past)), CacheKind(tuple(mixers), window=window, entries=tuple(own))]
    if opened:
        kinds.append(CacheKind(tuple(sorted(i for e in past for i in e.layers)), state=tuple(opened)))
    return tuple(kinds)


# How many blocks and slots a cache has, besides the blocks that keep every token.

CHECKPOINT_TOKENS = 512  # distance at which the prefix cache keeps windows and states


def window_blocks(window: int, block_size: int, sequences: int, step_tokens: int, lookahead: int) -> int:
    """Blocks with which `sequences` never run out, and steps of `step_tokens` are computed.

    A sequence holds its window before the last edge of a block, the block after that, and the tokens of a
    step. A divided prompt holds those of one step while others are computed.
    """
    each = -(-(window - 1) // block_size) + 2 + -(-lookahead // block_size)
    return sequences * each + 2 * -(-step_tokens // block_size)


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Blocks of layers with a window, by its size, and slots of states; 0: the model has none."""

    windows: dict[int, int]
    slots: int


@dataclass(frozen=True, slots=True)
class Sizing:
    """The load that a cache is sized for."""

    kinds: tuple[CacheKind, ...]
    dtype: str
    block_size: int
    step_tokens: int
    lookahead: int = 0

    def sizes(self, sequences: int, checkpoints: int) -> CacheSizes:
        """For so many running sequences, and positions at which windows and states are kept."""
        windows, size = [kind.window for kind in self.kinds if kind.window is not None], self.block_size
        step = sequences, self.step_tokens, self.lookahead
        blocks = {w: window_blocks(w, size, *step) + checkpoints * -(-(w - 1) // size) for w in windows}
        states = any(kind.state for kind in self.kinds)
        return CacheSizes(blocks, sequences + checkpoints if states else 0)

    def used(self, blocks: int, sizes: CacheSizes) -> int:
        """Bytes of a cache; blocks: of those that keep every token."""
        total = sum(sizes.slots * kind.state_bytes for kind in self.kinds)
        for kind in self.kinds:
            count = blocks if kind.window is None else sizes.windows[kind.window]
            total += count * self.block_size * kind.token_bytes(self.dtype)
        return total

    def checkpoints(self, sequences: int, blocks: int) -> int:
        """One for each sequence, and one per CHECKPOINT_TOKENS of the blocks, in at most as many bytes."""
        each, none = self._each(sequences), self.sizes(0, 0)
        if not each:
            return 0
        most = max(self.used(blocks, none) - self.used(0, none), self.used(0, self.sizes(sequences, 0)))
        return max(1, min(sequences + blocks * self.block_size // CHECKPOINT_TOKENS, most // each))

    @property
    def token_bytes(self) -> int:
        """Bytes that one more token takes, with its share of a checkpoint."""
        block = (self.used(1, self.sizes(0, 0)) - self.used(0, self.sizes(0, 0))) // self.block_size
        share = -(-self._each(1) // CHECKPOINT_TOKENS)
        return block + min(block, share) if block else max(1, share)

    def checkpoints_in(self, sequences: int, memory: int) -> int:
        """The same of a cache that has this many bytes for blocks and checkpoints."""
        each, block = self._each(sequences), self.used(1, self.sizes(0, 0)) - self.used(0, self.sizes(0, 0))
        if not each:
            return 0
        both = CHECKPOINT_TOKENS * block // self.block_size + each
        return max(1, min(sequences + memory // both, memory // 2 // each))

    def _each(self, sequences: int) -> int:
        """Bytes of a checkpoint."""
        return self.used(0, self.sizes(sequences, 1)) - self.used(0, self.sizes(sequences, 0))
