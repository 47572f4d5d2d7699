"""Model architecture, read from a config.json of any type in `farthing.model.types`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any

from farthing.checkpoint.compressed_tensors import MARK
from farthing.checkpoint.reader import CONFIG, has_config, read_config
from farthing.model import fields as checked
from farthing.model.fields import (
    MOST,
    ConfigError,
    RopeConfig,
    optional_section,
    wrong,
)
from farthing.model.forms import Experts, Feed, Index, LatentHeads, Mixer, feed_layers
from farthing.model.types import type_named, type_of
from farthing.ops.specs import StreamSpec

__all__ = [
    "ConfigError",
    "Head",
    "ModelConfig",
    "RopeConfig",
    "check_config",
]


@dataclass(frozen=True, slots=True)
class Head:
    """The product that gives the logits, which are scaled and then capped. Names follow config.json."""

    tie_word_embeddings: bool = False  # its matrix is the embedding's
    logit_scale: float = 1.0
    logit_cap: float | None = None  # logits z become cap tanh(z / cap)
    rounded_head: bool = False  # it was meant to be served in 8 bits, where the backend has them


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Field names follow config.json; see shared facts in docs/design/architecture.md."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    mixers: tuple[Mixer, ...]  # the first half of each hidden layer, then that of MTP layers
    feeds: tuple[Feed, ...]  # the second half of each hidden layer, then those of MTP layers
    max_position_embeddings: int
    streams: StreamSpec | None = None  # of the residual; None: one, to which outputs are added
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to the weights of norms, but for those of recurrent layers' outputs
    embedding_scale: float = 1.0  # of the embedding's output
    head: Head = Head()
    post_norms: bool = False  # norms on the outputs of first halves; `feeds` tell of second ones
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def mixer(self, layer: int) -> Mixer:
        """The first half of a layer."""
        return self.mixers[min(layer, self.num_hidden_layers)]

    def feed(self, layer: int) -> Feed:
        """The second half of a layer."""
        return self.feeds[min(layer, len(self.feeds) - 1)]

    @property
    def experts(self) -> Experts | None:
        """Those of the first layer that has some; None: every layer is dense."""
        return next((feed.experts for feed in self.feeds if feed.experts is not None), None)

    @property
    def attention(self) -> Mixer:
        """The first half of a layer that sees the whole context, if there is one, or else a window."""
        attending = [m for m in self.mixers if m.cache_rows]
        return next((m for m in attending if m.index or m.window is None), attending[0])

    @property
    def latent(self) -> LatentHeads:
        """The heads of latent attention. Raises ConfigError if attention is of another form."""
        if not isinstance(self.attention, LatentHeads):
            raise ConfigError(
                f"model_type: got {self.model_type!r}; expected a type with latent attention (MLA)"
            )
        return self.attention

    @property
    def rope(self) -> RopeConfig:
        """The rotation of layers that see the whole context."""
        return self.attention.rope

    def per_rank(self, tp: int) -> ModelConfig:
        """This config with the heads of one of `tp` ranks. Raises ValueError."""
        return replace(self, mixers=tuple(mixer.per_rank(tp) for mixer in self.mixers))

    def selecting(self, top_k: int | None) -> ModelConfig:
        """This config with indexers that select so many keys; None: none does."""
        return replace(self, mixers=tuple(mixer.selecting(top_k) for mixer in self.mixers))

    @property
    def index(self) -> Index | None:
        """The indexer of layers that have one; None: no layer has."""
        return next((mixer.index for mixer in self.mixers if mixer.index is not None), None)

    @property
    def index_topk(self) -> int | None:
        """Keys that the indexers of sparse attention select for their own and later layers; None: there are
        none."""
        index = self.attention.index
        return None if index is None or self.attention.independent else index.top_k

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.attention.query_heads

    @property
    def is_plain(self) -> bool:
        """Whether layers are attention, then an MLP or V3's mixture of experts, under V3's names."""
        more = any(m.states for m in self.mixers) or self.norm_offset > 0 or self.post_norms
        more = more or any(f.experts.biased or f.experts.shared_gate for f in self.feeds if f.experts)
        stored = type_named(self.model_type).names.stored
        return self.runs_by_layer and not more and all(stored(name) == name for name in _SAMPLES)

    @property
    def runs_by_layer(self) -> bool:
        """Whether a layer is attention (or a recurrence) and one feed-forward that need nothing of others."""
        alone = all(feed.alone and feed.post_norm == self.post_norms for feed in self.feeds)
        return alone and self.attention.independent

    @property
    def uneven(self) -> bool:
        """Whether layers of a kind differ in size, as pruning leaves them."""
        sizes = {(e.count, e.width, e.shared) for e in (feed.experts for feed in self.feeds) if e}
        return len(sizes) > 1 or len({feed.width for feed in self.feeds} - {0}) > 1

    @property
    def block_tokens(self) -> int:
        """A block of the cache has a multiple of this many tokens, so that entries do not cross its edge."""
        return lcm(*(mixer.entry_tokens for mixer in self.mixers))

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer has an indexer; others attend to all tokens or an earlier layer's selection."""
        index = self.mixer(layer).index
        return index is not None and not index.shared

    @property
    def index_rows(self) -> int:
        """Number of layers with index keys, MTP layers included."""
        return sum(map(self.has_indexer, range(self.num_hidden_layers + self.num_nextn_predict_layers)))

    @property
    def router_size(self) -> int:
        """Outputs of a router: routed experts, then identity experts; 0 without experts."""
        return self.experts.router.num_experts if self.experts else 0

    @property
    def n_routed_experts(self) -> int:
        """Routed experts of a layer; 0 without experts."""
        return self.experts.count if self.experts else 0

    @property
    def num_experts_per_tok(self) -> int:
        """Experts that a router chooses; 0 without experts."""
        return self.experts.router.top_k if self.experts else 0

    @property
    def intermediate_size(self) -> int:
        """The widest MLP; 0: no layer has one."""
        return max(feed.width for feed in self.feeds)

    @property
    def moe_intermediate_size(self) -> int:
        """Width of an expert; 0 without experts."""
        return self.experts.width if self.experts else 0

    @property
    def shared_size(self) -> int:
        """Width of the shared expert; 0 if there is none."""
        return self.experts.shared if self.experts else 0

    @property
    def state_width(self) -> int:
        """Columns of what a layer passes on to the next one: those of all streams."""
        return self.hidden_size * (1 if self.streams is None else self.streams.count)

    @property
    def mixed_width(self) -> int:
        """Coefficients by which the output of half a layer is added to the streams; 0 if there is one."""
        return 0 if self.streams is None else self.streams.count * (self.streams.count + 1)

    @property
    def routed_per_token(self) -> float:
        """Routed experts per token: fewer than num_experts_per_tok if a balanced router picks identities."""
        return self.experts.per_token if self.experts else 0.0

    @property
    def moe_layers(self) -> int:
        """Hidden layers with experts."""
        return sum(map(self.is_moe, range(self.num_hidden_layers)))

    @property
    def dense_prefix(self) -> int:
        """Hidden layers before the first with experts."""
        return next(filter(self.is_moe, range(self.num_hidden_layers)), self.num_hidden_layers)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.feed(layer).experts is not None

    def experts_in(self, layer: int) -> int:
        """Routed experts of a layer."""
        experts = self.feed(layer).experts
        return experts.count if experts else 0

    def with_feed(self, layer: int, feed: Feed) -> ModelConfig:
        """This config with another second half of a layer."""
        return replace(self, feeds=(*self.feeds[:layer], feed, *self.feeds[layer + 1 :]))

    def with_experts(self, **changes: Any) -> ModelConfig:
        """This config with other values of all layers' experts."""
        feeds = (
            f if f.experts is None else replace(f, experts=replace(f.experts, **changes)) for f in self.feeds
        )
        return replace(self, feeds=tuple(feeds))

    def part(self, layers: range) -> ModelConfig:
        """This config with only some of the hidden layers."""
        return replace(
            self,
            num_hidden_layers=len(layers),
            mixers=(*(self.mixers[i] for i in layers), self.mixers[-1]),
            feeds=(*(self.feeds[i] for i in layers), *self.feeds[self.num_hidden_layers :]),
        )

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Read a directory. Raises ConfigError, CheckpointError or FileNotFoundError, naming the fix."""
        if not has_config(path):
            raise FileNotFoundError(
                f"{path / CONFIG} does not exist; expected a Hugging Face model directory"
            )
        return cls.from_json(read_config(path))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Validate and convert. Unknown fields are ignored, as in Hugging Face."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json is a {type(raw).__name__}; expected an object")
        kind = type_of(raw)
        try:
            rounded = _rounds_head(raw)
            # The mark is beside text_config, if that is nested.
            raw = {MARK: raw.get(MARK), **kind.fields({**kind.defaults, **raw})}
            values = checked.values(cls, raw, nullable=_DRAFTS) | _derived(raw)
            hidden, drafts = values["num_hidden_layers"], values["num_nextn_predict_layers"]
            halves = {"mixers": kind.mixers(raw, hidden), "feeds": feed_layers(raw, hidden, drafts)}
            head = Head(**checked.values(Head, raw) | {"rounded_head": rounded})
            config = cls(**{**values, **halves, "model_type": kind.name, "head": head})
            positions = _stretched(config.max_position_embeddings, config.rope)
            config = replace(config, max_position_embeddings=positions)
            check_config(config)
        except ValueError as error:
            message = kind.in_own_words(str(error))
            raise ConfigError(f"config.json of type {kind.name!r}: {message}") from error
        return config


_SAMPLES = ("lm_head.weight", "model.layers.0.mlp.gate.weight")  # names that types change
_DRAFTS = ("num_nextn_predict_layers", "num_mtp_layers")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")


def _derived(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with other names or of other types. Raises ValueError."""
    if (activation := raw.get("hidden_act")) not in (None, "silu"):
        raise wrong("hidden_act", activation, "'silu'")
    if raw.get("mlp_bias") not in (None, False):
        raise wrong("mlp_bias", raw["mlp_bias"], "false: matrices have no bias")
    drafts = next((n for n in _DRAFTS if raw.get(n) is not None), None)
    return {
        "num_nextn_predict_layers": 0 if drafts is None else checked.in_range(drafts, raw[drafts], 0, 64),
        "streams": raw.get("streams"),
        "eos_token_ids": _ids(raw.get("eos_token_id")),
    }


def _stretched(positions: int, rope: RopeConfig) -> int:
    """The longest context: YaRN's factor times the original one, if config.json names less, as in Qwen's
    instructions for long texts. Fewer positions than the original context has are a limit that is meant."""
    if rope.factor is None or rope.kind != "yarn" or positions < rope.original_max_position:
        return positions
    return min(max(positions, int(rope.original_max_position * rope.factor)), MOST["max_position_embeddings"])


def _rounds_head(raw: Mapping[str, Any]) -> bool:
    """Whether config.json says that the head was compressed to 8 bits, which files hold unrounded."""
    head = optional_section(raw, MARK).get("head")
    if head not in (None, "int8"):
        raise wrong(f"{MARK}.head", head, "'int8'")
    return head is not None


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    listed = value if isinstance(value, list | tuple) else [value]
    return tuple(checked.in_range("eos_token_id", each, 0) for each in listed)


def check_config(c: ModelConfig) -> None:
    """Raise ConfigError for incompatible values."""
    for name in _SIZES:
        value = getattr(c, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}: got {value!r}; expected a positive integer")
    if c.feeds[c.num_hidden_layers - 1].delayed:
        raise ConfigError("the last layer has experts; expected a layer after them that adds their output")
    try:
        for mixer in dict.fromkeys(c.mixers):
            mixer.check()
        for feed in dict.fromkeys(c.feeds[: c.num_hidden_layers + c.num_nextn_predict_layers]):
            feed.check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
