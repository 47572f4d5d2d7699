"""A tiny V3 model on disk, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from farthing.checkpoint.writer import CheckpointWriter
from farthing.compress.evaluate import Corpus, load_corpus
from farthing.model.config import ModelConfig
from farthing.model.parameters import random_parameters
from tests.tiny import tiny

# Fields beyond the tiny model's are required by transformers.
TINY = tiny(
    architectures=["DeepseekV3ForCausalLM"],
    vocab_size=264,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    num_key_value_heads=2,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    torch_dtype="float32",
)


def write_model(path: Path, seed: int = 0, base: dict[str, Any] = TINY, **changes: Any) -> Path:
    """A random model directory."""
    raw = base | changes
    writer = CheckpointWriter(path, max_shard_bytes=200_000)
    parameters = random_parameters(ModelConfig.from_json(raw), seed)
    for name, tensor in parameters.items():
        # A larger head, so that some tokens are likelier than others.
        writer.add(name, tensor * 3 if name == "lm_head.weight" else tensor)
    writer.close(raw)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """A token for each byte, and two more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))


def corpus_of(data: Path, model: Path, window: int, max_tokens: int | None = None) -> Corpus:
    """Windows of `data` for a model directory."""
    return load_corpus(data, model, ModelConfig.from_directory(model), window, max_tokens)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of 40 to 140 random characters."""
    generator = torch.Generator().manual_seed(5)
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    rows = []
    for i in range(6):
        codes = torch.randint(32, 127, (40 + 20 * i,), generator=generator)
        rows.append(json.dumps({"path": f"{i}.py", "text": "".join(map(chr, codes.tolist()))}))
    file.write_text("\n".join(rows) + "\n")
    return file


def widen_scales(path: Path) -> None:
    """Store the 16-bit scales of a result as float32 numbers of the same values.

    transformers multiplies integers by their scales in the scales' own type, so it rounds every weight to 16
    bits where scales have 16 bits, and we do not.
    """
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        scales = {name: tensor.float() for name, tensor in tensors.items() if name.endswith("weight_scale")}
        save_file(tensors | scales, file, metadata={"format": "pt"})
