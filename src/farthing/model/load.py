"""Load a checkpoint directory into a model on a backend, with all or adaptive experts per token."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from farthing.checkpoint.reader import Checkpoint
from farthing.model.config import ConfigError, ModelConfig
from farthing.model.decoder import DecoderModel, routers_of
from farthing.model.deepseek_v4 import DeepseekV4
from farthing.model.parameters import random_parameters, tensors_of
from farthing.model.source import (
    InterleavedExperts,
    MemorySource,
    RenamedSource,
    StackedExperts,
    WeightSource,
)
from farthing.model.spec import COMPRESSED
from farthing.model.types import Names, type_named
from farthing.ops.api import Ops
from farthing.ops.specs import RouterSpec
from farthing.process import Progress, unseen

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

    @property
    def leaves_out(self) -> bool:
        """Whether a token may have fewer than the most experts."""
        return min(self.mass) < 1 and (self.max_experts is None or self.min_experts < self.max_experts)

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
    if not config.attention.scaled_keys:
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
    return DecoderModel if config.streams is None else DeepseekV4


def unread(config: ModelConfig) -> tuple[str, ...]:
    """Patterns of tensors that are not computed. transformers saves projections of identity experts."""
    identities = range(config.n_routed_experts, config.router_size)
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
    names = names_in(checkpoint, config)
    source = RenamedSource(checkpoint, names)
    checkpoint.input_scales.alike = _sharing(config, names)
    hidden, last = config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers
    first = (next(filter(config.is_moe, each), None) for each in (range(hidden), range(hidden, last)))
    stacks = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in first]
    if not any(source.has(f"{stack}{suffix}") for stack in stacks for suffix in ("", "_blocks")):
        return source
    biased = config.experts is not None and config.experts.biased
    return InterleavedExperts(source) if biased else StackedExperts(source)


def _sharing(config: ModelConfig, names: Names) -> Callable[[str], str]:
    """Of a stored module, a name for what it reads (`InputScales`)."""

    @cache
    def known() -> dict[str, str]:
        matrices = (t for t in tensors_of(config) if t.role in COMPRESSED)
        return {names.stored(t.name).removesuffix(".weight"): t.scaled_with for t in matrices}

    return lambda module: known().get(module, module)


def claim(ops: Ops, source: str, path: str | Path) -> None:
    """Set the backend's source fingerprint. Raises ValueError if its packed file has another source."""
    ops.source = source
    if ops.packed_from not in (None, "", source):
        raise ValueError(f"the packed file was made from another checkpoint than {path}; pack that one again")


def names_in(checkpoint: Checkpoint, config: ModelConfig) -> Names:
    """The tensor names of a checkpoint."""
    return type_named(config.model_type).names.used_in(checkpoint.has).in_model(config.num_hidden_layers)


def stores_head(checkpoint: Checkpoint, names: Names) -> bool:
    """Whether the output head is a tensor of its own. Some names have the embedding's in its place."""
    head = names.stored("lm_head.weight")
    return head != names.stored("model.embed_tokens.weight") and checkpoint.has(head)


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture of a checkpoint, without a declared MTP layer whose weights are missing."""
    config = ModelConfig.from_json(checkpoint.config)
    kind = type_named(config.model_type)
    names = names_in(checkpoint, config)
    if config.head.tie_word_embeddings and stores_head(checkpoint, names):  # it is used, as by transformers
        config = replace(config, head=replace(config.head, tie_word_embeddings=False))
    mtp = names.stored(f"model.layers.{config.num_hidden_layers}.enorm.weight")
    if not config.num_nextn_predict_layers and names.drafts is not None and checkpoint.has(mtp):
        config = replace(config, num_nextn_predict_layers=1)  # of Qwen3-Next, whose config does not tell
    if config.num_nextn_predict_layers and not checkpoint.has(mtp):
        # transformers drops the MTP layer when saving a model but keeps the field.
        log.warning(
            "%s: config declares an MTP layer but has no weights for it; MTP disabled", checkpoint.path
        )
        config = replace(config, num_nextn_predict_layers=0)
    corrected = config.experts is not None and config.experts.corrected
    if kind.may_lack_router_bias and corrected and config.moe_layers:
        bias = names.stored(f"model.layers.{config.dense_prefix}.mlp.gate.e_score_correction_bias")
        config = config.with_experts(corrected=checkpoint.has(bias))
    return config


def random_model(
    config: ModelConfig, ops: Ops, seed: int = 0, routers: list[RouterSpec | None] | None = None
) -> DecoderModel:
    """A model with random weights, without any files."""
    return model_of(config, ops, MemorySource(random_parameters(config, seed)), routers)
