"""A field that config.json lacks means what transformers takes it for, or is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from farthing.model.config import ConfigError, ModelConfig

pytest.importorskip("transformers")

from .families import FAMILIES

DRAWS = 6  # of a configuration and of what it lacks
SECTIONS = ("rope_parameters", "compress_rates")


def read(raw: dict[str, Any]) -> ModelConfig:
    """What a file says, but for its tokens, which a tokenizer tells too, and for MTP layers."""
    c = ModelConfig.from_json(raw)
    hidden = c.num_hidden_layers
    halves = dict(mixers=c.mixers[:hidden], feeds=c.feeds[:hidden])
    return replace(c, bos_token_id=None, eos_token_ids=(), num_nextn_predict_layers=0, **halves)


def plain(config: Any) -> dict[str, Any]:
    """The file of a configuration with every field."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def without(raw: dict[str, Any], rng: random.Random) -> list[str]:
    """Remove some fields, one or many; their names."""
    text = raw.get("text_config", raw)
    places = [(each, key) for each in (raw, text) for key in each if each is not raw or raw is text]
    for section in (text.get(name) for name in SECTIONS):
        if isinstance(section, dict):
            inner = [each for each in section.values() if isinstance(each, dict)]
            places += [(each, key) for each in (section, *inner) for key in each]
    # Types of models are no options, and transformers derives V4's rotary width from a head's.
    kept = {"model_type", "text_config"} | ({"head_dim"} if raw["model_type"] == "deepseek_v4" else set())
    places = [(each, key) for each, key in places if key not in kept]
    if raw is not text:
        places.append((raw, "tie_word_embeddings"))
    chosen = rng.sample(places, rng.choice([1, 2, 3, 8, len(places) // 2]))
    for each, key in chosen:
        each.pop(key, None)
    if "tie_word_embeddings" not in raw:  # else text_config's is read, which transformers does not
        text.pop("tie_word_embeddings", None)
    return [key for _, key in chosen]


def agrees(raw: dict[str, Any], kind: type[Any]) -> bool | None:
    """Whether a file and what transformers reads of it say the same; None: one of them is refused."""
    try:
        whole = plain(kind.from_dict(json.loads(json.dumps(raw))))  # type: ignore[attr-defined]
    except Exception:  # of many kinds
        return None
    try:
        found = read(raw)
    except ConfigError:
        return None
    return found == read(whole)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 40))])
def test_absent_fields_are_read_as_in_transformers(seed: int) -> None:
    for name in FAMILIES:
        rng = random.Random(f"{name}{seed}")
        with torch.device("meta"):
            config = FAMILIES[name](rng).config
        for _ in range(DRAWS):
            raw = plain(config)
            absent = without(raw, rng)
            assert agrees(raw, type(config)) is not False, (name, absent)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_absent_field_is_read_as_in_transformers(name: str) -> None:
    with torch.device("meta"):
        config = FAMILIES[name](random.Random(name)).config
    fields = plain(config)
    outcomes = set()
    for field in {*fields, *fields.get("text_config", {})} - {"model_type", "text_config"}:
        raw = plain(config)
        for each in (raw, raw.get("text_config", {})):
            each.pop(field, None)
        if name == "deepseek_v4" and field == "head_dim":  # from which transformers derives the rotary width
            continue
        outcomes.add(agrees(raw, type(config)))
        assert False not in outcomes, field
    assert True in outcomes
