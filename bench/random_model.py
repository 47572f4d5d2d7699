"""Random checkpoints for measuring speed: `python bench/random_model.py --arch v4 [--cache DIR]` writes one.

Slices of the models people run have the first layers of a published config.json and as large a share of its
vocabulary, so that head and layers have the weight that they have in the whole model.

V3S: V3's own shape, one dense and one expert layer (13.9 B parameters). V2L: DeepSeek-V2-Lite's whole
configuration (15.7 B). S576 and L576 have V3's head sizes (latent 512, rotary 64, nope = v = 128), which vLLM
and ik_llama.cpp need; L has 3.2 B parameters, 0.5 B active per token, S 283 M and 77 M. S and L alone have
small heads.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from farthing.checkpoint.floats import quantize_blocks
from farthing.model.config import ModelConfig
from farthing.model.parameters import parameter_shapes
from farthing.model.types import type_named

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
# A published configuration, a number of layers with its mixture of kinds, and the class that peers know.
SLICES: dict[str, tuple[str, int, str]] = {
    "qwen3.6-35b-a3b": ("qwen3.5-35b-a3b", 4, "Qwen3_5MoeForCausalLM"),
    "qwen3-30b-a3b": ("qwen3-30b-a3b-2507", 4, "Qwen3MoeForCausalLM"),
    "gpt-oss-20b": ("gpt-oss-20b", 4, "GptOssForCausalLM"),
    "glm-4.5-air": ("glm-4.5-air", 3, "Glm4MoeForCausalLM"),
    "gemma-4-26b-a4b": ("gemma-4-26b-a4b", 6, "Gemma4ForCausalLM"),
    "v4": ("deepseek-v4-flash", 2, "DeepseekV4ForCausalLM"),
}
# Instead of the kinds of the first layers: one of each rate, of which the first chooses experts by the token.
KINDS: dict[str, dict[str, Any]] = {"v4": {"compress_ratios": [4, 128], "num_hash_layers": 1}}
MODELS = [*SIZES, *SLICES]
EMBEDDING = "model.embed_tokens.weight"
TABLES = ("tid2eid", "position_bias")  # with two dimensions, but no matrices of a product
SHARD_BYTES = 1 << 31


def config(size: str) -> dict[str, Any]:
    """The config.json of a size."""
    if size in SLICES:
        return _slice(*SLICES[size]) | KINDS.get(size, {})
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


def _slice(published: str, layers: int, architecture: str) -> dict[str, Any]:
    """The first layers of a published model, and as large a share of its vocabulary."""
    raw = json.loads((files("farthing") / f"assets/configs/{published}.json").read_text(encoding="utf-8"))
    c = raw.get("text_config") or raw
    vocabulary = c["vocab_size"] * layers // c["num_hidden_layers"] // 64 * 64
    if "layer_types" in c:
        c["layer_types"] = c["layer_types"][:layers]
    for drafts in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        c.pop(drafts, None)
    tied = {"tie_word_embeddings": raw.get("tie_word_embeddings", False)}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    more = {"architectures": [architecture], "torch_dtype": "bfloat16", "num_hidden_layers": layers}
    return c | tied | more | ids | {"vocab_size": vocabulary}


def tensors(c: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """V3's names and the shapes of a config.json's parameters, in the order of the forward pass."""
    return list(parameter_shapes(ModelConfig.from_json(c)))


def head_parameters(c: dict[str, Any]) -> int:
    """Elements of the output head."""
    return int(c["vocab_size"] * c["hidden_size"])


def active_parameters(c: dict[str, Any], routed: float) -> int:
    """Matrix elements multiplied per token, with the head, with `routed` experts per layer."""
    model = ModelConfig.from_json(c)
    total = 0.0
    for name, shape in tensors(c):
        if len(shape) == 2 and name != EMBEDDING and not name.endswith(TABLES):  # a convolution has three
            total += math.prod(shape) * (routed / (model.n_routed_experts or 1) if ".experts." in name else 1)
    return int(total + (head_parameters(c) if model.head.tie_word_embeddings else 0))


def value(name: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """A parameter of plausible scale."""
    if "norm" in name:
        return (1 + 0.05 * torch.randn(shape, generator=g)).bfloat16()
    if name.endswith("tid2eid"):
        return torch.rand(shape[0], 256, generator=g).topk(shape[1]).indices
    if "_hc." in name or ".hc_head." in name:  # float32 in published files
        return torch.full(shape, 0.1) if name.endswith("scale") else torch.randn(shape, generator=g) * 0.02
    if name.endswith("A_log"):
        return torch.rand(shape, generator=g)
    if name.endswith(("bias", "sinks")):
        small = 0.02 * torch.randn(shape, generator=g)
        return small if name.endswith("correction_bias") else small.bfloat16()
    gain = 1.0 if name == EMBEDDING else shape[-1] ** -0.5
    return (torch.randn(shape, generator=g) * gain).bfloat16()


def stored(c: dict[str, Any], g: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint under the names that its type has for them."""
    name_of = type_named(c["model_type"]).names.stored
    packed = c.get("quantization_config", {}).get("quant_method") == "mxfp4"
    for name, shape in tensors(c):
        if c["model_type"] == "deepseek_v4" and _is_coded(name, shape):
            yield from _coded(name_of(name), shape, g, ".experts." in name)
        elif not (packed and ".experts." in name):
            yield name_of(name), value(name, shape, g)
        elif name.endswith(".experts.0.gate_proj.weight"):
            yield from _mxfp4(c, name_of(name.partition(".experts.")[0] + ".experts."), g)


def _is_coded(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a published file of V4 has it in FP8 or FP4."""
    plain = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "compressor.", "_hc.", "hc_head")
    indexed = name.endswith("indexer.q_b_proj.weight")
    return len(shape) == 2 and (indexed or not any(part in name for part in plain))


def _coded(name: str, shape: tuple[int, ...], g: torch.Generator, fp4: bool) -> Iterator[tuple[str, Tensor]]:
    """A matrix of V4 with its scales, which are powers of two: of blocks of 128 x 128, or of 32 columns."""
    rows, columns = shape
    scales = name.removesuffix("weight") + "scale"
    if not fp4:
        codes, factors = quantize_blocks(value(name, shape, g), ue8m0=True)
        yield from ((name, codes), (scales, factors.to(torch.float8_e8m0fnu)))
        return
    exponent = 127 - round(math.log2(3 * columns**0.5))
    yield name, torch.randint(256, (rows, columns // 2), dtype=torch.uint8, generator=g).view(torch.int8)
    yield scales, torch.full((rows, columns // 32), exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def _mxfp4(c: dict[str, Any], prefix: str, g: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """A layer's experts as gpt-oss stores them."""
    experts, d, i = c["num_local_experts"], c["hidden_size"], c["intermediate_size"]
    for part, rows, columns in (("gate_up", 2 * i, d), ("down", d, i)):
        shape = (experts, rows, columns // 32)
        scale = 126 - round(math.log2(3 * columns**0.5))  # codes have a root mean square of about 3
        yield f"{prefix}{part}_proj_blocks", torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=g)
        yield f"{prefix}{part}_proj_scales", torch.full(shape, scale + 1, dtype=torch.uint8)
        yield f"{prefix}{part}_proj_bias", (0.02 * torch.randn(experts, rows, generator=g)).bfloat16()


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
    for name, tensor in track(stored(c, g), description=f"random model {size}", total=None, transient=True):
        shard[name] = tensor
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


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--arch", choices=MODELS, required=True)
    arguments.add_argument("--cache", type=Path, default=Path("/tmp/farthing-bench"))
    given = arguments.parse_args()
    print(make_model(given.arch, given.cache))
