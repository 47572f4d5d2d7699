"""Model architecture, read from a config.json of any type in `farthing.model.types`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import lcm
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from farthing.checkpoint.compressed_tensors import MARK
from farthing.checkpoint.reader import has_config, read_config
from farthing.model import fields as checked
from farthing.model.fields import (
    LARGEST,
    MOST,
    ConfigError,
    QueryScaling,
    RopeConfig,
    absent,
    optional_section,
    read_query_scaling,
    wrong,
)
from farthing.model.forms import Index, LatentHeads, Mixer
from farthing.model.types import type_named, type_of
from farthing.ops.specs import SILU, Gate, StreamSpec

__all__ = [
    "ConfigError",
    "LayerSizes",
    "ModelConfig",
    "QueryScaling",
    "RopeConfig",
    "check_config",
]


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes of one layer, if pruning made layers differ; None: the model's own value.

    Stored in config.json as "layer_sizes": one object per layer, MTP layers included.
    """

    intermediate_size: int | None = None
    n_routed_experts: int | None = None
    moe_intermediate_size: int | None = None
    shared_intermediate_size: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Field names follow config.json; see shared facts in docs/design/architecture.md."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    mixers: tuple[Mixer, ...]  # the first half of each hidden layer, then that of MTP layers
    max_position_embeddings: int
    streams: StreamSpec | None = None  # of the residual; None: one, to which outputs are added
    query_scaling: QueryScaling | None = None
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to the weights of norms, but for those of recurrent layers' outputs
    tie_word_embeddings: bool = False
    embedding_scale: float = 1.0  # of the embedding's output, and of the logits
    logit_scale: float = 1.0
    rounded_head: bool = False  # the head was meant to be served in 8 bits, where the backend has them
    logit_cap: float | None = None  # logits z become cap tanh(z / cap)
    # mixture of experts; n_routed_experts None: every layer is dense
    n_routed_experts: int | None = None
    n_shared_experts: int = 0
    n_identity_experts: int = (
        0  # router outputs after the routed experts, for experts that return their input
    )
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    dense_layers: tuple[int, ...] = ()  # further layers without experts
    n_group: int = 1
    topk_group: int = 1
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    router_bias: bool = True  # noaux_tc only: whether the gate has a correction bias
    scoring_func: Literal["sigmoid", "softmax", "sqrtsoftplus"] = "sigmoid"
    hashed_layers: tuple[int, ...] = ()  # whose experts are looked up by the token, not chosen by the router
    expert_bias: bool = False  # of the experts' matrices, and of the router's logits
    gate: Gate = SILU  # activation of MLPs and experts
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    shared_gate: bool = False  # the shared expert's output x sigmoid of a learned product with its input
    shared_intermediate_size: int | None = None  # None: n_shared_experts * moe_intermediate_size
    post_mlp_norm: bool = False  # norm on the MoE output before the residual add
    post_norms: bool = False  # norms on the outputs of attention and of every feed-forward, likewise
    parallel_mlp: bool = False  # MoE layers have a dense MLP too, each with norms of input and output
    scaled_router: bool = False  # the router's input has learned scales, not the norm's; experts' weights too
    layer_scalar: bool = False  # a layer's output is multiplied by a learned number
    shortcut_experts: bool = False  # MoE layers have a dense MLP too; experts are added a layer later
    num_nextn_predict_layers: int = 0
    layer_sizes: tuple[LayerSizes, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def mixer(self, layer: int) -> Mixer:
        """The first half of a layer."""
        return self.mixers[min(layer, self.num_hidden_layers)]

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
    def is_v3(self) -> bool:
        """Whether layers have only V3's tensors under V3's names (V2's are a subset)."""
        return isinstance(self.attention, LatentHeads) and self.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether layers are attention, then an MLP or V3's mixture of experts, under V3's names."""
        more = any(m.states for m in self.mixers) or self.shared_gate or self.norm_offset > 0
        more = more or self.expert_bias or self.post_norms
        stored = type_named(self.model_type).names.stored
        return self.runs_by_layer and not more and all(stored(name) == name for name in _SAMPLES)

    @property
    def runs_by_layer(self) -> bool:
        """Whether a layer is attention (or a recurrence) and one feed-forward that need nothing of others."""
        more = self.post_mlp_norm or self.query_scaling is not None or not self.attention.independent
        more = more or self.parallel_mlp or self.layer_scalar
        return not (more or self.shortcut_experts or self.n_identity_experts > 0)

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
        return self.n_routed_experts + self.n_identity_experts if self.n_routed_experts else 0

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
        return self.num_experts_per_tok * (self.n_routed_experts or 0) / max(self.router_size, 1)

    @property
    def moe_layers(self) -> int:
        """Hidden layers with experts."""
        return sum(map(self.is_moe, range(self.num_hidden_layers)))

    @property
    def has_router_bias(self) -> bool:
        """Whether gates have e_score_correction_bias."""
        return self.topk_method == "noaux_tc" and self.router_bias

    @property
    def shared_size(self) -> int:
        """Width of the shared expert; 0 if there is none."""
        if self.n_shared_experts and self.shared_intermediate_size is not None:
            return self.shared_intermediate_size
        return self.n_shared_experts * self.moe_intermediate_size

    def at(self, layer: int) -> ModelConfig:
        """This config with the sizes of one layer."""
        if not self.layer_sizes:
            return self
        own = self.layer_sizes[layer]
        sizes: dict[str, Any] = {
            f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) is not None
        }
        return replace(self, layer_sizes=(), **sizes)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts. MTP layers follow the same rule."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
            and layer not in self.dense_layers
        )

    def part(self, layers: range) -> ModelConfig:
        """This config with only some of the hidden layers. Which of them have experts is not adapted unless
        they are the first: a rank is given its routers."""
        return replace(
            self,
            num_hidden_layers=len(layers),
            mixers=(*(self.mixers[i] for i in layers), self.mixers[-1]),
            hashed_layers=tuple(i - layers.start for i in self.hashed_layers if i in layers),
        )

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Read `path`/config.json. Raises ConfigError or FileNotFoundError, each naming the fix."""
        if has_config(path) and not (path / "config.json").is_file():
            return cls.from_json(read_config(path))
        file = path / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; expected a Hugging Face model directory")
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file} is not valid JSON: {error}") from error

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Validate and convert. Unknown fields are ignored, as in Hugging Face."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json is a {type(raw).__name__}; expected an object")
        kind = type_of(raw)
        try:
            rounded = _rounds_head(raw)
            raw = {MARK: raw.get(MARK), **kind.fields(raw)}  # beside text_config, if that is nested
            values = _checked(cls, raw) | _derived(raw)
            values["mixers"] = kind.mixers(raw, values["num_hidden_layers"])
            config = cls(**{**values, "model_type": kind.name, "rounded_head": rounded})
            positions = _stretched(config.max_position_embeddings, config.rope)
            config = replace(config, max_position_embeddings=positions)
            check_config(config)
        except ValueError as error:
            message = kind.in_own_words(str(error))
            raise ConfigError(f"config.json of type {kind.name!r}: {message}") from error
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        if config.layer_sizes and len(config.layer_sizes) != layers:
            raise ConfigError(
                f"layer_sizes has {len(config.layer_sizes)} entries; expected one per layer, {layers}"
            )
        for layer in range(len(config.layer_sizes)):
            check_config(config.at(layer))
        return config


SCORING = ("sigmoid", "softmax", "sqrtsoftplus")
_SAMPLES = ("lm_head.weight", "model.layers.0.mlp.gate.weight")  # names that types change
_REQUIRED = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
}
_POSITIVE = {"moe_layer_freq", "n_group", "topk_group", "shared_intermediate_size"}
_EXPERT_COUNTS = ("n_routed_experts", "num_local_experts")
_NULLABLE = {"n_shared_experts", "n_group", "topk_group", "num_nextn_predict_layers"}
_EXPERT_FIELDS = {
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "moe_layer_freq",
    "topk_method",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
}
_OF_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")  # required with experts


def _checked(cls: type[ModelConfig], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json with plain types, if present. Raises ValueError for another type or range."""
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        value = raw.get(name)
        if name in _REQUIRED:
            values[name] = checked.integer(raw, name)
        elif value is None and (name not in raw or _may_be_null(raw, name, kind)):
            continue
        elif kind in (int, int | None):
            least = 1 if name in _POSITIVE else 0
            values[name] = checked.in_range(name, value, least, MOST.get(name, LARGEST))
        elif kind in (float, float | None):
            values[name] = checked.number(name, value, above=0.0)
        elif kind is bool:
            values[name] = checked.flag(name, value)
        elif get_origin(kind) is Literal:
            values[name] = checked.choice(name, value, get_args(kind))
    return values


def _may_be_null(raw: Mapping[str, Any], name: str, kind: object) -> bool:
    """Whether null means the same as a missing field. Models without experts use no field of experts."""
    dense = all(raw.get(each) is None for each in _EXPERT_COUNTS)
    return type(None) in get_args(kind) or name in _NULLABLE or (dense and name in _EXPERT_FIELDS)


def _derived(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with other names or of other types. Raises ValueError."""
    if (activation := raw.get("hidden_act")) not in (None, "silu"):
        raise wrong("hidden_act", activation, "'silu'")
    if raw.get("mlp_bias") not in (None, False):
        raise wrong("mlp_bias", raw["mlp_bias"], "false: matrices have no bias")
    experts = next((n for n in _EXPERT_COUNTS if n in raw), None)
    if experts is None:
        raise absent("n_routed_experts", "a positive integer, or null for a model without experts")
    drafts = next((n for n in ("num_nextn_predict_layers", "num_mtp_layers") if raw.get(n) is not None), None)
    derived = {
        "query_scaling": read_query_scaling(raw),
        "n_routed_experts": None if raw[experts] is None else checked.integer(raw, experts),
        "num_nextn_predict_layers": 0 if drafts is None else checked.in_range(drafts, raw[drafts], 0, 64),
        "dense_layers": tuple(raw.get("dense_layers") or ()),
        "layer_sizes": _layer_sizes(raw.get("layer_sizes")),
        "hashed_layers": tuple(raw.get("hashed_layers") or ()),
        "streams": raw.get("streams"),
        "eos_token_ids": _ids(raw.get("eos_token_id")),
        "gate": raw.get("gate") or SILU,
    }
    if raw[experts] is not None:
        derived |= {name: checked.integer(raw, name) for name in _OF_EXPERTS}
    return derived


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


def _layer_sizes(value: Any) -> tuple[LayerSizes, ...]:
    names = {f.name for f in fields(LayerSizes)}
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, dict) and set(v) <= names for v in value):
        raise wrong("layer_sizes", value, f"a list of objects with {sorted(names)}")
    for i, sizes in enumerate(value):
        for name, size in sizes.items():
            checked.in_range(f"layer_sizes[{i}].{name}", size, 1)
    return tuple(LayerSizes(**v) for v in value)


def check_config(c: ModelConfig) -> None:
    """Raise ConfigError for incompatible values."""
    for name in _REQUIRED:
        value = getattr(c, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}: got {value!r}; expected a positive integer")
    try:
        for mixer in dict.fromkeys(c.mixers):
            mixer.check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if c.topk_method not in ("noaux_tc", "greedy", "group_limited_greedy"):
        raise ConfigError(
            f"topk_method: got {c.topk_method!r}; expected noaux_tc, greedy or group_limited_greedy"
        )
    if c.scoring_func not in SCORING:
        raise ConfigError(f"scoring_func: got {c.scoring_func!r}; expected {', '.join(SCORING)}")
    if c.n_identity_experts < 0:
        raise ConfigError(f"n_identity_experts: got {c.n_identity_experts}; expected 0 or more")
    if c.shortcut_experts and c.is_moe(c.num_hidden_layers - 1):
        raise ConfigError("the last layer has experts; expected a layer after them that adds their output")
    experts = c.router_size
    if experts and not 1 <= c.num_experts_per_tok <= experts:
        raise ConfigError(
            f"num_experts_per_tok: got {c.num_experts_per_tok}; expected 1…{experts}, the number of experts"
        )
    if not experts or c.topk_method == "greedy":
        return
    if c.n_group < 1 or experts % c.n_group:
        raise ConfigError(f"n_group: got {c.n_group}; expected a divisor of n_routed_experts = {experts}")
    if c.topk_method == "noaux_tc" and experts == c.n_group > 1:
        raise ConfigError(
            f"n_group: got {c.n_group}; expected at most {experts // 2}, half of n_routed_experts: a group's "
            "score is the sum of its two best experts"
        )
    reachable = c.topk_group * (experts // c.n_group)
    if not 1 <= c.topk_group <= c.n_group or reachable < c.num_experts_per_tok:
        raise ConfigError(
            f"topk_group: got {c.topk_group}; expected 1…{c.n_group}, the n_group, with at least "
            f"num_experts_per_tok = {c.num_experts_per_tok} experts in the kept groups"
        )
