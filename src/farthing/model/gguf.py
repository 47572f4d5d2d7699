"""Open a GGUF file as a model directory: configuration, tokenizer and an index of its tensors.

The directory is written once per file, below the user's cache directory; weights stay in the file. All that
reads a model directory then reads GGUF.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

from farthing.checkpoint.gguf import ARCHITECTURES, COMPUTED, INDEX, ValueHeads, describe
from farthing.checkpoint.shards import CheckpointError
from farthing.files import replace_json, replace_text
from farthing.lazy import gguf, np
from farthing.model.attention import frequencies
from farthing.model.config import ModelConfig
from farthing.model.fields import ConfigError, read_rope
from farthing.quants import parts_of
from farthing.tokenizer_gguf import led_by, stops_apart, tokenizer_of

_VERSION = 5  # of the directory's contents; those of another version are written again
ENDS = ("eos", "eot", "eom")  # tokens that end an answer
# By SamplingParams' names: the metadata, and what llama.cpp takes where a file does not state it.
SAMPLING: Mapping[str, tuple[str, float]] = {
    "temperature": ("general.sampling.temp", 0.8),
    "top_k": ("general.sampling.top_k", 40),
    "top_p": ("general.sampling.top_p", 0.95),
    "min_p": ("general.sampling.min_p", 0.05),
}
_MOST_VALUES, _MOST_TENSORS = 1 << 23, 1 << 17  # the largest vocabularies have 2**18 tokens
_MOST_LAYERS = 4096
_NEAR = 1e-3  # relative difference of stored rotary factors, float32, to those computed
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def open_gguf(path: Path, system: str = "", generation: Mapping[str, Any] | None = None) -> Path:
    """The model directory of a GGUF file, or of all files of a split one. Raises CheckpointError or
    ConfigError, each naming the file and what is accepted.

    system: the first turn of conversations that bring none. generation: what is added to
    generation_config.json.
    """
    files = _parts_of(path.absolute())  # not where links of the hub's cache point to
    target = _place(files, *([system, generation] if system or generation else []))
    if target.is_dir():
        return target
    readers = [_opened(file) for file in files]
    fields = {name: field.contents for name, field in readers[0].fields.items()}
    metadata = Metadata(files[0], fields)
    tensors: dict[str, dict[str, Any]] = {}
    factors = None
    for file, reader in zip(files, readers, strict=True):
        tensors |= dict(
            describe(
                reader.tensors,
                file,
                metadata.architecture,
                metadata.heads,
                metadata.layers(),
                metadata.value_heads(),
                metadata.whole("block_count"),
            )
        )
        factors = next((t.data for t in reader.tensors if t.name in COMPUTED), factors)
    try:
        config = config_of(metadata, tensors, factors)
        ModelConfig.from_json(config)
    except ConfigError as error:
        where = str(files[0])
        raise (error if str(error).startswith(where) else metadata.error(str(error))) from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise metadata.error(f"metadata: expected that of {metadata.architecture!r}: {error}") from None
    backend, described = tokenizer_of(str(files[0]), metadata.tokenizer())
    ends = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS} - {None}
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(dir=target.parent, prefix=".making-"))
    try:
        replace_json(draft / "config.json", config)
        replace_json(draft / INDEX, tensors, indent=None)
        replace_text(draft / "tokenizer.json", backend.to_str())
        replace_json(draft / "tokenizer_config.json", led_by(system, described))
        sampling = {name: _shortest(metadata.get(*stated)) for name, stated in SAMPLING.items()}
        eos = {"eos_token_id": sorted(ends)} if ends else {}
        given = stops_apart(dict(generation or {}), backend)
        replace_json(draft / "generation_config.json", sampling | eos | given)
        draft.chmod(0o755)
        draft.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def described_in(path: Path) -> Path | None:
    """The model directory that `open_gguf` made of a file; None: it made none, or another part is missing."""
    try:
        target = _place(_parts_of(path.absolute()))
    except (OSError, ValueError):
        return None
    return target if target.is_dir() else None


def _place(files: Sequence[Path], *added: Any) -> Path:
    return _cache() / f"{files[0].stem}-{_digest(files, *added)}"


class Metadata:
    """The key-value fields of a file: functions that return their values."""

    def __init__(self, file: Path, fields: Mapping[str, Callable[[], Any]]) -> None:
        self._file, self._fields = file, fields
        self.architecture = str(self.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise self.error(
                f"general.architecture: got {self.architecture[:80]!r}; expected one of "
                f"{', '.join(ARCHITECTURES)} (other models: their Hugging Face directory with safetensors)"
            )

    def error(self, message: str) -> ConfigError:
        """An error with the file's name in front."""
        return ConfigError(f"{self._file}: {message}")

    def get(self, name: str, default: Any = None) -> Any:
        """A field by its full name."""
        field = self._fields.get(name)
        try:
            return default if field is None else field()
        except UnicodeDecodeError as error:
            raise self.error(f"{name}: expected UTF-8: {error}") from None

    def own(self, name: str, default: Any = None) -> Any:
        """A field of the architecture."""
        return self.get(f"{self.architecture}.{name}", default)

    def whole(self, name: str) -> int:
        """A field of the architecture that must be one whole number."""
        value = self.own(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{self.architecture}.{name}: got {value!r}; expected a whole number above 0")
        return value

    def heads(self, name: str) -> int:
        """A count of heads; that of keys may be absent."""
        missing = name.endswith("_kv") and self.own(name) is None
        if isinstance(self.own(name), list):  # of each layer, for the type to read
            return 1
        return self.whole("attention.head_count" if missing else name)

    def layers(self) -> int:
        """How many layers are read: all but those of MTP."""
        if (count := self.whole("block_count")) > _MOST_LAYERS:
            raise self.error(f"{self.architecture}.block_count: got {count}; expected at most {_MOST_LAYERS}")
        return count - int(self.own("nextn_predict_layers", 0))

    def value_heads(self) -> ValueHeads | None:
        """Of a recurrence, if the architecture has one."""
        if self.own("ssm.time_step_rank") is None:
            return None
        values, keys = self.whole("ssm.time_step_rank"), self.whole("ssm.group_count")
        width = self.whole("ssm.inner_size") // values
        return ValueHeads(keys, values // keys, self.whole("ssm.state_size"), width)

    def tokenizer(self) -> dict[str, Any]:
        """The fields of the tokenizer, without their prefixes."""
        fields = {n: self.get(n) for n in self._fields if n.startswith("tokenizer.")}
        return {n.removeprefix("tokenizer.").removeprefix("ggml."): value for n, value in fields.items()}


def _experts(m: Metadata, count: str) -> dict[str, Any]:
    return {count: m.whole("expert_count"), "num_experts_per_tok": m.whole("expert_used_count")}


def _llama(m: Metadata) -> dict[str, Any]:
    if not m.own("expert_count"):
        return {"model_type": "llama"}
    return {"model_type": "mixtral", **_experts(m, "num_local_experts")}


def _typed(model_type: str) -> Callable[[Metadata], dict[str, Any]]:
    """Of an architecture without fields of its own."""
    return lambda m: {"model_type": model_type}


def _qwen2moe(m: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        **_experts(m, "num_experts"),
        "moe_intermediate_size": m.whole("expert_feed_forward_length"),
        "shared_expert_intermediate_size": m.whole("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,  # llama.cpp never does
    }


def _olmoe(m: Metadata) -> dict[str, Any]:
    return {"model_type": "olmoe", **_experts(m, "num_experts"), "norm_topk_prob": False}


def _smollm3(m: Metadata) -> dict[str, Any]:
    return {"model_type": "smollm3", "no_rope_layer_interval": 4}  # as llama.cpp takes for granted


def _granite(m: Metadata) -> dict[str, Any]:
    named = {
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "attention_multiplier": "attention.scale",
        "logits_scaling": "logit_scale",
    }
    found = {ours: _shortest(m.own(theirs)) for ours, theirs in named.items() if m.own(theirs)}
    if not m.own("expert_count"):
        return {"model_type": "granite", **found}
    return {"model_type": "granitemoe", **_experts(m, "num_local_experts"), **found}


def _qwen3moe(m: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        **_experts(m, "num_experts"),
        "moe_intermediate_size": m.whole("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp always does
    }


def _v3_experts(m: Metadata) -> dict[str, Any]:
    return {
        **_experts(m, "n_routed_experts"),
        "moe_intermediate_size": m.whole("expert_feed_forward_length"),
        "n_shared_experts": m.own("expert_shared_count") or 0,
        "first_k_dense_replace": m.own("leading_dense_block_count", 0),
        "routed_scaling_factor": _shortest(m.own("expert_weights_scale", 1.0)),
        "norm_topk_prob": bool(m.own("expert_weights_norm", False)),
        "n_group": m.own("expert_group_count") or 1,
        "topk_group": m.own("expert_group_used_count") or 1,
        "num_nextn_predict_layers": 0,
    }


def _deepseek2(m: Metadata) -> dict[str, Any]:
    """V2's softmax or V3's sigmoid. Lengths of keys and values are those of latents, in files with `_mla` of
    heads."""
    sigmoid, rotated = m.own("expert_gating_func", 1) == 2, m.whole("rope.dimension_count")
    grouped = (m.own("expert_group_count") or 1) > 1
    key, value = (
        m.own(f"attention.{n}_length_mla") or m.whole(f"attention.{n}_length") for n in ("key", "value")
    )
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "head_dim": None,
        "num_key_value_heads": m.heads("attention.head_count"),
        "q_lora_rank": m.own("attention.q_lora_rank") or None,
        "kv_lora_rank": m.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": value,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy" if grouped else "greedy",
        **_v3_experts(m),
    }


def _dots1(m: Metadata) -> dict[str, Any]:
    return {"model_type": "dots1", **_v3_experts(m), "layer_types": ["full_attention"] * m.layers()}


def _glm4moe(m: Metadata) -> dict[str, Any]:
    share = m.whole("rope.dimension_count") / m.whole("attention.key_length")
    return {"model_type": "glm4_moe", "partial_rotary_factor": share, **_v3_experts(m)}


def _minimax_m2(m: Metadata) -> dict[str, Any]:
    return {
        "model_type": "minimax_m2",
        **_experts(m, "num_local_experts"),
        "intermediate_size": m.own("expert_feed_forward_length") or m.whole("feed_forward_length"),
        "rotary_dim": m.whole("rope.dimension_count"),
    }


def _qwen35moe(m: Metadata) -> dict[str, Any]:
    return {
        **_qwen35(m),
        "model_type": "qwen3_5_moe_text",
        **_experts(m, "num_experts"),
        "moe_intermediate_size": m.whole("expert_feed_forward_length"),
        "shared_expert_intermediate_size": m.whole("expert_shared_feed_forward_length"),
        "intermediate_size": None,
    }


def _qwen35(m: Metadata) -> dict[str, Any]:
    values = m.whole("ssm.time_step_rank")
    return {
        "model_type": "qwen3_5_text",
        "partial_rotary_factor": m.whole("rope.dimension_count") / m.whole("attention.key_length"),
        "linear_conv_kernel_dim": m.whole("ssm.conv_kernel"),
        "linear_key_head_dim": m.whole("ssm.state_size"),
        "linear_num_key_heads": m.whole("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": m.whole("ssm.inner_size") // values,
    }


def _gpt_oss(m: Metadata) -> dict[str, Any]:
    width = m.own("expert_feed_forward_length") or m.whole("feed_forward_length")
    return {
        "model_type": "gpt_oss",
        **_experts(m, "num_local_experts"),
        "intermediate_size": width,
        "sliding_window": m.whole("attention.sliding_window"),
    }


def _sliding(m: Metadata) -> list[str]:
    """layer_types: the pattern is a distance, or one flag per layer."""
    pattern, layers = m.own("attention.sliding_window_pattern", 6), range(m.layers())
    slides = pattern if isinstance(pattern, list) else [bool((i + 1) % pattern) for i in layers]
    if len(slides) < len(layers):
        raise m.error(f"attention.sliding_window_pattern: expected a flag for each of {len(layers)} layers")
    return ["sliding_attention" if slides[i] else "full_attention" for i in layers]


def _gemma(m: Metadata) -> dict[str, Any]:
    return {
        "sliding_window": m.whole("attention.sliding_window"),
        "layer_types": _sliding(m),
        "final_logit_softcapping": m.own("final_logit_softcapping"),
        "rope_local_base_freq": _shortest(m.own("rope.freq_base_swa", 10000.0)),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma3(m: Metadata) -> dict[str, Any]:
    """llama.cpp knows the largest model, whose scores have another scale, by its layers."""
    wide = m.whole("embedding_length") // m.heads("attention.head_count")
    scale = wide if m.layers() == _LAYERS_OF_27B else m.whole("attention.key_length")
    return {"model_type": "gemma3_text", "query_pre_attn_scalar": scale, **_gemma(m)}


_LAYERS_OF_27B = 62


def _gemma4(m: Metadata) -> dict[str, Any]:
    found = _gemma(m)
    counts = m.own("attention.head_count_kv")
    counts = counts if isinstance(counts, list) else [counts] * m.layers()
    groups = {kind: int(n) for kind, n in zip(found["layer_types"], counts, strict=False)}
    local = m.whole("attention.key_length_swa")
    if m.own("rope.dimension_count_swa", local) != local:
        raise m.error("rope.dimension_count_swa: expected attention.key_length_swa")
    mixture: dict[str, Any] = {"enable_moe_block": False}
    if m.own("expert_count"):
        width = m.own("expert_feed_forward_length")
        mixture = {
            "enable_moe_block": True,
            "num_experts": m.whole("expert_count"),
            "top_k_experts": m.whole("expert_used_count"),
            "moe_intermediate_size": width[0] if isinstance(width, list) else width,
        }
    return {
        "model_type": "gemma4_text",
        **found,
        **mixture,
        "head_dim": local,
        "global_head_dim": m.whole("attention.key_length"),
        "num_key_value_heads": groups.get("sliding_attention", counts[0]),
        "num_global_key_value_heads": groups.get("full_attention"),
        "hidden_size_per_layer_input": m.own("embedding_length_per_layer_input", 0),
        "num_kv_shared_layers": m.own("attention.shared_kv_layers", 0),
    }


_FIELDS: dict[str, Callable[[Metadata], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _typed("qwen2"),
    "qwen2moe": _qwen2moe,
    "qwen3": _typed("qwen3"),
    "smollm3": _smollm3,
    "granite": _granite,
    "granitemoe": _granite,
    "olmoe": _olmoe,
    "seed_oss": _typed("seed_oss"),
    "dots1": _dots1,
    "qwen3moe": _qwen3moe,
    "deepseek2": _deepseek2,
    "glm4moe": _glm4moe,
    "minimax-m2": _minimax_m2,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35moe,
    "qwen3next": _qwen35moe,  # described without fused projections
    "gpt-oss": _gpt_oss,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
}
_PARTLY_ROTATED = ("deepseek2", "glm4moe", "minimax-m2", "qwen35", "qwen35moe", "qwen3next")


def config_of(m: Metadata, tensors: Mapping[str, Mapping[str, Any]], factors: Any) -> dict[str, Any]:
    """config.json of a file."""
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise m.error("token_embd.weight is missing; expected a GGUF file of a whole model")
    heads, width = m.heads("attention.head_count"), m.whole("embedding_length")
    head = int(m.own("attention.key_length") or m.own("rope.dimension_count") or width // heads)
    whole = m.own("rope.dimension_count", head) == head and m.own("attention.value_length", head) == head
    if (found := list(embedding["shape"]))[1:] != [width]:
        raise m.error(f"token_embd.weight: found shape {found}; expected embedding_length = {width} columns")
    query = tensors.get("model.layers.0.self_attn.q_proj.weight")
    if query is not None and head > query["shape"][0]:
        raise m.error(f"attention.key_length, rope.dimension_count: got {head}; expected the width of a head")
    if m.architecture not in _PARTLY_ROTATED and not whole:
        raise m.error("rope.dimension_count, attention.value_length: expected the width of a head")
    config: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": m.own("feed_forward_length"),
        "num_hidden_layers": m.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": m.heads("attention.head_count_kv"),
        "head_dim": head,
        "rms_norm_eps": _shortest(m.own("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(m.own("rope.freq_base", 10000.0)),
        "max_position_embeddings": m.whole("context_length"),
        "vocab_size": embedding["shape"][0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "bfloat16",
        **_FIELDS[m.architecture](m),
    }
    for field, module in (("attention_bias", "q_proj"), ("attention_out_bias", "o_proj")):
        config[field] = any(name.endswith(f"{module}.bias") for name in tensors)
    config["qkv_bias"] = config["attention_bias"]
    if m.value_heads() is not None:
        recurrent = [f"model.layers.{i}.linear_attn.in_proj_qkv.weight" in tensors for i in range(m.layers())]
        config["layer_types"] = ["linear_attention" if r else "full_attention" for r in recurrent]
    if m.architecture == "glm4moe" and any(name.endswith("q_norm.weight") for name in tensors):
        config["use_qk_norm"] = True
    if m.architecture == "gemma4":
        full = [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
        values = (f"model.layers.{i}.self_attn.v_proj.weight" in tensors for i in full)
        config["attention_k_eq_v"] = not any(values)
        config["rope_parameters"] = _proportional(config, factors)
        factors = None
    stated = {name: value for name, value in config.items() if value is not None or name == "q_lora_rank"}
    return stated | {"rope_scaling": _scaling(m, stated, head, factors)}


def _proportional(config: Mapping[str, Any], factors: Any) -> dict[str, Any]:
    """rope_parameters of Gemma 4: pairs that do not turn have a factor without bounds."""
    stored = np.ones(1) if factors is None else np.asarray(factors).reshape(-1)
    share = float((stored == 1).mean())
    full = {"rope_type": "proportional", "partial_rotary_factor": share, "rope_theta": config["rope_theta"]}
    local = {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
    return {"full_attention": full, "sliding_attention": local}


def _scaling(m: Metadata, config: Mapping[str, Any], head: int, factors: Any) -> dict[str, Any]:
    """rope_scaling. Llama 3.1's is stored as one factor per pair, of which its fields are found again."""
    if factors is not None:
        stored = np.asarray(factors, np.float32).reshape(-1)
        llama3 = {"rope_type": "llama3", "factor": float(stored.max()), **_LLAMA3}
        plain = {"rope_theta": config["rope_theta"]}
        scaled = frequencies(read_rope({**plain, "rope_scaling": llama3}), head)
        computed = frequencies(read_rope(plain), head) / scaled
        if computed.shape != stored.shape or not np.allclose(computed, stored, rtol=_NEAR):
            raise m.error(f"{COMPUTED[0]}: expected the rotary factors of Llama 3.1 to 3.3")
        return llama3
    kind = m.own("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise m.error(f"rope.scaling.type: got {kind!r}; expected none, linear or yarn")
    original = m.own("rope.scaling.original_context_length")
    context: dict[str, Any] = {"original_max_position_embeddings": original} if original else {}
    betas = {name: _shortest(m.own(f"rope.scaling.yarn_{name}")) for name in ("beta_fast", "beta_slow")}
    context |= {name: beta for name, beta in betas.items() if beta is not None}
    if m.architecture == "gpt-oss":
        context["truncate"] = False
    if log_multiplier := m.own("rope.scaling.yarn_log_multiplier"):  # latent attention: a tenth of it
        context |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * log_multiplier, 6))
    return {"rope_type": kind, "factor": m.own("rope.scaling.factor"), **context}


def _shortest(value: Any) -> Any:
    """A float32 as its shortest decimal: 1e-6, not 9.99999997e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _parts_of(path: Path) -> Sequence[Path]:
    """All files of a model of which `path` is one."""
    files = [path.with_name(name) for name in parts_of(path.name)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{path}: {missing[0]} is missing; expected all {len(files)} parts beside it")
    return files


def _opened(file: Path) -> Any:
    try:
        reader = _bounded()(file)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the library raises whatever a damaged header leads to
        raise CheckpointError(f"{file}: not a whole GGUF file; get it again: {_printable(error)}") from error
    if reader.byte_order == "S":
        raise CheckpointError(f"{file}: found the byte order of other machines; expected this one's")
    return reader


@cache
def _bounded() -> Any:
    """The library's reader goes on where a file has ended, and reads every number of an array by itself."""

    class Bounded(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"has {len(self.data):,} bytes, and a field or tensor ends at {end:,}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
            kind, count, start = int(head[0][0]), int(head[1][0]), orig_offs + 12
            _at_most(_MOST_VALUES, "values of an array", count)
            types, plain = [gguf.GGUFValueType.ARRAY, kind], cast("dict[int, Any]", self.gguf_scalar_to_np)
            if (dtype := plain.get(kind)) is not None:
                values = self._get(start, dtype, count)
                return 12 + values.nbytes, [*head, values], [2], types
            if kind == gguf.GGUFValueType.STRING and self.byte_order == "I":
                end, strings = _strings(self.data, start, count)
                return end - orig_offs, head + strings, range(2, 2 + count), types
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            _at_most(_MOST_TENSORS, "tensors", count)
            end, fields = super()._build_tensor_info(offs, count)
            for field in fields:
                kind, elements = int(field.parts[4][0]), prod(map(int, field.parts[3]))
                if kind not in set(gguf.GGMLQuantizationType):
                    raise ValueError(f"{field.name[:80]} has type {kind}, which the library gguf lacks")
                if elements > 8 * len(self.data):  # no type has less than a bit
                    raise ValueError(f"{field.name[:80]} has {elements:,} values, more than its bytes")
            return end, fields

    return Bounded


def _strings(data: Any, at: int, count: int) -> tuple[int, list[Any]]:
    """(where they end, the bytes of each) of an array's strings, each after its length."""
    data, found = data.view(np.ndarray), []  # slices of a memory map cost several times as much
    unpack = struct.Struct("=Q").unpack_from
    for _ in range(count):
        start = at + 8
        at = start + unpack(data, at)[0]
        if at > len(data):
            raise ValueError(f"has {len(data):,} bytes, and a text ends at {at:,}")
        found.append(data[start:at])
    return at, found


def _printable(text: object) -> str:
    return repr(str(text)[:200])[1:-1]


def _at_most(most: int, what: str, count: int) -> None:
    if count > most:
        raise ValueError(f"has {int(count):,} {what}; expected at most {most:,}")


def header_size(file: Path) -> int:
    """Bytes before the tensors. Of a file that ends earlier and continues with zeros, at least as many as it
    has: what is read of those cannot come before them."""
    try:
        return int(_opened(file).data_offset)
    except CheckpointError:
        return file.stat().st_size


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farthing" / "gguf"


def _digest(files: Sequence[Path], *added: Any) -> str:
    """Of the files' places, sizes and times, and of what is added to what they say."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([_VERSION, stats, *added]).encode()).hexdigest()[:16]
