"""Write a model with DeepSeek sparse attention as a GGUF file for ik_llama.cpp, architecture `glm-dsa`.

    pip install gguf
    python bench/glm_dsa_gguf.py MODEL OUT.gguf [--type q4_0]

MODEL is a checkpoint of type glm_moe_dsa. The vocabulary is nominal (one made-up piece per token): prompts
must be sent as token ids. ik_llama.cpp fixes which layers have an indexer (0, 1, and every fourth from 2) and
has no YaRN for this architecture; a model that needs another rule is rejected. MTP layers are left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy
from torch import Tensor

from farthing.checkpoint.reader import Checkpoint
from farthing.model.config import ModelConfig
from farthing.model.forms import Index
from farthing.model.load import config_of, source_of
from farthing.model.source import WeightSource

SIGMOID = 2  # the router's scoring function, as ik_llama.cpp numbers it
NORMAL, CONTROL = 1, 3  # kinds of tokens


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file: its parts in the source, stacked if there are several."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType


def _index(c: ModelConfig) -> Index:
    assert c.index is not None
    return c.index


def rejected(c: ModelConfig) -> str | None:
    """Why `glm-dsa` cannot represent a model; None if it can."""
    full = [i <= 1 or i % 4 == 2 for i in range(c.num_hidden_layers)]
    if c.index_topk is None or not _index(c).interleaved or c.latent.q_lora_rank is None:
        return f"{c.model_type}: expected glm_moe_dsa (an indexer that rotates interleaved pairs)"
    if [c.has_indexer(i) for i in range(c.num_hidden_layers)] != full:
        own = [i for i in range(c.num_hidden_layers) if c.has_indexer(i)]
        return f"indexer_types: got full at layers {own}; expected 0, 1, 2, 6, 10, …"
    if c.rope.factor is not None or not c.rope.interleaved:
        return f"rope: got {c.rope}; expected plain interleaved rotation"
    if c.n_group != 1 or c.scoring_func != "sigmoid" or not c.has_router_bias or c.tie_word_embeddings:
        return "expected one group of experts, a sigmoid router with a bias, and an untied head"
    return None


def entries(c: ModelConfig, kind: Any) -> Iterator[Entry]:
    """Every tensor of the file. Norms and routers are float32; k_b and v_b have at least 8 bits, as the peer
    stores them when it derives them itself."""
    f32, d = gguf.GGMLQuantizationType.F32, c.hidden_size
    heads, nope, latent = c.num_attention_heads, c.latent.qk_nope_head_dim, c.latent.kv_lora_rank
    absorbed = kind if kind == f32 else gguf.GGMLQuantizationType.Q8_0
    assert c.latent.q_lora_rank is not None

    def one(name: str, part: str, shape: tuple[int, ...], to: Any = kind) -> Entry:
        return Entry(name, (part,), shape, to)

    yield one("token_embd.weight", "model.embed_tokens.weight", (c.vocab_size, d))
    yield one("output_norm.weight", "model.norm.weight", (d,), f32)
    yield one("output.weight", "lm_head.weight", (c.vocab_size, d))
    for i in range(c.num_hidden_layers):
        b, p = f"blk.{i}.", f"model.layers.{i}."
        a = p + "self_attn."
        yield one(b + "attn_norm.weight", p + "input_layernorm.weight", (d,), f32)
        yield one(b + "attn_q_a.weight", a + "q_a_proj.weight", (c.latent.q_lora_rank, d))
        yield one(b + "attn_q_a_norm.weight", a + "q_a_layernorm.weight", (c.latent.q_lora_rank,), f32)
        yield one(
            b + "attn_q_b.weight", a + "q_b_proj.weight", (heads * c.latent.qk_head_dim, c.latent.q_lora_rank)
        )
        yield one(b + "attn_kv_a_mqa.weight", a + "kv_a_proj_with_mqa.weight", (c.latent.cache_width, d))
        yield one(b + "attn_kv_a_norm.weight", a + "kv_a_layernorm.weight", (latent,), f32)
        yield one(b + "attn_k_b.weight", a + "kv_b_proj.weight", (heads, latent, nope), absorbed)
        yield one(
            b + "attn_v_b.weight", a + "kv_b_proj.weight", (heads, c.latent.v_head_dim, latent), absorbed
        )
        yield one(b + "attn_output.weight", a + "o_proj.weight", (d, heads * c.latent.v_head_dim))
        if c.has_indexer(i):
            yield from _indexer(c, b + "indexer.", a + "indexer.", kind)
        yield one(b + "ffn_norm.weight", p + "post_attention_layernorm.weight", (d,), f32)
        yield from (
            _experts(c, b, p + "mlp.", kind)
            if c.is_moe(i)
            else _mlp(b, "", p + "mlp.", d, c.intermediate_size, kind)
        )


def _indexer(c: ModelConfig, b: str, p: str, kind: Any) -> Iterator[Entry]:
    f32, d, width = gguf.GGMLQuantizationType.F32, c.hidden_size, _index(c).width
    assert c.latent.q_lora_rank is not None
    yield Entry(
        b + "attn_q_b.weight", (p + "wq_b.weight",), (_index(c).heads * width, c.latent.q_lora_rank), kind
    )
    yield Entry(b + "attn_k.weight", (p + "wk.weight",), (width, d), kind)
    yield Entry(b + "proj.weight", (p + "weights_proj.weight",), (_index(c).heads, d), kind)
    for part in ("weight", "bias"):
        yield Entry(f"{b}k_norm.{part}", (f"{p}k_norm.{part}",), (width,), f32)


def _mlp(b: str, suffix: str, p: str, d: int, width: int, kind: Any) -> Iterator[Entry]:
    for part, shape in (("gate", (width, d)), ("up", (width, d)), ("down", (d, width))):
        yield Entry(f"{b}ffn_{part}{suffix}.weight", (f"{p}{part}_proj.weight",), shape, kind)


def _experts(c: ModelConfig, b: str, p: str, kind: Any) -> Iterator[Entry]:
    f32, d, e, width = gguf.GGMLQuantizationType.F32, c.hidden_size, c.router_size, c.moe_intermediate_size
    yield Entry(b + "ffn_gate_inp.weight", (p + "gate.weight",), (e, d), f32)
    yield Entry(b + "exp_probs_b.bias", (p + "gate.e_score_correction_bias",), (e,), f32)
    for part, shape in (("gate", (width, d)), ("up", (width, d)), ("down", (d, width))):
        parts = tuple(f"{p}experts.{j}.{part}_proj.weight" for j in range(e))
        yield Entry(f"{b}ffn_{part}_exps.weight", parts, (e, *shape), kind)
    yield from _mlp(b, "_shexp", p + "shared_experts.", d, c.shared_size, kind)


def _read(part: str, shape: tuple[int, ...], c: ModelConfig, source: WeightSource) -> Tensor:
    if part.endswith("kv_b_proj.weight"):
        heads, nope, latent = c.num_attention_heads, c.latent.qk_nope_head_dim, c.latent.kv_lora_rank
        module = part.removesuffix(".weight")
        both = source.weight(module, (heads * (nope + c.latent.v_head_dim), latent)).dequantize()
        return both.view(heads, nope + c.latent.v_head_dim, latent)
    if len(shape) < 2 or part.endswith(("embed_tokens.weight", "mlp.gate.weight")):
        return source.tensor(part, shape).float()
    return source.weight(part.removesuffix(".weight"), (shape[0], shape[1])).dequantize()


def _stored(entry: Entry, c: ModelConfig, source: WeightSource) -> Any:
    """The array to write. k_b and v_b are the halves of kv_b, k_b transposed per head."""
    stacked = len(entry.parts) > 1
    arrays = []
    for part in entry.parts:  # one expert at a time
        values = _read(part, entry.shape[1:] if stacked else entry.shape, c, source)
        if entry.name.endswith("k_b.weight"):
            values = values[:, : c.latent.qk_nope_head_dim].mT
        elif entry.name.endswith("v_b.weight"):
            values = values[:, c.latent.qk_nope_head_dim :]
        arrays.append(gguf.quants.quantize(values.contiguous().numpy(), entry.kind))
    return numpy.stack(arrays) if stacked else arrays[0]


def _metadata(writer: Any, c: ModelConfig) -> None:
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_attention_heads)
    writer.add_key_length(c.latent.qk_head_dim)
    writer.add_value_length(c.latent.v_head_dim)
    writer.add_q_lora_rank(c.latent.q_lora_rank)
    writer.add_kv_lora_rank(c.latent.kv_lora_rank)
    writer.add_rope_dimension_count(c.latent.qk_rope_head_dim)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_expert_count(c.router_size)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_uint32("glm-dsa.expert_gating_func", SIGMOID)
    writer.add_leading_dense_block_count(c.first_k_dense_replace)
    index = _index(c)
    indexer = {"head_count": index.heads, "key_length": index.width, "top_k": index.top_k}
    for field, value in indexer.items():
        writer.add_uint32(f"glm-dsa.attention.indexer.{field}", value)
    writer.add_vocab_size(c.vocab_size)
    _vocabulary(writer, c.vocab_size)


def pieces(size: int) -> list[str]:
    """The nominal vocabulary: special tokens, names of bytes, and numbers. All of it is printable, because
    the peer's server answers with pieces."""
    listed = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    return listed + [f"w{i}" for i in range(len(listed), size)]


def _vocabulary(writer: Any, size: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces(size))
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def write(c: ModelConfig, source: WeightSource, path: Path, kind: str = "q4_0") -> None:
    """Write the file, one tensor in memory at a time. kind: f32, bf16, q8_0 or q4_0.

    Raises SystemExit if the architecture cannot represent the model.
    """
    if why := rejected(c):
        raise SystemExit(why)
    if c.vocab_size < 260:
        raise SystemExit(f"vocab_size: got {c.vocab_size}; expected at least 260")
    listed = list(entries(c, gguf.GGMLQuantizationType[kind.upper()]))
    writer = gguf.GGUFWriter(path, "glm-dsa")
    _metadata(writer, c)
    for entry in listed:
        shape = gguf.quants.quant_shape_to_byte_shape(entry.shape, entry.kind)
        writer.add_tensor_info(
            entry.name, shape, numpy.dtype(numpy.uint8), math.prod(shape), raw_dtype=entry.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in listed:
        writer.write_tensor_data(_stored(entry, c, source))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="q4_0", choices=["f32", "bf16", "q8_0", "q4_0"])
    options = parser.parse_args()
    checkpoint = Checkpoint.open(options.model)
    config = config_of(checkpoint)
    write(config, source_of(checkpoint, config), options.out, options.type)


if __name__ == "__main__":
    main()
