"""Which GGUF files of a folder or repository are a model, and which one is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from farthing.quants import choose, parts_of, variants_in

UNSLOTH = {
    "Qwen3-30B-A3B-Q4_K_M.gguf": 18, "Qwen3-30B-A3B-UD-Q4_K_XL.gguf": 17, "Qwen3-30B-A3B-Q8_0.gguf": 32,
    "Qwen3-30B-A3B-IQ4_NL.gguf": 17, "BF16/Qwen3-30B-A3B-BF16-00001-of-00002.gguf": 50,
    "BF16/Qwen3-30B-A3B-BF16-00002-of-00002.gguf": 11, "mmproj-BF16.gguf": 1, "imatrix_unsloth.gguf": 1,
    "config.json": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Meta-Llama-3-8B-Instruct.Q4_K_M.gguf", "Q4_K_M"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("gpt-oss-20b-F16.gguf", "F16"),
        ("llama-2-7b.q4_0.gguf", "Q4_0"),
        ("Q2_K_L/DeepSeek-R1-00001-of-00005.gguf", "Q2_K_L"),
        ("UD-IQ1_S/DeepSeek-R1-UD-IQ1_S-00001-of-00003.gguf", "UD-IQ1_S"),
        ("qwen3-8b.gguf", "qwen3-8b"),
    ],
)
def test_labels(name: str, label: str) -> None:
    assert [v.label for v in variants_in({name: 1})] == [label]


def test_parts_are_one_model_and_other_files_none() -> None:
    found = {v.label: (len(v.files), v.size) for v in variants_in(UNSLOTH)}
    assert found == {
        "Q4_K_M": (1, 18), "UD-Q4_K_XL": (1, 17), "Q8_0": (1, 32), "IQ4_NL": (1, 17), "BF16": (2, 61),
    }  # fmt: skip
    assert parts_of("a-00001-of-00002.gguf") == ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")


@pytest.mark.parametrize(
    ("wanted", "label"),
    [("", "Q4_K_M"), ("q8_0", "Q8_0"), ("Q4_K_XL", "UD-Q4_K_XL"), ("Qwen3-30B-A3B-IQ4_NL.gguf", "IQ4_NL")],
)
def test_the_wanted_or_the_first_of_the_defaults(wanted: str, label: str) -> None:
    assert choose("owner/name", UNSLOTH, wanted).label == label


def test_what_there_is_is_listed() -> None:
    sizes = {"a-Q2_K.gguf": 2 * 10**9, "a-Q3_K_M.gguf": 3 * 10**9}
    listed = r"has the GGUF models Q2_K \(2\.0 GB\), Q3_K_M \(3\.0 GB\); expected o/n:NAME with one of these"
    for wanted in ("", "Q4_0"):
        with pytest.raises(FileNotFoundError, match=listed):
            choose("o/n", sizes, wanted)
    assert choose("o/n", {"only.gguf": 1}).files == ("only.gguf",)
    with pytest.raises(FileNotFoundError, match="models none"):
        choose("o/n", {"mmproj-F16.gguf": 1})
    twice = {"a-Q4_0.gguf": 1, "b-Q4_0.gguf": 1}
    with pytest.raises(FileNotFoundError, match="Q4_0"):
        choose("o/n", twice, "Q4_0")
    assert choose("o/n", twice, "b-Q4_0.gguf").files == (str(Path("b-Q4_0.gguf")),)


def test_a_folder_of_several_models_needs_a_name() -> None:
    sizes = {"smol-Q4_K_M.gguf": 1, "gemma-Q8_0.gguf": 2}
    listed = (
        r"models smol-Q4_K_M.gguf, gemma-Q8_0.gguf|models gemma-Q8_0.gguf, smol-Q4_K_M.gguf; expected f:NAME"
    )
    with pytest.raises(FileNotFoundError, match=listed):
        choose("f", sizes, one=True)
    assert choose("f", sizes, "q8_0", one=True).label == "Q8_0"
    assert choose("f", sizes, "smol-Q4_K_M.gguf", one=True).label == "Q4_K_M"
    assert choose("f", {"smol-Q4_K_M.gguf": 1, "smol-Q8_0.gguf": 2}, one=True).label == "Q4_K_M"
    assert choose("f", sizes).label == "Q4_K_M"  # of a repository, which is one model
