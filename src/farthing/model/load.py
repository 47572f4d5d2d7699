"""Load a checkpoint directory into a model on a backend, with all or adaptive experts per token."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.reader import Checkpoint
from farthing.lazy import torch
from farthing.model.config import ConfigError, ModelConfig
from farthing.model.decoder import DecoderModel, routers_of
from farthing.model.deepseek_v4 import DeepseekV4
from farthing.model.heads import GroupedHeads
from farthing.model.source import (
    InterleavedExperts,
    MemorySource,
    RenamedSource,
    StackedExperts,
    WeightSource,
)
from farthing.model.types import Names, type_named
from farthing.ops.api import Ops
from farthing.ops.specs import RouterSpec
from farthing.process import Progress, unseen

if TYPE_CHECKING:
    from torch import Tensor


EXPECTED = "expected 'auto', 'all' or 'adaptive:p[,min=2,max=8]' with 0 < p <= 1"


@dataclass(frozen=True, slots=True)
class AdaptiveExperts:
    """mass[i] for layer i (MTP layers included), or one value for all of them.

    `adaptive:p[,min=2,max=8]` keeps, for each token, the fewest experts whose normalized gate weights reach
    p. A checkpoint calibrated for it has one p per layer in config.json, under "adaptive_experts".
    """

    mass: tuple[float, ...]
    min_experts: int = 2
    max_experts: int | None = None

    def __post_init__(self) -> None:
        for p in self.mass:
            if not 0 < p <= 1:
                raise ConfigError(f"adaptive experts: p: got {p}; expected 0 < p <= 1")
        if self.min_experts < 1:
            raise ConfigError(f"adaptive experts: min: got {self.min_experts}; expected at least 1")
        if self.max_experts is not None and self.max_experts < self.min_experts:
            raise ConfigError(
                f"adaptive experts: max: got {self.max_experts}; expected at least min = {self.min_experts}"
            )

    @classmethod
    def parse(cls, text: str) -> AdaptiveExperts | None:
        """'all' -> None; 'adaptive:0.9,min=2,max=6' -> the rule. Raises ConfigError."""
        if text == "all":
            return None
        kind, _, rest = text.partition(":")
        first, *options = rest.split(",")
        try:
            if kind != "adaptive":
                raise ValueError
            mass = float(first)
            named = {k.strip(): int(v) for k, _, v in (o.partition("=") for o in options)}
        except ValueError:
            raise ConfigError(f"experts: got {text!r}; {EXPECTED}") from None
        if unknown := set(named) - {"min", "max"}:
            raise ConfigError(f"experts: option {sorted(unknown)[0]!r} is unknown; {EXPECTED}")
        return cls((mass,), named.get("min", 2), named.get("max"))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AdaptiveExperts | None:
        """The rule in a config.json, if any."""
        rule = raw.get("adaptive_experts")
        if rule is None:
            return None
        try:
            return cls(tuple(float(p) for p in rule["mass"]), int(rule["min"]), int(rule["max"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"config.json: adaptive_experts: got {rule!r}; expected {{mass: [p per layer], min, max}}"
            ) from error

    def to_json(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse of `from_json`."""
        most = self.max_experts or config.num_experts_per_tok
        return {"adaptive_experts": {"mass": list(self.mass), "min": self.min_experts, "max": most}}

    def routers(self, config: ModelConfig) -> list[RouterSpec | None]:
        """The routers of every layer under this rule."""
        specs = routers_of(config)
        if len(self.mass) not in (1, len(specs)):
            raise ConfigError(
                f"adaptive experts: {len(self.mass)} values of p; "
                f"expected 1 or one for each of {len(specs)} layers"
            )
        masses = self.mass if len(self.mass) > 1 else self.mass * len(specs)
        most = min(self.max_experts or config.num_experts_per_tok, config.num_experts_per_tok)
        return [
            s and replace(s, top_k=most, mass=p, min_experts=min(self.min_experts, most))
            for s, p in zip(specs, masses, strict=True)
        ]


def routers_for(config: ModelConfig, raw: Mapping[str, Any], experts: str) -> list[RouterSpec | None]:
    """The routers for `--experts`: 'auto' follows config.json, else see `AdaptiveExperts.parse`."""
    rule = AdaptiveExperts.from_json(raw) if experts == "auto" else AdaptiveExperts.parse(experts)
    return rule.routers(config) if rule else routers_of(config)


log = logging.getLogger(__name__)

# Tensors that some trainers store but that are computed here.
IGNORED = ("*.rotary_emb.inv_freq",)


def load(path: str | Path, ops: Ops, experts: str = "auto", progress: Progress = unseen) -> DecoderModel:
    """Read a Hugging Face directory onto a backend; `experts` as in `farthing.model.load`.

    Raises ConfigError, CheckpointError or FileNotFoundError, each naming what was found and expected;
    ValueError if the backend maps a packed file of another checkpoint.
    """
    checkpoint = Checkpoint.open(Path(path), arrays=ops.arrays)
    config = config_of(checkpoint)
    claim(ops, checkpoint.fingerprint(), path)
    ops.weight_files = checkpoint.files()
    if progress is not unseen:
        checkpoint.watch(progress)
    routers = routers_for(config, checkpoint.config, experts)
    model = model_of(config, ops, source_of(checkpoint, config), routers)
    _say_cache_scales(checkpoint, config)
    if ops.packed_from is None:  # otherwise most weights come from the packed file
        checkpoint.finish(ignore=IGNORED + unread(config))
    checkpoint.release()
    return model


def numpy_reads(path: Path) -> bool:
    """Whether a checkpoint is loaded into a CPU's kernels without torch."""
    return Checkpoint.open(path).plain()


def _say_cache_scales(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Log what happens to calibrated ranges of keys and values, if there are any."""
    names = [n for n in checkpoint.names() if n.endswith(("k_scale", "v_scale")) and ".self_attn." in n]
    if not names:
        return
    if not isinstance(config.attention, GroupedHeads):
        said = "are not applied, because the cache holds latents, and every row has a scale of its own"
    elif any(prod(checkpoint.shape(name)) != 1 for name in names):
        said = "are not applied, because heads have scales of their own; every row of an 8-bit cache has one"
    else:
        said = "are applied to an FP8 cache (--kv-cache-dtype fp8) and to no other"
    log.info("%s: %d scales of keys and values (k_scale, v_scale) %s", checkpoint.path, len(names), said)


def model_of(
    config: ModelConfig, ops: Ops, source: WeightSource, routers: list[RouterSpec | None] | None = None
) -> DecoderModel:
    """The model of a config, with weights under V3's names, or V4's own."""
    model = form_of(config)(config, ops, source, routers)
    ops.check_placement()
    return model


def form_of(config: ModelConfig) -> type[DecoderModel]:
    """The class of a config's model."""
    return DecoderModel if config.compressed is None else DeepseekV4


def unread(config: ModelConfig) -> tuple[str, ...]:
    """Patterns of tensors that are not computed. transformers saves projections of identity experts."""
    identities = range(config.router_size - config.n_identity_experts, config.router_size)
    names = type_named(config.model_type).names
    unused = () if names.drafts is None or config.num_nextn_predict_layers else ("mtp.*",)
    return (*names.skipped, *unused, *(f"*.experts.{e}.*" for e in identities))


def source_of(checkpoint: Checkpoint, config: ModelConfig) -> WeightSource:
    """The checkpoint's tensors under V3's names; logs once if some parts are not served."""
    names = names_in(checkpoint, config)
    if names.skipped_because:
        skipped = sum(any(fnmatchcase(n, p) for p in names.skipped) for n in checkpoint.names())
        if skipped:
            log.info("%s: %d tensors skipped: %s", checkpoint.path, skipped, names.skipped_because)
    return unstacked(checkpoint, config)


def unstacked(checkpoint: Checkpoint, config: ModelConfig) -> WeightSource:
    """The checkpoint's tensors under V3's names, single experts of stacks among them."""
    source = RenamedSource(checkpoint, names_in(checkpoint, config))
    hidden, last = config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers
    first = (next(filter(config.is_moe, each), None) for each in (range(hidden), range(hidden, last)))
    stacks = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in first]
    if not any(source.has(f"{stack}{suffix}") for stack in stacks for suffix in ("", "_blocks")):
        return source
    return InterleavedExperts(source) if config.expert_bias else StackedExperts(source)


def claim(ops: Ops, source: str, path: str | Path) -> None:
    """Set the backend's source fingerprint. Raises ValueError if its packed file has another source."""
    ops.source = source
    if ops.packed_from not in (None, "", source):
        raise ValueError(f"the packed file was made from another checkpoint than {path}; pack that one again")


def names_in(checkpoint: Checkpoint, config: ModelConfig) -> Names:
    """The tensor names of a checkpoint."""
    return type_named(config.model_type).names.used_in(checkpoint.has).in_model(config.num_hidden_layers)


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture of a checkpoint, without a declared MTP layer whose weights are missing."""
    config = ModelConfig.from_json(checkpoint.config)
    kind = type_named(config.model_type)
    names = names_in(checkpoint, config)
    mtp = names.stored(f"model.layers.{config.num_hidden_layers}.enorm.weight")
    if not config.num_nextn_predict_layers and names.drafts is not None and checkpoint.has(mtp):
        config = replace(config, num_nextn_predict_layers=1)  # of Qwen3-Next, whose config does not tell
    if config.num_nextn_predict_layers and not checkpoint.has(mtp):
        # transformers drops the MTP layer when saving a model but keeps the field.
        log.warning(
            "%s: config declares an MTP layer but has no weights for it; MTP disabled", checkpoint.path
        )
        config = replace(config, num_nextn_predict_layers=0)
    layers = range(config.num_hidden_layers)
    if kind.may_lack_router_bias and config.router_bias and any(map(config.is_moe, layers)):
        first = next(filter(config.is_moe, layers))
        bias = names.stored(f"model.layers.{first}.mlp.gate.e_score_correction_bias")
        config = replace(config, router_bias=checkpoint.has(bias))
    return config


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of a checkpoint, in forward-pass order."""
    c, d, v = config, config.hidden_size, config.vocab_size
    yield "model.embed_tokens.weight", (v, d)
    for i in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        p = f"model.layers.{i}."
        if i >= c.num_hidden_layers:
            yield p + "enorm.weight", (d,)
            yield p + "hnorm.weight", (d,)
            for name in ("e_proj", "h_proj") if c.streams else ():
                yield f"{p}{name}.weight", (d, d)
            if c.streams:
                yield from _stream_shapes(c, p + "hc_head.hc_", ends=True)
            else:
                yield p + "eh_proj.weight", (d, 2 * d)
            yield p + "shared_head.norm.weight", (d,)
        yield p + "input_layernorm.weight", (d,)
        if c.is_recurrent(i):
            assert c.recurrent is not None
            yield from c.recurrent.shapes(p + "linear_attn.", d)
        else:
            yield from c.heads(i).shapes(p + "self_attn.", d)
        if c.post_norms:
            yield p + "self_attn.post_norm.weight", (d,)
        if c.has_indexer(i):
            yield from _indexer_shapes(c, p + "self_attn.indexer.")
        yield p + "post_attention_layernorm.weight", (d,)
        yield from _feed_forward_shapes(c.at(i), p + "mlp.", c.is_moe(i), i in c.hashed_layers)
        for half in ("attn_hc.", "ffn_hc.") if c.streams else ():
            yield from _stream_shapes(c, p + half)
        if c.layer_scalar:
            yield p + "layer_scalar", (1,)
    if c.streams:
        yield from _stream_shapes(c, "model.hc_head.hc_", ends=True)
    yield "model.norm.weight", (d,)
    if not c.tie_word_embeddings:
        yield "lm_head.weight", (v, d)


def _indexer_shapes(c: ModelConfig, p: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    assert c.latent.q_lora_rank is not None
    yield p + "wq_b.weight", (c.index_n_heads * c.index_head_dim, c.latent.q_lora_rank)
    yield p + "wk.weight", (c.index_head_dim, c.hidden_size)
    yield p + "k_norm.weight", (c.index_head_dim,)
    yield p + "k_norm.bias", (c.index_head_dim,)
    yield p + "weights_proj.weight", (c.index_n_heads, c.hidden_size)


def _stream_shapes(c: ModelConfig, p: str, ends: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    assert c.streams is not None
    n = c.streams.count
    rows = n if ends else n * (n + 2)
    yield p + "fn", (rows, n * c.hidden_size)
    yield p + "base", (rows,)
    yield p + "scale", (1 if ends else 3,)


def _feed_forward_shapes(
    c: ModelConfig, p: str, moe: bool, hashed: bool = False
) -> Iterator[tuple[str, tuple[int, ...]]]:
    d = c.hidden_size

    def gated(prefix: str, i: int, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in (("gate_proj", (i, d)), ("up_proj", (i, d)), ("down_proj", (d, i))):
            yield f"{prefix}{name}.weight", shape
            if bias:
                yield f"{prefix}{name}.bias", shape[:1]

    if not moe or c.shortcut_experts or c.parallel_mlp:
        yield from gated(p, c.intermediate_size)
    if c.post_norms or (moe and c.post_mlp_norm):
        yield p + "post_mlp_layernorm.weight", (d,)
    if not moe:
        return
    if c.parallel_mlp:
        for name in ("expert_norm", "dense_post_norm", "expert_post_norm"):
            yield f"{p}{name}.weight", (d,)
    assert c.n_routed_experts is not None
    yield p + "gate.weight", (c.router_size, d)
    if hashed:
        yield p + "gate.tid2eid", (c.vocab_size, c.num_experts_per_tok)
    elif c.has_router_bias:
        yield p + "gate.e_score_correction_bias", (c.router_size,)
    if c.expert_bias:
        yield p + "gate.bias", (c.router_size,)
    if c.scaled_router:
        yield p + "gate.input_scale", (d,)
        yield p + "gate.expert_scale", (c.router_size,)
    for e in range(c.n_routed_experts):
        yield from gated(f"{p}experts.{e}.", c.moe_intermediate_size, c.expert_bias)
    if c.n_shared_experts:
        yield from gated(p + "shared_experts.", c.shared_size)
        if c.shared_gate:
            yield p + "shared_expert_gate.weight", (1, d)


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 parameters of plausible scale, for tests and benchmarks."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in parameter_shapes(config):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("tid2eid"):
            ranks = torch.rand(shape[0], config.router_size, generator=generator)
            parameters[name] = ranks.argsort()[:, : shape[1]]
        elif name.endswith(("bias", "A_log", "base")):
            parameters[name] = 0.1 * noise
        elif "norm" in name or name.endswith("scale") or name.endswith("scalar"):
            offset = 0.0 if ".linear_attn." in name else config.norm_offset
            parameters[name] = 1 - offset + 0.1 * noise
        elif name == "model.embed_tokens.weight":
            parameters[name] = noise
        else:
            parameters[name] = noise / math.sqrt(shape[-1])
    return parameters


def random_model(
    config: ModelConfig, ops: Ops, seed: int = 0, routers: list[RouterSpec | None] | None = None
) -> DecoderModel:
    """A model with random weights, without any files."""
    return model_of(config, ops, MemorySource(random_parameters(config, seed)), routers)
