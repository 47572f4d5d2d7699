"""Files that `farthing export` writes: our reader finds the same model in them, and exactly what was kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from typer.testing import CliRunner

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from farthing.checkpoint.gguf_types import BLOCKS, FORMATS, WRITTEN, encode, kind_for  # noqa: E402
from farthing.checkpoint.reader import Checkpoint  # noqa: E402
from farthing.cli.app import app  # noqa: E402
from farthing.compress.api import Options, compress  # noqa: E402
from farthing.compress.gguf import export_gguf  # noqa: E402
from farthing.compress.recipe import load_recipe  # noqa: E402
from farthing.engine.tokenizer import Tokenizer as OurTokenizer  # noqa: E402
from farthing.engine.tokenizer import generation_defaults  # noqa: E402
from farthing.hub import resolve_model  # noqa: E402
from farthing.model import gguf_write  # noqa: E402
from farthing.model.fields import ConfigError  # noqa: E402
from farthing.model.load import config_of, load, source_of  # noqa: E402
from farthing.ops.select import select  # noqa: E402
from farthing.ops.weights import Weight, quantize_int4, quantize_int8, rounded  # noqa: E402
from farthing.tokenizer_gguf import _CUTS, fields_of, tokenizer_of  # noqa: E402
from tests.compress.conftest import write_model  # noqa: E402
from tests.ops.parts import weight  # noqa: E402
from tests.parity.families import build  # noqa: E402
from tests.parity.paged import run  # noqa: E402

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "kimi_k25", "glm4_moe",
    "minimax_m2", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "gpt_oss", "qwen2", "qwen2_moe", "smollm3",
    "granite", "granitemoe", "olmoe", "seed_oss", "dots1", "qwen3_5", "qwen3_5_text",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def with_tokenizer(path: Path, size: int) -> Path:
    """A byte-level tokenizer of fewer tokens than the model has, cut as GPT-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 4]
    vocabulary = [*alphabet, alphabet[0] + alphabet[1], "<end>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [tuple(alphabet[:2])]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<end>", "chat_template": "{{ messages[0]['content'] }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def quantizable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3 whose matrices have whole blocks of 32 columns."""
    return with_tokenizer(write_model(tmp_path_factory.mktemp("v3"), num_nextn_predict_layers=0), 264)


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    return run(load(path, select("reference", dtype=torch.float32)), ids, [len(ids)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_finds_the_same_model(family: str, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    for seed in range(200):
        folder = tmp_path / str(seed)
        config = build(family, seed, folder).config.get_text_config()
        try:
            kept = export_gguf(with_tokenizer(folder, config.vocab_size), out)
            break
        except ConfigError:  # of the fields that are drawn, GGUF cannot say all
            continue
    assert all(figures.exact == figures.matrices for figures in kept.values())
    ids = torch.arange(12) % (config.vocab_size - 4)
    found, expected = logits(resolve_model(out), ids), logits(folder, ids)
    # Qwen3.5's and Gemma's norms are stored with 1 added, which rounds their float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("scheme", "group"), [("int4", 32), ("int4", 64), ("int8", None)])
def test_a_compressed_checkpoint_keeps_its_integers(
    quantizable: Path, scheme: str, group: int | None, tmp_path: Path
) -> None:
    recipe = load_recipe("int4-rtn" if scheme == "int4" else "int8")
    recipe = recipe if group is None else replace(recipe, group_size=group)
    small, out = tmp_path / "small", tmp_path / "small.gguf"
    compress(quantizable, small, recipe, Options(gate=False, check_memory=False))
    kept = export_gguf(small, out)
    assert ("Q4_0" in kept) == (scheme == "int4")
    checkpoints = map(Checkpoint.open, (small, resolve_model(out)))
    ours, theirs = (source_of(checkpoint, config_of(checkpoint)) for checkpoint in checkpoints)
    for e in range(8):
        module = f"model.layers.2.mlp.experts.{e}.down_proj"
        mine, other = ours.weight(module), theirs.weight(module)
        assert other.format == ("int4" if scheme == "int4" else "int8_groups")
        assert torch.equal(mine.quantized(), other.quantized())
        # Scales of 32 bits become those of 16.
        assert torch.allclose(other.dequantize(), mine.dequantize(), rtol=2.0**-11, atol=0)


@pytest.mark.parametrize(
    ("name", "export", "expected", "most"),
    [
        ("int4", "auto", "IQ4_NL", 0.2), ("int4", "llm-compressor", "Q4_0", 0.1),
        ("int5", "auto", "Q5_0", 0.1), ("int8", "auto", "Q8_0", 0.1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_every_recipe_is_exported(
    name: str, export: str, expected: str, most: float, tied: bool, tmp_path: Path
) -> None:
    """The head, which recipes round while loading, is stored in 8 bits; the divergence is printed."""
    source = write_model(tmp_path / "v3", num_nextn_predict_layers=0, tie_word_embeddings=tied)
    small, out = tmp_path / "small", tmp_path / "small.gguf"
    options = Options(gate=False, check_memory=False, export=export)
    compress(with_tokenizer(source, 264), small, load_recipe(name), options)
    done = CliRunner().invoke(app, ["export", str(small), str(out)])
    assert done.exit_code == 0, done.output
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    head = "token_embd.weight" if tied else "output.weight"
    assert stored["blk.2.ffn_down_exps.weight"] == expected
    rounded = config_of(Checkpoint.open(small)).head.rounded_head
    assert stored[head] == ("Q8_0" if rounded else "F32")
    assert rounded == (name != "int8")
    found = re.findall(r"KL divergence from .*: (\d\.\d+) nats", done.output)
    assert [float(kl) < most for kl in found] == [True], found


def test_recommended_sampling_is_kept(quantizable: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(quantizable, folder)
    stated = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    export_gguf(folder, out := tmp_path / "model.gguf")
    assert generation_defaults(resolve_model(out)) == stated


@pytest.mark.parametrize("kind", [kind.lower() for kind in WRITTEN])
def test_types_of_dense_matrices(quantizable: Path, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    done = CliRunner().invoke(app, ["export", str(quantizable), str(out), "--type", kind])
    assert done.exit_code == 0, done.output
    stored = {t.name: t for t in gguf.GGUFReader(out).tensors}
    assert stored["blk.2.ffn_up_exps.weight"].tensor_type.name == kind.upper()
    precise = kind.upper() if kind in ("bf16", "q8_0") else "Q8_0"
    for name in ("token_embd", "output", "blk.0.attn_output", "blk.0.attn_k_b", "blk.1.attn_v_b"):
        assert stored[f"{name}.weight"].tensor_type.name == precise
    assert stored["blk.2.ffn_gate_inp.weight"].tensor_type.name == "F32"
    checkpoints = map(Checkpoint.open, (resolve_model(out), quantizable))
    sources = [source_of(checkpoint, config_of(checkpoint)) for checkpoint in checkpoints]
    for module in ("self_attn.kv_b_proj", "self_attn.o_proj", "mlp.experts.3.down_proj"):
        found, expected = (s.weight(f"model.layers.1.{module}").dequantize() for s in sources)
        bound = 0.01 if kind in ("bf16", "q8_0") or "self_attn" in module else 0.15
        assert float((found - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_values_of_a_type_are_written_as_they_were_read(kind: str) -> None:
    """Exactly into its own type, or one with the same integers; else within 8 bits or 16 values."""
    rng = np.random.default_rng(0)
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (8, 1024 // columns, size), np.uint8)
    data[..., 0] = 120  # of MXFP4
    ats = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}
    for at in ats.get(kind, (0, 2)):
        data[..., at : at + 2] = np.frombuffer(np.float16(0.0078125).tobytes(), np.uint8)
    weight = BLOCKS[kind](data).on_torch()
    written, exact = encode(weight, kind_for(weight))
    target = gguf.GGMLQuantizationType[kind_for(weight)]
    found = torch.from_numpy(gguf.quants.dequantize(written, target))
    assert exact or kind not in WRITTEN
    if exact:
        assert torch.equal(found, weight.dequantize())
    error = (found - weight.dequantize()).norm() / weight.dequantize().norm()
    assert float(error) < 0.01
    assert kind not in WRITTEN or np.array_equal(written, data.reshape(8, -1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["Q8_0", "Q4_0", "IQ4_NL", "MXFP4"]), st.floats(-12, 12))
def test_rounding_stays_within_half_a_step(seed: int, kind: str, exponent: float) -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values[0] = 0
    data, _ = encode(Weight("dense", values), kind)
    found = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(found[0], values[0])
    bound = {"Q8_0": 0.01, "Q4_0": 0.1, "IQ4_NL": 0.09, "MXFP4": 0.15}[kind]
    assert float((found - values).norm() / values.norm()) < bound + (0.01 if exponent < -10 else 0)
    again, exact = encode(BLOCKS[kind](data.reshape(4, 2, -1)).on_torch(), kind)
    assert exact and np.array_equal(again, data)


@pytest.mark.parametrize("kind", WRITTEN)
def test_rows_are_rounded_on_all_cores(
    quantizable: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bytes and figures of whole matrices."""
    found = []
    for together, rows in ((1 << 18, 128), (1, 16)):
        monkeypatch.setattr(gguf_write, "_TOGETHER", together)
        monkeypatch.setattr(gguf_write, "FP8_BLOCK", rows)
        kept = export_gguf(quantizable, out := tmp_path / f"{rows}.gguf", kind.lower())
        found.append((out.read_bytes(), {name: str(figures) for name, figures in kept.items()}))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "IQ4_NL", "MXFP4"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_values_that_cannot_be_rounded_are_refused(kind: str, bad: float) -> None:
    values = torch.ones(4, 64)
    values[2, 3] = bad
    with pytest.raises(ValueError, match="got NaN or infinity; expected finite values"):
        encode(Weight("dense", values), kind)


def test_experts_of_different_formats_share_a_type_that_holds_all(quantizable: Path, tmp_path: Path) -> None:
    recipe = replace(load_recipe("int4-rtn"), group_size=32, wide=("*.experts.1.*",))
    small, out = tmp_path / "small", tmp_path / "model.gguf"
    compress(quantizable, small, recipe, Options(gate=False, check_memory=False))
    export_gguf(with_tokenizer(small, 264), out)
    sources = [source_of(c, config_of(c)) for c in map(Checkpoint.open, (resolve_model(out), small))]
    for e in range(3):
        found, expected = (s.weight(f"model.layers.1.mlp.experts.{e}.up_proj").dequantize() for s in sources)
        assert float((found - expected).norm() / expected.norm()) < 0.006  # scales of 16 bits


def test_a_matrix_that_cannot_be_rounded_is_named(quantizable: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(quantizable, tmp_path / "model")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    (file,) = (f for f in copy.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"^blk\.1\.ffn_up_exps\.weight: got NaN or infinity; expected"):
        export_gguf(copy, tmp_path / "model.gguf", "q8_0")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(("name", "group"), [("nvfp4", 16), ("iq4_nl", 16), ("int4", 16), ("mxfp4", 32)])
def test_4_bits_that_fit_no_type_are_not_rounded_to_4_bits_again(name: str, group: int) -> None:
    torch.manual_seed(0)
    w = weight(name, 16, 256, group)
    w = replace(w, order=torch.randperm(256)) if group == 32 else w
    written, _ = encode(w, kind := kind_for(w))
    found = torch.from_numpy(gguf.quants.dequantize(written, gguf.GGMLQuantizationType[kind]))
    assert float((found - w.dequantize()).norm() / w.dequantize().norm()) < 0.01


def test_zero_points_of_8_bits() -> None:
    """Differences of up to 9 bits are rounded, those of 8 bits are kept."""
    torch.manual_seed(0)
    wide = weight("int8_zero", 16, 64)
    assert wide.scale is not None
    narrow = replace(wide, data=wide.data // 4, zero_point=torch.full(wide.scale.shape, 60, dtype=torch.int8))
    for w, kept in ((wide, False), (narrow, True)):
        written, exact = encode(w, kind_for(w))
        found = torch.from_numpy(gguf.quants.dequantize(written, gguf.GGMLQuantizationType.Q8_0))
        value = w.dequantize()
        assert exact == kept and float((found - value).norm() / value.norm()) < 0.01
        assert not exact or torch.equal(found, value)


def test_values_that_a_type_lacks(tmp_path: Path) -> None:
    """Scales of a row are rounded to 16 bits; zero points become 8 bits; NL4's values are near."""
    values = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    even = quantize_int4(values, 64)
    even = replace(even, scale=even.scale.bfloat16().float() if even.scale is not None else None)
    assert kind_for(even) == "Q4_0" and encode(even, "Q4_0")[1]
    row = quantize_int8(values)
    assert kind_for(row) == "Q8_0" and not encode(row, "Q8_0")[1]
    shifted = replace(
        BLOCKS["Q4_0"](encode(Weight("dense", values), "Q4_0")[0].reshape(16, 4, -1)).on_torch(),
        zero_point=torch.full((16, 4), 3, dtype=torch.int8),
    )
    data, exact = encode(shifted, kind_for(shifted))
    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    assert exact and torch.equal(torch.from_numpy(found), shifted.dequantize())
    nl4 = rounded(Weight("dense", values), "int4", mlp=True)
    data, exact = encode(nl4, "IQ4_NL")
    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.IQ4_NL)
    assert not exact and float((torch.from_numpy(found) - nl4.dequantize()).norm() / values.norm()) < 0.05


def test_mxfp4_of_gpt_oss_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, out = tmp_path / "model", tmp_path / "model.gguf"
    raw = {
        "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
        "num_experts_per_tok": 2, "vocab_size": 264, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "sliding_window": 8, "rope_theta": 150000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    with_tokenizer(write_model(folder, base=raw), 264)
    shards = list(folder.glob("*.safetensors"))
    tensors = {n: t for shard in shards for n, t in load_file(shard).items() if ".experts." not in n}
    tensors = {n.replace(".mlp.gate.", ".mlp.router."): t for n, t in tensors.items()}
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        for part, rows, columns in (("gate_up", 64, 64), ("down", 64, 32)):
            name, shape = f"model.layers.{i}.mlp.experts.{part}_proj", (4, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator).to(torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(121, 126, shape, generator=generator).to(torch.uint8)
            tensors[f"{name}_bias"] = torch.randn(4, rows, generator=generator)
    for file in (*shards, *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "mxfp4"}}))
    kept = export_gguf(folder, out)
    assert kept["MXFP4"].exact == kept["MXFP4"].matrices == 2 * 3 * 4
    config = Checkpoint.open(resolve_model(out)).config
    assert config["rope_scaling"]["truncate"] is False and config["sliding_window"] == 8
    ids = torch.arange(20)
    assert torch.equal(logits(resolve_model(out), ids), logits(folder, ids))
    assert "llama.cpp refuses" not in caplog.text
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, folder / "model.safetensors")
    export_gguf(folder, out)
    assert "llama.cpp refuses gpt-oss files without output.weight" in caplog.text


def exported(family: str, folder: Path, accepts: Callable[[Any], bool]) -> dict[str, Any]:
    """The file's metadata of the first random model whose configuration is accepted and can be written."""
    for seed in range(200):
        config = build(family, seed, folder / str(seed)).config.get_text_config()
        if accepts(config):
            try:
                export_gguf(with_tokenizer(folder / str(seed), config.vocab_size), folder / "m.gguf")
            except ConfigError:
                continue
            break
    fields = gguf.GGUFReader(folder / "m.gguf").fields
    return {name: fields[name].contents() for name in fields}


@pytest.mark.parametrize(
    ("family", "accepts", "warning"),
    [
        ("minimax_m2", lambda c: c.tie_word_embeddings, "files without output.weight"),
        ("olmoe", lambda c: c.tie_word_embeddings, "files without output.weight"),
        ("dots1", lambda c: c.tie_word_embeddings, "files without output.weight"),
        ("qwen2_moe", lambda c: c.tie_word_embeddings, "files without output.weight"),
        ("olmoe", lambda c: c.num_key_value_heads < c.num_attention_heads, "fewer heads than queries"),
        ("dots1", lambda c: c.num_key_value_heads < c.num_attention_heads, "fewer heads than queries"),
        ("gpt_oss", lambda c: not c.attention_bias, "whose attention lacks a bias on its output"),
        ("qwen3", lambda c: c.attention_bias, "whose attention has a bias on its output"),
        (
            "qwen3_5_moe_text",
            lambda c: c.linear_key_head_dim == 10,
            "keys and values of Gated DeltaNet differ",
        ),
        ("deepseek_v2", lambda c: c.topk_group < c.n_group, "and so chooses other experts"),
        ("llama", lambda c: c.attention_bias and c.tie_word_embeddings, None),
        ("glm4_moe", lambda c: c.attention_bias, None),
    ],
)
def test_what_llama_cpp_refuses_is_said(
    family: str, accepts: Callable[[Any], bool], warning: str | None, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    exported(family, tmp_path, accepts)
    assert (warning in caplog.text) if warning else "llama.cpp" not in caplog.text


@pytest.mark.parametrize("family", ["granite", "granitemoe"])
def test_multipliers_of_published_granites_are_written(family: str, tmp_path: Path) -> None:
    """Quotients of them, which a file has as float32."""
    found = exported(family, tmp_path, lambda c: c.residual_multiplier == 0.22 and c.logits_scaling == 6.0)
    assert found[f"{family}.embedding_scale"] > 4 and found[f"{family}.logit_scale"] == 6.0
    seed = max(int(each.name) for each in tmp_path.iterdir() if each.is_dir() and each.name.isdigit())
    ids = torch.arange(12)
    found_logits = logits(resolve_model(tmp_path / "m.gguf"), ids)
    assert torch.allclose(found_logits, logits(tmp_path / str(seed), ids), rtol=1e-5, atol=1e-5)


def test_rotated_pairs_take_turns_at_three_axes(tmp_path: Path) -> None:
    """llama.cpp gives pair i to axis i % 3, while i < 3 * sections[axis], and another position beyond."""
    found = exported("qwen3_5_moe_text", tmp_path, lambda c: c.head_dim == 8)
    sections, pairs = found["qwen35moe.rope.dimension_sections"], found["qwen35moe.rope.dimension_count"] // 2
    assert sum(sections) == pairs and all(i < 3 * sections[i % 3] for i in range(pairs))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_groups_of_experts_that_limit_nothing_are_left_out(family: str, tmp_path: Path) -> None:
    found = exported(family, tmp_path, lambda c: c.topk_group == c.n_group == 2)
    assert not any("expert_group" in name for name in found)


def test_the_tokenizer_of_a_file_is_the_models(quantizable: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    export_gguf(quantizable, out)
    found, expected = (OurTokenizer.from_directory(path, (1,)) for path in (resolve_model(out), quantizable))
    for text in ("Grüße 12!<end>", '!" a', "\n\n x"):
        assert found.encode(text) == expected.encode(text)
    assert {*found.eos_token_ids} == {*expected.eos_token_ids} == {1, 257}
    assert found.chat_template == expected.chat_template


@pytest.mark.parametrize("pre", list(_CUTS))
def test_every_way_to_cut_text_is_found_again(pre: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fields = {"model": "gpt2", "pre": pre, "tokens": [*alphabet, "ab"], "merges": ["a b"]}
    architecture = {"glm4": "glm4moe", "chatglm-bpe": "glm4", "minimax-m2": "minimax-m2"}.get(pre, "llama")
    found = fields_of("file", tokenizer_of("file", fields)[0], 300, architecture)
    assert found["pre"] == pre and found["merges"] == ["a b"]
    assert found["tokens"][-1] == "[PAD299]" and found["token_type"][-1] == 5


def test_sentencepiece_is_written_as_scores() -> None:
    pieces = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "ab", "bc", "▁ab"]
    merges = [("b", "c"), ("a", "b"), ("▁", "ab")]
    model = models.BPE(
        {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<s>"])
    fields = fields_of("file", backend, len(pieces), "llama")
    assert fields["model"] == "llama" and fields["add_space_prefix"]
    again = tokenizer_of("file", fields)[0]
    for text in ("abc ab", "cab é", "a  b"):
        assert again.encode(text).ids == backend.encode(text).ids


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {"model_type": "axk1"},
            [],
            "model_type: got 'axk1', which is not written as GGUF; expected llama",
        ),
        ({}, ["--type", "q4_k"], "type: got 'q4_k'; expected q8_0, q5_0, q4_0, iq4_nl, mxfp4, bf16"),
        ({"rope_interleave": False}, [], "can only say RopeConfig(theta=10000.0, factor=None"),
        ({"layer_sizes": [{}, {"moe_intermediate_size": 16}, {}]}, [], "its layers differ in size"),
    ],
)
def test_refusals_come_before_any_work(
    quantizable: Path, changes: dict[str, Any], arguments: list[str], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in quantizable.iterdir():
        (folder / file.name).symlink_to(file)
    raw = json.loads((quantizable / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(raw))
    refused = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "out.gguf"), *arguments])
    assert refused.exit_code == 2 and message in " ".join(refused.output.split()), refused.output
    assert not list(tmp_path.glob("out.gguf*"))


def test_a_failed_write_leaves_nothing(
    quantizable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        export_gguf(quantizable, tmp_path / "out.gguf", None, full)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"needs 0\.0 GB, and 0.0 GB are free"):
        export_gguf(quantizable, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out.gguf*"))
    for name in ("out.bin", "missing/out.gguf"):
        refused = CliRunner().invoke(app, ["export", str(quantizable), str(tmp_path / name)])
        assert refused.exit_code == 2 and "expected a .gguf file in an existing" in refused.output


def test_written_types_are_read(tmp_path: Path) -> None:
    assert set(WRITTEN) <= {*FORMATS, "BF16"}
