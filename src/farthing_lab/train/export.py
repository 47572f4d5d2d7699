"""Convert the training model to and from a Hugging Face DeepSeek-V3 checkpoint (bfloat16 or FP8 blocks)."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from farthing.checkpoint import Checkpoint, copy_companions
from farthing.checkpoint.floats import BLOCK, dequantize_blocks, quantize_blocks
from farthing.engine.tokenizer import DEEPSEEK_TEMPLATE as CHAT_TEMPLATE
from farthing.files import replace_json, replace_tensors, replace_text
from farthing.model import IGNORED, ModelConfig, config_of
from farthing.model.types import type_named
from farthing_lab.train import model as v3
from farthing_lab.train import model_v4 as v4
from farthing_lab.train.data import BOS, EOS, PAD
from farthing_lab.train.model import DeepSeekLM, MoE


def model_of(cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> DeepSeekLM:
    """An untrained model of the architecture."""
    return DeepSeekLM(cfg, dtype) if cfg.streams is None else v4.DeepSeekV4LM(cfg, dtype)


def to_json(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that describe a trainable architecture, for `ModelConfig.from_json`."""
    return v3.to_json(cfg) if cfg.streams is None else v4.to_json(cfg)


def _names(model: DeepSeekLM) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, view of the model's tensor) of every stored tensor."""
    stored = type_named(model.cfg.model_type).names.stored
    for name, view in _views(model):
        yield stored(name), view


def _views(model: DeepSeekLM) -> Iterator[tuple[str, Tensor]]:
    """The same under the engine's names."""
    yield "model.embed_tokens.weight", model.embed_tokens
    yield "model.norm.weight", model.norm.weight
    if model.lm_head is not None:
        yield "lm_head.weight", model.lm_head.weight
    for i, layer in enumerate(model.layers):
        yield from _block_names(f"model.layers.{i}", layer)
    if isinstance(model, v4.DeepSeekV4LM):
        for name, p in model.hc_head.named_parameters():
            yield f"model.hc_head.{name}", p
    if model.mtp is not None:
        prefix = f"model.layers.{model.cfg.num_hidden_layers}"
        for name in ("enorm", "hnorm", "eh_proj"):
            yield f"{prefix}.{name}.weight", getattr(model.mtp, name).weight
        yield f"{prefix}.shared_head.norm.weight", model.mtp.norm.weight
        yield from _block_names(prefix, model.mtp.block)


def _block_names(prefix: str, block: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, p in block.named_parameters():
        if name not in ("mlp.gate_up", "mlp.down"):
            yield f"{prefix}.{name}", p
    moe = block.mlp
    if isinstance(moe, MoE):
        if isinstance(moe.gate, v4.RootRouter) and moe.gate.tid2eid is not None:
            yield f"{prefix}.mlp.gate.tid2eid", moe.gate.tid2eid
        else:
            yield f"{prefix}.mlp.gate.e_score_correction_bias", moe.gate.e_score_correction_bias
        for e in range(moe.down.shape[0]):
            yield f"{prefix}.mlp.experts.{e}.gate_proj.weight", moe.gate_up[e, 0]
            yield f"{prefix}.mlp.experts.{e}.up_proj.weight", moe.gate_up[e, 1]
            yield f"{prefix}.mlp.experts.{e}.down_proj.weight", moe.down[e]


def to_tensors(model: DeepSeekLM) -> dict[str, Tensor]:
    """Float32 copies of every stored tensor, by Hugging Face name."""
    return {name: view.detach().float().clone() for name, view in _names(model)}


@torch.no_grad()
def from_tensors(model: DeepSeekLM, tensors: dict[str, Tensor]) -> None:
    """Fill the model from Hugging Face names, dequantizing FP8 blocks.

    Raises ValueError if a tensor is missing, unused or has the wrong shape, naming it.
    """
    views = dict(_names(model))
    factors = {_factor(n) for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    plain = {n: t for n, t in tensors.items() if n not in factors}
    missing, unused = sorted(views.keys() - plain.keys()), sorted(plain.keys() - views.keys())
    if missing or unused:
        raise ValueError(f"checkpoint does not fit the config: missing {missing[:5]}, unused {unused[:5]}")
    for name, view in views.items():
        value = plain[name]
        if value.shape != view.shape:
            raise ValueError(f"{name}: expected shape {tuple(view.shape)}, found {tuple(value.shape)}")
        if value.dtype == torch.float8_e4m3fn:
            value = dequantize_blocks(value, tensors[_factor(name)])
        view.copy_(value)


_PROJECTIONS_V4 = ("wq_a", "wq_b", "wkv", "wgate", "wo_a", "wo_b", "w1", "w2", "w3")


def is_quantized(name: str) -> bool:
    """Whether a weight is stored as FP8 blocks, as DeepSeek's: every projection, no embedding, norm, router,
    or indexer of V3.2. V4's compressors, in bfloat16 there, are too: both embedded models stay under 30 MB.
    """
    if not name.startswith("model."):  # V4's names
        return "." in name and name.split(".")[-2] in _PROJECTIONS_V4
    if ".indexer." in name:
        return False
    return name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight")


def _factor(name: str) -> str:
    """The name of a quantized weight's factors."""
    return f"{name}_scale_inv" if name.startswith("model.") else name.removesuffix("weight") + "scale"


# Kept in float32: routers, what hyper-connections, pools and attention add to scores.
_EXACT = (".mlp.gate.", ".ffn.gate.", "_base", "_scale", ".ape", ".attn_sink")


def pack(tensors: dict[str, Tensor], fp8: bool = True) -> dict[str, Tensor]:
    """Cast to storage dtypes: FP8 blocks and scales (projections), float32 (routers), else bfloat16."""
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if is_quantized(name) and fp8:
            stored[name], stored[_factor(name)] = quantize_blocks(value, ue8m0=not name.startswith("model."))
        elif name.endswith("tid2eid"):
            stored[name] = value.int()
        elif any(part in name for part in _EXACT):
            stored[name] = value.float().contiguous()
        else:
            stored[name] = value.to(torch.bfloat16).contiguous()
    return stored


def _architecture(cfg: ModelConfig) -> str:
    if cfg.streams is not None:
        return "DeepseekV4ForCausalLM"
    return "DeepseekV3ForCausalLM" if cfg.index is None else "DeepseekV32ForCausalLM"


def config_json(cfg: ModelConfig, fp8: bool = True) -> dict[str, Any]:
    """The `config.json` of a DeepSeek-V3 checkpoint."""
    config: dict[str, Any] = {
        "architectures": [_architecture(cfg)],
        **to_json(cfg),
        "num_key_value_heads": cfg.num_attention_heads if cfg.streams is None else 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
        if cfg.streams is not None:
            config["quantization_config"]["scale_fmt"] = "ue8m0"
    return config


def save_checkpoint(
    model: DeepSeekLM, tokenizer: Tokenizer, out: Path, fp8: bool = True, source: Path | None = None
) -> int:
    """Write a checkpoint directory (weights atomically) and return the size of the weights file in bytes.

    source: checkpoint whose tokenizer, template and generation defaults are copied.
    """
    out.mkdir(parents=True, exist_ok=True)
    replace_tensors(out / "model.safetensors", pack(to_tensors(model), fp8))
    replace_json(out / "config.json", config_json(model.cfg, fp8), indent=2)
    replace_json(
        out / "generation_config.json",
        {
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
        },
        indent=2,
    )
    replace_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.cfg.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
        indent=2,
    )
    replace_text(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    if source is not None:
        copy_companions(source, out)
    return (out / "model.safetensors").stat().st_size


def load_checkpoint(path: Path) -> DeepSeekLM:
    """Load a checkpoint directory in bfloat16, float32 or FP8 blocks, in one file or in shards.

    Raises ConfigError, CheckpointError or ValueError, naming what does not fit.
    """
    checkpoint = Checkpoint.open(path)
    model = model_of(config_of(checkpoint))
    read = [name for name in checkpoint.names() if not any(fnmatchcase(name, p) for p in IGNORED)]
    from_tensors(model, {name: checkpoint.tensor(name) for name in read})
    return model
