"""config.json: accepted values and error messages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farthing.model.attention import RopeTable, frequencies, score_scale
from farthing.model.config import ModelConfig
from farthing.model.decoder import Rotations
from farthing.model.fields import ConfigError
from farthing.model.forms import GroupedHeads
from farthing.model.types import TYPES
from farthing.model.types.unserved import FILE, unserved
from farthing.ops.arrays import host
from farthing.ops.select import select
from farthing.ops.torch_util import make_batch
from farthing.planner.estimate import published, published_config
from tests.model.answers import configurations
from tests.model.unserved_types import listed
from tests.tiny import V3


def test_v3_values() -> None:
    config = ModelConfig.from_json(V3)
    assert config.attention.cache_width == 576
    assert [config.is_moe(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert score_scale(config) == pytest.approx(0.135234, abs=1e-6)
    # YaRN keeps the fast pairs and divides the slow ones; the ramp runs from pair 10 to pair 23.
    plain = 10000.0 ** (-2 * 9 / 64)
    f = frequencies(config.rope, 64)
    assert f[9] == pytest.approx(plain, rel=1e-5)
    assert f[11] < 10000.0 ** (-2 * 11 / 64)
    assert f[23] == pytest.approx(10000.0 ** (-2 * 23 / 64) / 40, rel=1e-5)
    # cos and sin are multiplied by m(mscale) / m(mscale_all_dim) = 1.
    table = RopeTable(config, 0)
    table.reach(1)
    assert table.values[0, 0].tolist() == [1.0] * 32


def test_rotations_are_computed_as_far_as_steps_reach() -> None:
    """To the bit what one computation of all positions gives."""
    scaling = V3["rope_scaling"] | dict(original_max_position_embeddings=250)
    config = ModelConfig.from_json(V3 | {"max_position_embeddings": 10000, "rope_scaling": scaling})
    rotations = Rotations(config, select("cpu", threads=1))
    (table,) = rotations._own.values()
    table.values[:] = np.nan
    for length in (1, 4097, 4097, 10000):
        rotations.reach(make_batch([1], [length - 1], [[0] * length], 1))
        computed = np.isfinite(table.values).all((0, 2))
        assert computed.sum() == min(-(-length // 4096) * 4096, 10000)
    turns = np.arange(10000, dtype=np.float32)[:, None] * frequencies(config.rope, 64)
    assert (table.values == np.stack((np.cos(turns), np.sin(turns)))).all()
    assert all(np.shares_memory(host(each), table.values) for each in rotations.tables)


def test_aliases_of_newer_files() -> None:
    raw = {
        k: v
        for k, v in V3.items()
        if k not in ("n_routed_experts", "num_nextn_predict_layers", "rope_scaling")
    }
    raw |= dict(num_local_experts=256, num_mtp_layers=1, eos_token_id=[1, 2])
    raw["rope_parameters"] = dict(V3["rope_scaling"], rope_type="yarn", rope_theta=50000.0)  # type: ignore[call-overload]
    config = ModelConfig.from_json(raw)
    assert (config.n_routed_experts, config.num_nextn_predict_layers) == (256, 1)
    assert (config.eos_token_ids, config.rope.theta) == ((1, 2), 50000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="abacus"), r"model_type: got 'abacus'; expected one of .*deepseek_v3[^?]*$"),
        (dict(model_type="deepseek_v33"), r"expected one of .*; did you mean 'deepseek_v3'\?"),
        (dict(hidden_size=None), r"hidden_size: got null; expected a positive integer"),
        (dict(hidden_size=-1), r"hidden_size: got -1; expected a positive integer"),
        (dict(qk_rope_head_dim=63), r"qk_rope_head_dim: got 63; expected an even number"),
        (dict(rope_scaling=dict(type="longrope")), r"rope_scaling.type: got 'longrope'; expected 'yarn'"),
        (dict(n_group=7), r"n_group: got 7; expected a divisor of n_routed_experts = 256"),
        (
            dict(n_group=256, topk_group=8),
            r"n_group: got 256; expected at most 128, half of n_routed_experts",
        ),
        (dict(topk_group=9), r"topk_group: got 9; expected 1…8"),
        (dict(topk_method="best"), r"topk_method: got 'best'; expected 'noaux_tc'"),
        (dict(hidden_act="gelu"), r"hidden_act: got 'gelu'; expected 'silu'"),
        (dict(model_type="glm4_moe_lite", mlp_layer_types=["sparse"] * 60), r"types has 60 entries; .*, 61"),
        (
            dict(model_type="glm_moe_dsa", indexer_types=["full"] * 63),
            r"indexer_types has 63 entries; .*, 61",
        ),
        (
            dict(model_type="glm_moe_dsa", index_topk_pattern="FS"),
            r"index_topk_pattern has 2 entries; .*, 61",
        ),
        (
            dict(model_type="glm_moe_dsa", num_hidden_layers=None),
            r"num_hidden_layers: got null; expected a pos",
        ),
        (dict(model_type="deepseek_v32"), r"index_topk is missing; expected a positive integer"),
        (dict(model_type="glm_moe_dsa", index_topk=None), r"index_topk: got null; expected a pos"),
        (dict(farthing=dict(head="int4")), r"farthing\.head: got 'int4'; expected 'int8'"),
        (dict(scoring_func="tanh"), r"scoring_func: got 'tanh'; expected 'sigmoid' or 'softmax'"),
    ],
)
def test_errors_name_field_value_and_accepted_values(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(V3 | change)


def test_types_of_transformers_name_what_is_not_served() -> None:
    for name, needs in unserved().items():
        assert name not in TYPES  # a type that is added leaves the list
        with pytest.raises(ConfigError) as refused:
            ModelConfig.from_json({"model_type": name})
        assert f"got '{name}', whose {needs} not served yet; expected one of" in str(refused.value)
        assert "did you mean" not in str(refused.value)


@pytest.mark.slow
def test_the_list_of_refused_types_is_that_of_the_installed_transformers() -> None:
    """Every week with the newest version: `python -m tests.model.unserved_types` writes the list again."""
    pytest.importorskip("transformers")
    assert json.loads(FILE.read_text()) == listed()


@pytest.mark.parametrize(
    ("positions", "scaling", "longest"),
    [
        (40960, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
        (40960, dict(type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
        (32768, dict(rope_type="yarn", factor=2.0), 65536),
        (131072, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
        (262144, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 262144),
        (1000, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 1000),
        (40960, dict(rope_type="linear", factor=4.0), 40960),
        (40960, None, 40960),
    ],
)
def test_yarn_lengthens_the_context(positions: int, scaling: dict[str, object] | None, longest: int) -> None:
    """As Qwen's instructions for long texts: the file's own number stays, and rope_scaling is added."""
    raw = (published_config("qwen3-8b") or {}) | dict(max_position_embeddings=positions, rope_scaling=scaling)
    assert ModelConfig.from_json(raw).max_position_embeddings == longest


def test_correction_range_of_yarn_is_rounded_unless_truncate_is_false() -> None:
    """Fast and slow pairs as in Hugging Face: the ramp starts and ends between two pairs."""
    scaling = dict(V3["rope_scaling"], truncate=False)
    exact = ModelConfig.from_json(V3 | {"rope_scaling": scaling}).rope
    rounded = ModelConfig.from_json(V3 | {"rope_scaling": scaling | {"truncate": True}}).rope
    assert rounded == ModelConfig.from_json(V3).rope != exact
    pairs = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    turns = [64 * math.log(4096 / (beta * 2 * math.pi)) / (2 * math.log(10000.0)) for beta in (32, 1)]
    ramp = ((np.arange(32) - turns[0]) / (turns[1] - turns[0])).clip(0, 1)
    assert frequencies(exact, 64) == pytest.approx(pairs * (1 - ramp) + pairs / 40 * ramp, rel=1e-5)
    assert frequencies(rounded, 64) != pytest.approx(frequencies(exact, 64), rel=1e-2)
    with pytest.raises(ConfigError, match=r"rope_scaling\.truncate: got 'no'; expected true or false"):
        ModelConfig.from_json(V3 | {"rope_scaling": scaling | {"truncate": "no"}})
    # An original context in which the first pair does not turn twice, as transformers computes it.
    short = V3["rope_scaling"] | dict(truncate=False, beta_slow=2, original_max_position_embeddings=8)
    found = frequencies(ModelConfig.from_json(V3 | {"rope_scaling": short}).rope, 64)
    assert found == pytest.approx(pairs, rel=1e-5)


def test_directory_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"not valid JSON.*copy it again"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(V3))
    assert ModelConfig.from_directory(tmp_path).hidden_size == 7168


def test_layer_lists_of_newer_files_become_prefixes() -> None:
    raw = {k: v for k, v in V3.items() if k != "first_k_dense_replace"} | dict(model_type="glm4_moe_lite")
    raw["mlp_layer_types"] = ["dense"] * 2 + ["sparse"] * 59
    config = ModelConfig.from_json(raw)
    assert [config.is_moe(i) for i in (0, 1, 2, 60)] == [False, False, True, True]
    raw["mlp_layer_types"] = ["sparse", "dense", "dense"] + ["sparse"] * 58
    with pytest.raises(ConfigError, match=r"mlp_layer_types: got .*; expected dense layers followed by"):
        ModelConfig.from_json(raw)


def test_a_dense_model_may_have_any_groups_of_experts() -> None:
    """As transformers writes the file of one: its defaults are those of a router."""
    raw = V3 | dict(first_k_dense_replace=61, num_nextn_predict_layers=0, n_group=1, topk_group=4)
    assert not ModelConfig.from_json(raw).moe_layers
    with pytest.raises(ConfigError, match="topk_group: got 4"):
        ModelConfig.from_json(raw | dict(num_nextn_predict_layers=1))


def test_wrapper_of_another_language_model_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"text_config.model_type: got 'mistral'; expected 'mistral4'"):
        ModelConfig.from_json(dict(model_type="mistral3", text_config=dict(model_type="mistral")))


@pytest.mark.parametrize("name", ["kimi_k25", "mistral3"])
def test_tied_embeddings_of_the_wrapper_win(name: str) -> None:
    inner = "mistral4" if name == "mistral3" else "kimi_k2"
    text = V3 | dict(model_type=inner, tie_word_embeddings=False)
    for tied in (True, False):
        raw = dict(model_type=name, text_config=text | dict(tie_word_embeddings=not tied))
        assert ModelConfig.from_json(raw).head.tie_word_embeddings is not tied
        assert ModelConfig.from_json(raw | dict(tie_word_embeddings=tied)).head.tie_word_embeddings is tied


def test_only_v3_layers_are_compressed() -> None:
    assert ModelConfig.from_json(V3).is_plain
    assert ModelConfig.from_json(V3 | dict(model_type="kimi_k2")).is_plain
    assert not ModelConfig.from_json(V3 | dict(model_type="axk1")).is_plain
    assert not ModelConfig.from_json(dict(model_type="kimi_k25", text_config=V3)).is_plain


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize("model", ["deepseek-v3", "glm-4.7-flash", "longcat-flash"])
def test_biases_are_refused_by_name(name: str, model: str) -> None:
    raw = published_config(model)
    assert raw is not None
    ModelConfig.from_json(raw | {name: False})
    with pytest.raises(ConfigError, match=f"{name}: got True; expected false"):
        ModelConfig.from_json(raw | {name: True})


@pytest.mark.parametrize(
    ("method", "groups", "kept", "score"),
    [("noaux_tc", 8, 4, "top2_sum"), ("group_limited_greedy", 8, 4, "max"), ("greedy", 1, 1, "max")],
)
def test_routing_of_each_method(method: str, groups: int, kept: int, score: str) -> None:
    """Greedy routing has no groups, although the config has their fields."""
    model_type = "deepseek_v3" if method == "noaux_tc" else "deepseek_v2"
    config = ModelConfig.from_json(V3 | dict(model_type=model_type, topk_method=method))
    assert config.experts is not None
    spec = config.experts.router
    assert (spec.num_groups, spec.top_k_groups, spec.group_score) == (groups, kept, score)


@pytest.mark.parametrize("name", published())
def test_published_configs_are_accepted_as_released(name: str) -> None:
    assert ModelConfig.from_json(published_config(name) or {}).num_hidden_layers > 0


def test_minimax_m2_is_released_with_a_field_of_shared_experts_that_it_lacks() -> None:
    raw = published_config("minimax-m2")
    assert raw is not None and raw["shared_intermediate_size"] == 0
    assert ModelConfig.from_json(raw).shared_size == 0


GEMMA = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=8, vocab_size=96,
    max_position_embeddings=128,
)  # fmt: skip
GEMMA_4 = GEMMA | dict(hidden_size_per_layer_input=0)
MOE_4 = GEMMA_4 | dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32)


@pytest.mark.parametrize(
    ("name", "given"), [("gemma3_text", GEMMA), ("gemma4_text", GEMMA_4), ("gemma4_text", MOE_4)]
)
def test_fields_that_gemma_leaves_out_are_those_of_transformers(name: str, given: dict[str, Any]) -> None:
    auto: Any = pytest.importorskip("transformers").AutoConfig
    whole = json.loads(auto.for_model(name, **given).to_json_string(use_diff=False))
    tokens = {n: whole[n] for n in ("bos_token_id", "eos_token_id")}
    assert ModelConfig.from_json({"model_type": name, **given, **tokens}) == ModelConfig.from_json(whole)


@pytest.mark.parametrize("base", [5e4, None])
def test_a_base_of_gemma_3_is_that_of_its_kind_of_layers(base: float | None) -> None:
    raw = GEMMA | dict(model_type="gemma3_text", rope_theta=base, rope_local_base_freq=None)
    thetas = {m.window is None: m.rope.theta for m in ModelConfig.from_json(raw).mixers}
    assert thetas == {True: base or 1e6, False: 1e4}


PARTIAL = {"glm-4.5", "minimax-m2"}


@pytest.mark.parametrize(
    "name",
    ["glm-4.5", "granite-3.1-3b-a800m", "llama-3.1-8b", "minimax-m2", "mistral-7b-v0.3", "mixtral-8x7b",
     "olmoe-1b-7b", "qwen3-8b", "qwen3-30b-a3b", "smollm3-3b"],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_types_that_rotate_whole_heads_ignore_partial_rotary_factor(name: str, nested: bool) -> None:
    raw = published_config(name) or {}
    share = {"partial_rotary_factor": 0.25}
    raw |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | share} if nested else share
    heads = ModelConfig.from_json(raw).attention
    assert isinstance(heads, GroupedHeads)
    assert heads.rotary_width == heads.head_dim // (4 if name in PARTIAL else 1)


@pytest.mark.parametrize("place", ["rope_parameters", None])
def test_a_rotation_that_transformers_does_not_compute_is_refused(place: str | None) -> None:
    raw = configurations()["tiny solar_open"]
    share = {"partial_rotary_factor": 0.5}
    section = {place: {"rope_type": "default", "rope_theta": 1e4, **share}} if place else share
    with pytest.raises(ConfigError, match=r"partial_rotary_factor: got 0\.5; expected 1"):
        ModelConfig.from_json(raw | section)
