"""Damaged tokenizer files: a model directory loads, or a ValueError names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farthing.engine.tokenizer import Tokenizer, generation_defaults
from tests.server.harness import tokenizer

NAMES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.json")
VALUES: dict[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "default", "template": "x"}],
    },
    "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.6},
    "chat_template.json": {"chat_template": "x"},
}
ODD = st.one_of(
    st.sampled_from([None, True, -1, 2**70, "", "{% if %}", [], {}, [[]], [1, "x"], {"content": 5}]),
    st.recursive(
        st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5
    ),
)


def write(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer().backend.to_str())
    for name, value in VALUES.items():
        (path / name).write_text(json.dumps(value))


def load(path: Path) -> None:
    """Load the directory; only a ValueError that names a file is allowed."""
    try:
        loaded = Tokenizer.from_directory(path, eos_token_ids=(1,))
        loaded.encode("x")
        generation_defaults(path)
    except ValueError as error:
        assert str(path) in str(error), error


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(NAMES), st.integers(0, 2000), st.binary(max_size=6), st.integers(0, 8))
def test_damaged_bytes(tmp_path: Path, name: str, at: int, new: bytes, cut: int) -> None:
    write(tmp_path)
    data = (tmp_path / name).read_bytes()
    at %= len(data)
    (tmp_path / name).write_bytes(data[:at] + new + data[at + cut :])
    load(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(VALUES)), st.data())
def test_unexpected_values(tmp_path: Path, name: str, data: st.DataObject) -> None:
    write(tmp_path)
    document = dict(VALUES[name])
    document[data.draw(st.sampled_from(sorted(document)))] = data.draw(ODD)
    (tmp_path / name).write_text(json.dumps(document))
    load(tmp_path)


@pytest.mark.parametrize("added", [True, False])
def test_distant_token_ids(tmp_path: Path, added: bool) -> None:
    """Such a file took 12 s to load: the library walks through all ids when it writes a tokenizer."""
    write(tmp_path)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text())
    if added:
        document["added_tokens"].append(document["added_tokens"][0] | {"id": 2**31, "content": "<far>"})
    else:
        document["model"]["vocab"]["<far>"] = 2**31
    file.write_text(json.dumps(document))
    message = r"tokenizer.json has token ids up to 2,147,483,648; expected less than 1,\d+,\d+ for \d+ tokens"
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_files_that_truncate_or_pad(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "tokenizer.json"
    plain = Tokenizer.from_directory(tmp_path).encode("hello")
    document = json.loads(file.read_text())
    document["truncation"] = {
        "direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    document["padding"] = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "a",
    }  # fmt: skip
    file.write_text(json.dumps(document))
    assert Tokenizer.from_directory(tmp_path).encode("hello") == plain


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", ["", "null", "[" * 100_000, "[]", '{"a": ' * 50_000, "\ufeff{}"])
def test_whole_files(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path)
    (tmp_path / name).write_text(content)
    load(tmp_path)
