"""Random checkpoints of DeepSeek's architecture, for measuring speed.

V3S: V3's own shape, one dense and one expert layer (13.9 B parameters). V2L: DeepSeek-V2-Lite's whole
configuration (15.7 B). S576 and L576 have V3's head sizes (latent 512, rotary 64, nope = v = 128), which vLLM
and ik_llama.cpp need; L has 3.2 B parameters, 0.5 B active per token, S 283 M and 77 M. S and L alone have
small heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SMALL: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "n_routed_experts": 32, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "moe_intermediate_size": 256, "intermediate_size": 2048,
    "q_lora_rank": 256,
    "kv_lora_rank": 256, "num_attention_heads": 8, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}  # fmt: skip
LARGE = SMALL | {
    "hidden_size": 1024, "num_hidden_layers": 16, "n_routed_experts": 64, "num_experts_per_tok": 8,
    "n_group": 8, "topk_group": 4, "moe_intermediate_size": 1024, "intermediate_size": 4096,
    "q_lora_rank": 512,
    "num_attention_heads": 16,
}  # fmt: skip
SIZES = {
    "S": SMALL,
    "L": LARGE,
    "S576": SMALL | HEADS | {"num_attention_heads": 4},
    "L576": LARGE | HEADS | {"num_attention_heads": 8},
    "V3S": HEADS | {
        "hidden_size": 7168, "num_hidden_layers": 2, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "moe_intermediate_size": 2048, "intermediate_size": 18432,
        "q_lora_rank": 1536, "num_attention_heads": 128, "vocab_size": 129280,
    },
    "V2L": HEADS | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "hidden_size": 2048, "num_hidden_layers": 27, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 1408, "intermediate_size": 10944,
        "n_shared_experts": 2, "q_lora_rank": None, "num_attention_heads": 16, "vocab_size": 102400,
        "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
}  # fmt: skip
SHARD_BYTES = 1 << 31


def config(size: str) -> dict[str, Any]:
    """The config.json of a size."""
    common = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 32000,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0,
        "max_position_embeddings": 40960, "rope_theta": 10000.0, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 2, "initializer_range": 0.02, "use_cache": True, "num_nextn_predict_layers": 0,
        "ep_size": 1, "pretraining_tp": 1, "aux_loss_alpha": 0.001, "seq_aux": True,
    }  # fmt: skip
    shape = SIZES[size]
    return common | shape | {"num_key_value_heads": shape["num_attention_heads"]}


def tensors(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the forward pass."""
    d, heads, latent, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["q_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]

    def mlp(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.gate_proj.weight", (width, d)
        yield f"{prefix}.up_proj.weight", (width, d)
        yield f"{prefix}.down_proj.weight", (d, width)

    yield "model.embed_tokens.weight", (c["vocab_size"], d)
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        yield f"{p}.input_layernorm.weight", (d,)
        if rank is None:
            yield f"{p}.self_attn.q_proj.weight", (heads * (nope + rope), d)
        else:
            yield f"{p}.self_attn.q_a_proj.weight", (rank, d)
            yield f"{p}.self_attn.q_a_layernorm.weight", (rank,)
            yield f"{p}.self_attn.q_b_proj.weight", (heads * (nope + rope), rank)
        yield f"{p}.self_attn.kv_a_proj_with_mqa.weight", (latent + rope, d)
        yield f"{p}.self_attn.kv_a_layernorm.weight", (latent,)
        yield f"{p}.self_attn.kv_b_proj.weight", (heads * (nope + value), latent)
        yield f"{p}.self_attn.o_proj.weight", (d, heads * value)
        yield f"{p}.post_attention_layernorm.weight", (d,)
        if layer < c["first_k_dense_replace"]:
            yield from mlp(f"{p}.mlp", c["intermediate_size"])
            continue
        yield f"{p}.mlp.gate.weight", (c["n_routed_experts"], d)
        if c["topk_method"] == "noaux_tc":
            yield f"{p}.mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
        for e in range(c["n_routed_experts"]):
            yield from mlp(f"{p}.mlp.experts.{e}", c["moe_intermediate_size"])
        yield from mlp(f"{p}.mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (c["vocab_size"], d)


def head_parameters(c: dict[str, Any]) -> int:
    """Elements of the output head."""
    return int(c["vocab_size"] * c["hidden_size"])


def active_parameters(c: dict[str, Any], routed: float) -> int:
    """Matrix elements multiplied per token, with the head, with `routed` experts per layer."""
    total = 0.0
    for name, shape in tensors(c):
        if name == "model.embed_tokens.weight" or len(shape) == 1:
            continue
        total += math.prod(shape) * (routed / c["n_routed_experts"] if ".experts." in name else 1)
    return int(total)


def value(name: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    if name.endswith("norm.weight"):
        return (1 + 0.05 * torch.randn(shape, generator=g)).bfloat16()
    if name.endswith("bias"):
        return 0.02 * torch.randn(shape, generator=g)
    gain = 1.0 if "embed" in name else shape[-1] ** -0.5
    return (torch.randn(shape, generator=g) * gain).bfloat16()


def write_tokenizer(out: Path, vocab: int) -> None:
    """A byte-level BPE of the right size, trained on numbers, as required by peers' converters."""
    t = Tokenizer(models.BPE())
    split = r"\p{N}{1,3}"
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    t.decoder = decoders.ByteLevel()
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    words = (f"w{i:x} v{i * 7919 % 99991:x}z" for i in range(60000))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    t.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1],
        "pad_token": special[2], "model_max_length": 40960,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))


def make_model(size: str, cache: Path, seed: int = 1234) -> Path:
    """The directory of a random model, written first if missing."""
    out = cache / size
    if (out / "model.safetensors.index.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    c, g = config(size), torch.Generator().manual_seed(seed)
    (out / "config.json").write_text(json.dumps(c, indent=1))
    write_tokenizer(out, c["vocab_size"])
    shard: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    count, held, total = 1, 0, 0
    for name, shape in track(list(tensors(c)), description=f"random model {size}", transient=True):
        shard[name] = value(name, shape, g)
        size_of = shard[name].numel() * shard[name].element_size()
        held, total = held + size_of, total + size_of
        where[name] = f"model-{count:05d}.safetensors"
        if held > SHARD_BYTES:
            save_file(shard, out / where[name], metadata={"format": "pt"})
            shard, held, count = {}, 0, count + 1
    if shard:
        save_file(shard, out / f"model-{count:05d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out
