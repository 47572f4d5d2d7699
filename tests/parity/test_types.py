"""Every model type against transformers: logits over the paged cache, and greedy tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.load import load
from farthing.ops.api import Ops
from farthing.ops.select import select

pytest.importorskip("transformers")

from .families import FAMILIES, GROUPED, build, deepseek_v4, exact_logits, fill, save
from .paged import chunkings, continues_greedily, greedy, run

CASES = [
    pytest.param(name, seed, marks=pytest.mark.slow if seed else ())
    for name in FAMILIES
    for seed in range(24)
]
LENGTH = 21
STEPS = 64


def ops_of(backend: str, seed: int) -> Ops:
    """Odd seeds compute with two threads."""
    threads = None if backend == "reference" else 1 + seed % 2
    return select(backend, dtype=torch.float32, threads=threads)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_logits_and_greedy_tokens(name: str, seed: int, tmp_path: Path) -> None:
    theirs = build(name, seed, tmp_path)
    rng = random.Random(seed)
    ways = chunkings(LENGTH, rng)
    vocabulary = ModelConfig.from_directory(tmp_path).vocab_size
    ids = torch.randint(2, vocabulary, (LENGTH,), generator=torch.manual_seed(seed))
    with torch.inference_mode():
        expected = exact_logits(theirs, ids)
        scale = expected.abs().max()
        for backend in ("reference", "cpu"):
            ours = load(tmp_path, ops_of(backend, seed))
            for way, chunks in ways.items():
                beside = ids.flip(0) if way == "random" else None
                error = (run(ours, ids, chunks, beside=beside) - expected).abs().max() / scale
                assert error < 1e-4, f"{backend}, {way}: relative error {error:.2e}"
            tokens = greedy(ours, ids, STEPS)
            whole = torch.cat((ids, torch.tensor(tokens[:-1])))
            assert continues_greedily(exact_logits(theirs, whole), LENGTH, tokens), backend


@pytest.mark.slow
@pytest.mark.parametrize("edge", [127, 128, 129, 255])
def test_v4_with_released_rates(edge: int, tmp_path: Path) -> None:
    """Windows of 128 and entries of 4 and of 128 tokens, in chunks that end around their edges."""
    length = 300
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    changes = dict(
        num_hidden_layers=3,
        layer_types=kinds,
        compress_rates=dict(zip(kinds[1:], (4, 128), strict=True)),
        sliding_window=128,
        index_topk=16,
        mlp_layer_types=["hash_moe", "moe", "moe"],
    )
    theirs = fill(deepseek_v4(random.Random(edge), **changes))
    save("deepseek_v4", theirs, tmp_path)
    ids = torch.randint(2, theirs.config.vocab_size, (length,), generator=torch.manual_seed(edge))
    with torch.inference_mode():
        expected = exact_logits(theirs, ids)
        for backend in ("reference", "cpu"):
            ours = load(tmp_path, ops_of(backend, 1))
            for chunks in (
                [length],
                [edge, 1, 1, length - edge - 2],
                [edge - 3, *[1] * 6, length - edge - 3],
            ):
                error = (run(ours, ids, chunks) - expected).abs().max() / expected.abs().max()
                assert error < 1e-4, f"{backend}, {chunks}: relative error {error:.2e}"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in GROUPED])
def test_rope_interleave_false_is_read_as_in_transformers(name: str, tmp_path: Path) -> None:
    """Some types rotate by halves with it, the others ignore the field."""
    theirs = build(name, 0, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.get("text_config", raw)["rope_interleave"] = False
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = type(theirs.config).from_dict(raw)
    theirs.config.get_text_config().rope_interleave = config.get_text_config().rope_interleave
    ids = torch.randint(2, theirs.config.get_text_config().vocab_size, (LENGTH,))
    with torch.inference_mode():
        expected = theirs(input_ids=ids[None]).logits[0]
        error = (run(load(tmp_path, ops_of("reference", 0)), ids, [LENGTH]) - expected).abs().max()
    assert error < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_no_worse_than_transformers(name: str, tmp_path: Path) -> None:
    """Weights in bfloat16 on the CPU kernels, against the same weights computed in float32.

    With a bfloat16 cache too, but for the median token: where rounding changes the choice of an expert or a
    key, on either side, a token's error is of another size.
    """
    ours_error: dict[str, list[torch.Tensor]] = {"float32": [], "bfloat16": []}
    theirs_error = []
    for seed in range(3):
        path = tmp_path / str(seed)
        theirs = build(name, seed, path).to(torch.bfloat16)
        save(name, theirs, path)
        ours = load(path, select("cpu", threads=1 + seed % 2))
        ids = torch.randint(2, ours.config.vocab_size, (LENGTH,), generator=torch.manual_seed(seed))
        with torch.inference_mode():
            low = theirs(input_ids=ids[None]).logits[0].float()
            exact = theirs.float()(input_ids=ids[None]).logits[0]
            power = exact.square().mean()
            theirs_error.append((low - exact).square().mean(-1) / power)
            for dtype, errors in ours_error.items():
                found = run(ours, ids, [LENGTH - 4, 1, 3], dtype)  # type: ignore[arg-type]
                errors.append((found - exact).square().mean(-1) / power)
    rms, reference = (torch.cat(e).mean().sqrt() for e in (ours_error["float32"], theirs_error))
    assert 0 < rms <= 1.5 * reference
    median, reference = (torch.cat(e).median().sqrt() for e in (ours_error["bfloat16"], theirs_error))
    assert 0 < median <= 1.5 * reference


def _mistral_names(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "tok_embeddings"), ("model.norm", "norm"), ("lm_head", "output"),
        ("model.layers", "layers"), ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("self_attn.q_a_proj", "attention.wq_a"),
        ("self_attn.q_a_layernorm", "attention.q_a_norm"), ("self_attn.q_b_proj", "attention.wq_b"),
        ("self_attn.kv_a_proj_with_mqa", "attention.wkv_a_with_mqa"),
        ("self_attn.kv_a_layernorm", "attention.kv_a_norm"), ("self_attn.kv_b_proj", "attention.wkv_b"),
        ("self_attn.o_proj", "attention.wo"), ("mlp.shared_experts", "shared_experts"),
        ("mlp.experts", "experts"), ("mlp.gate.", "gate."), ("mlp.", "feed_forward."),
        ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def test_mistral_names_and_params_json(tmp_path: Path) -> None:
    """The same weights in Hugging Face's and in Mistral's format give the same logits."""
    (tmp_path / "hf").mkdir(), (tmp_path / "own").mkdir()
    build("mistral4", 3, tmp_path / "hf")
    c = json.loads((tmp_path / "hf" / "config.json").read_text())
    tensors = {}
    for name, value in load_file(tmp_path / "hf" / "model.safetensors").items():
        if name.endswith("experts.gate_up_proj"):
            for e, pair in enumerate(value):
                for part, half in zip(("w1", "w3"), pair.chunk(2), strict=True):
                    tensors[_mistral_names(name.replace("gate_up_proj", f"{e}.{part}.weight"))] = (
                        half.contiguous()
                    )
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(value):
                tensors[_mistral_names(name.replace("down_proj", f"{e}.w2.weight"))] = down.contiguous()
        else:
            tensors[_mistral_names(name)] = value
    tensors["vision_encoder.patch_conv.weight"] = torch.zeros(2, 2)
    file = "consolidated-00001-of-00001.safetensors"
    save_file(tensors, tmp_path / "own" / file)
    index = json.dumps({"weight_map": dict.fromkeys(tensors, file)})
    (tmp_path / "own" / "consolidated.safetensors.index.json").write_text(index)
    rope = c["rope_parameters"]
    keys = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "vocab_size")
    params = {key: c[key] for key in (*keys, "max_position_embeddings")} | dict(
        dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=c["num_attention_heads"],
        hidden_dim=c["intermediate_size"], norm_eps=c["rms_norm_eps"], rope_theta=rope["rope_theta"],
        moe=dict(
            num_experts=c["n_routed_experts"], num_experts_per_tok=c["num_experts_per_tok"],
            num_shared_experts=c["n_shared_experts"], expert_hidden_dim=c["moe_intermediate_size"],
            first_k_dense_replace=c["first_k_dense_replace"], route_every_n=1,
            routed_scale=c["routed_scaling_factor"], num_expert_groups=c["n_group"],
            num_expert_groups_per_tok=c["topk_group"],
        ),
        llama_4_scaling=dict(beta=0.1, original_max_position_embeddings=8),
        yarn=dict(
            alpha=1, beta=32, apply_scale=False, factor=rope["factor"], original_max_position_embeddings=8
        ),
    )  # fmt: skip
    (tmp_path / "own" / "params.json").write_text(json.dumps(params))
    c["rope_parameters"] = {**rope, "mscale": 0, "mscale_all_dim": 0, "attention_factor": 1.0}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(c))
    ids = torch.randint(2, c["vocab_size"], (LENGTH,), generator=torch.manual_seed(0))
    with torch.inference_mode():
        own, theirs = (
            run(load(tmp_path / way, ops_of("reference", 0)), ids, [9, 12]) for way in ("own", "hf")
        )
    assert torch.equal(own, theirs)
    assert resolve_model(tmp_path / "own") == tmp_path / "own"
    assert ModelConfig.from_directory(tmp_path / "own").model_type == "mistral_large_3"
