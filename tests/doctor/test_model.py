"""`farthing check` on working and broken directories."""

from __future__ import annotations

import json
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.reader import Checkpoint
from farthing.doctor.model import MOST_BYTES, check, check_chat_format, float32_bytes, logits_of, shortened
from farthing.hub import resolve_model
from farthing.model.config import ModelConfig
from farthing.model.forms import LatentHeads
from farthing.model.load import config_of
from farthing.ops.select import select
from farthing.ops.weights import quantize_int8
from farthing.planner.estimate import published_config

pytest.importorskip("transformers")

from tests.conversation.published import SHAPES
from tests.engine.shapes import tokenizer
from tests.parity.families import build


def states(path: Path, layers: int | None = None) -> dict[str, tuple[str, str]]:
    found = check(path, select("reference", dtype=torch.float32), layers)
    return {f.name: (f.state, f.detail) for f in found}


@pytest.mark.parametrize(("name", "layers"), [("mite", 2), ("tests/assets/mite-v4", 1)])
def test_the_embedded_models_pass(name: str, layers: int) -> None:
    found = states(resolve_model(name), layers)
    names = ("configuration", "tokenizer", "chat format", "tensors", "first layers")
    assert [found[part][0] for part in names] == ["ok"] * 5
    assert found["transformers"][0] in ("ok", "skipped")
    if name == "mite":
        assert found["chat format"][1] == "deepseek_v3"  # its template is the packaged one


@pytest.mark.parametrize(
    "name",
    [
        *("glm4_moe_lite", "deepseek_v32", "glm_moe_dsa", "longcat_flash", "kimi_k25", "mistral4"),
        *("mistral3", "smollm3", "glm4_moe", "minimax_m2", "granitemoe", "gpt_oss"),
        *("qwen3_next", "qwen3_5_moe"),
    ],
)
def test_first_layers_agree_with_transformers(name: str, tmp_path: Path) -> None:
    build(name, 1, tmp_path)
    found = states(tmp_path)
    assert found["transformers"][0] == found["tensors"][0] == "ok", found
    assert found["tokenizer"][0] == "failed" and "tokenizer.json" in found["tokenizer"][1]


@pytest.mark.parametrize("inputs", ["token", "tensor"])
def test_rounded_inputs_of_transformers_are_no_difference(
    inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rounds them for every token as llm-compressor's W8A8 asks for, the reference ops only to ranges."""
    build("qwen3", 1, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    modules: dict[str, ct.GroupKey | None] = {"lm_head": None}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        weight = quantize_int8(tensors.pop(name))
        modules[module] = ct.key_of(weight, inputs)
        tensors |= ct.encode(module, weight)
        if inputs == "tensor":
            tensors[f"{module}.input_scale"] = torch.tensor([0.02])
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": ct.quantization_config(modules)})
    )
    found = states(tmp_path)
    assert found["transformers"][0] == "ok", found
    monkeypatch.setattr("farthing.doctor.model.logits_of", lambda *given: 1.005 * logits_of(*given))
    state, detail = states(tmp_path)["transformers"]
    assert (state, detail[-15:]) == ("failed", "less than 1e-03")
    difference = re.search(r"differ by (\S+) of the largest", detail)
    assert difference and float(difference[1]) == pytest.approx(0.005, rel=0.2)


def test_inputs_that_auto_round_rounds_are_not_compared(tmp_path: Path) -> None:
    build("qwen3", 1, tmp_path)
    file = tmp_path / "config.json"
    section = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp", "act_bits": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": section}))
    assert states(tmp_path)["transformers"] == (
        "skipped", "AutoRound's kernels round inputs to 4 bits, which the reference ops do not"
    )  # fmt: skip


def test_weights_that_transformers_takes_for_numbers_are_not_compared(tmp_path: Path) -> None:
    build("smollm3", 0, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "modelopt", "quant_algo": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    expected = ("skipped", "it takes weights of quant_method 'modelopt' for plain numbers")
    assert states(tmp_path)["transformers"] == expected


def test_wrong_indexer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the checkpoint's index_topk is above the number of tokens."""
    build("deepseek_v32", 1, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"index_topk": 2048}))
    assert states(tmp_path)["transformers"][0] == "ok"

    def wrong(checkpoint: Checkpoint) -> ModelConfig:
        config = config_of(checkpoint)
        assert config.index is not None
        heads = replace(config.latent, index=replace(config.index, interleaved=True))
        return replace(config, mixers=(heads,) * len(config.mixers))

    monkeypatch.setattr("farthing.doctor.model.config_of", wrong)
    assert states(tmp_path)["transformers"][0] == "failed"


@pytest.mark.parametrize("name", ["mistral4", "mistral3"])
@pytest.mark.parametrize("wrong", [dict(beta=0.2), dict(original_max_position=1020), None])
def test_wrong_query_scaling_is_found(
    name: str, wrong: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts at a position beyond the tokens that are compared from 0 on."""
    build(name, 1, tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    text = raw.get("text_config", raw)
    text["max_position_embeddings"] = 4096
    text["rope_parameters"]["original_max_position_embeddings"] = 1024
    file.write_text(json.dumps(raw))
    state, detail = states(tmp_path)["transformers"]
    assert state == "ok" and "at position 1,016" in detail

    def changed(checkpoint: Checkpoint) -> ModelConfig:
        config = config_of(checkpoint)
        own = config.latent.query_scaling
        assert own is not None
        scaling = None if wrong is None else replace(own, **wrong)
        mixers = (replace(cast(LatentHeads, mixer), query_scaling=scaling) for mixer in config.mixers)
        return replace(config, mixers=tuple(mixers))

    monkeypatch.setattr("farthing.doctor.model.config_of", changed)
    state, detail = states(tmp_path)["transformers"]
    assert state == "failed" and "differ by" in detail


def test_unknown_type_is_named_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cohere2"}))
    assert "form of layers is not served yet" in states(tmp_path)["configuration"][1]


def test_layers_without_experts_and_large_ones_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("kimi_k25", 1, tmp_path)
    assert "1 with experts" in states(tmp_path)["first layers"][1]
    assert "0 with experts: such a layer takes" in states(tmp_path, 1)["first layers"][1]
    monkeypatch.setattr("farthing.doctor.model.MOST_BYTES", 1)
    state, detail = states(tmp_path)["first layers"]
    assert state == "skipped" and "GiB in float32" in detail and "--layers 1 runs" in detail


def test_broken_weights_and_unknown_types_are_named(tmp_path: Path) -> None:
    build("glm4_moe_lite", 1, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    tensors["model.layers.0.self_attn.o_proj.weight"] *= float("nan")
    save_file(tensors, file, {"format": "pt"})
    assert "not finite" in states(tmp_path)["first layers"][1]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "cohere2"}))
    found = states(tmp_path)
    assert found["configuration"][0] == "failed"
    assert "form of layers is not served yet" in found["configuration"][1]
    assert "first layers" not in found


def change(path: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace or remove a tensor of a checkpoint."""
    tensors = {k: v.clone() for k, v in load_file(path / "model.safetensors").items()}
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value.contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_damage_behind_the_first_layers_is_found(tmp_path: Path) -> None:
    model = build("deepseek_v32", 1, tmp_path)
    last = f"model.layers.{model.config.num_hidden_layers - 1}"
    name = f"{last}.self_attn.kv_b_proj.weight"
    whole = load_file(tmp_path / "model.safetensors")[name]
    for value, problem in ((whole.T, "has shape"), (None, "is missing")):
        change(tmp_path, name, value)
        found = states(tmp_path, 1)
        assert found["first layers"][0] == "ok"
        assert found["tensors"][0] == "failed" and f"{name} {problem}" in found["tensors"][1]
    change(tmp_path, name, whole)
    change(tmp_path, f"{last}.mlp.experts.3.up_proj.weight", None)
    assert "experts.3.up_proj.weight is missing" in states(tmp_path, 1)["tensors"][1]


def test_missing_expert_of_a_stack_is_found(tmp_path: Path) -> None:
    model = build("mistral4", 1, tmp_path)
    name = f"model.layers.{model.config.num_hidden_layers - 1}.mlp.experts.down_proj"
    change(tmp_path, name, load_file(tmp_path / "model.safetensors")[name][:-1])
    state, detail = states(tmp_path, 1)["tensors"]
    assert state == "failed" and f"{name} has {model.config.n_routed_experts - 1} experts" in detail


def test_tokenizer_and_template_of_another_model_are_found(tmp_path: Path) -> None:
    build("glm4_moe_lite", 1, tmp_path)
    mite = resolve_model("mite")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((mite / name).read_bytes())
    state, detail = states(tmp_path)["tokenizer"]
    assert state == "failed" and "config.json's vocab_size" in detail
    copy = tmp_path / "mite"
    shutil.copytree(mite, copy)
    file = copy / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    for template, problem in (
        ("{{ messages[0].content }}<|im_end|>", "writes '<|im_end|>'"),
        ("{{ bos_token }}", "expected the turn's text"),
        ("{% if %}", "template"),
    ):
        file.write_text(json.dumps(raw | {"chat_template": template}))
        state, detail = states(copy, 1)["chat format"]
        assert state == "failed" and problem in detail


def test_large_model_is_checked_by_its_dense_layers() -> None:
    raw = published_config("deepseek-v3")
    assert raw is not None
    config = ModelConfig.from_json(raw)
    assert shortened(config, None).num_hidden_layers == 2
    assert float32_bytes(shortened(config, None)) < MOST_BYTES
    assert shortened(config, 4).num_hidden_layers == 4


def test_chat_format_says_what_the_template_expects() -> None:
    glm = tokenizer(template=SHAPES["glm47"].source)
    said = check_chat_format(glm, "glm4_moe_lite")
    assert said == "its own template, which reads the arguments of earlier calls as an object"
    silent = tokenizer(template="{% for m in messages %}<|user|>{{ m.content }}{% endfor %}")
    said = check_chat_format(silent, "deepseek_v3")
    assert said == "its own template, which prints no earlier calls; deepseek_v4 is used with tools"


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LONG = "{{ 'x' * 10**10 }}"


@pytest.mark.parametrize(("work", "when"), [(LOOPS, "later"), (LONG, "later"), (LONG, "always")])
def test_work_of_a_template_is_bounded(work: str, when: str) -> None:
    """Also of one that harms only prompts, and none of the conversations by which its habits are found."""
    turns = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    hostile = work if when == "always" else "{% if 'fox' in messages[0].content %}" + work + "{% endif %}"
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(ValueError, match=r"template|messages"):
        check_chat_format(tokenizer(template=turns + hostile), "deepseek_v3")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 5 and after.ru_maxrss - before.ru_maxrss < 2**20  # KiB
