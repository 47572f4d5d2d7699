"""A tiktoken vocabulary, converted and compared with merging by rank."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from farthing.engine.tiktoken import convert_directory, pieces, read_ranks
from farthing.engine.tokenizer import Tokenizer

WORDS = ["the", "then", " the", "ing", "king", "你好", "好", "12", "123", "'s", "naïve", " naïve"]
NAMED = {"<|im_end|>": 1, "[BOS]": 0}
PLAIN = {"<|tool_call_begin|>": 2, "</think>": 5}  # decoding keeps these


def vocabulary() -> dict[bytes, int]:
    """All bytes, then every word built by appending one byte at a time: each prefix is a token."""
    ranks = {bytes([b]): b for b in range(256)}
    for word in WORDS:
        data = word.encode()
        for end in range(2, len(data) + 1):
            ranks.setdefault(data[:end], len(ranks))
    return ranks


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    ranks = vocabulary()
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    added = {str(len(ranks) + i): {"content": name, "special": True} for name, i in NAMED.items()}
    added |= {str(len(ranks) + i): {"content": name, "special": False} for name, i in PLAIN.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return tmp_path


def test_error_names_the_command_that_converts_it(directory: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m farthing\.engine\.tiktoken "):
        Tokenizer.from_directory(directory)
    command = [sys.executable, "-m", "farthing.engine.tiktoken", str(directory)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.vocab_size == len(vocabulary()) + 256
    assert tokenizer.backend.token_to_id("<|im_end|>") == len(vocabulary()) + 1


def test_only_tokens_listed_as_special_are_skipped(directory: Path) -> None:
    convert_directory(directory)
    tokenizer = Tokenizer.from_directory(directory)
    first = len(vocabulary())
    for name, i in (NAMED | PLAIN).items():
        assert tokenizer.backend.token_to_id(name) == first + i
    ids = tokenizer.encode("the</think><|tool_call_begin|>x<|im_end|>", add_special_tokens=False)
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "the</think><|tool_call_begin|>x"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the</think><|tool_call_begin|>x<|im_end|>"
    assert first + 3 in tokenizer.special_ids and first + 5 not in tokenizer.special_ids
    (directory / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"7": "x"}}')
    with pytest.raises(ValueError, match=r"added_tokens_decoder\['7'\]: got 'x'; expected an object"):
        convert_directory(directory)


@pytest.mark.parametrize("word", [*WORDS, "the", "x", "thethen"])
def test_words_merge_by_rank(directory: Path, word: str) -> None:
    convert_directory(directory)
    backend = Tokenizer.from_directory(directory).backend
    ranks = vocabulary()
    expected = [ranks[p] for p in pieces(word.encode(), ranks, len(ranks))]
    if not (word.endswith("好") or word.isdigit()):  # split before merging: the same for one word
        assert backend.encode(word).ids == expected
    assert backend.decode(backend.encode(word).ids) == word


def test_text_is_split_like_kimis(directory: Path) -> None:
    convert_directory(directory)
    backend = Tokenizer.from_directory(directory).backend
    cut = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("the你好King's 12345\n\n x")]  # type: ignore[union-attr]
    sizes = [len(word.encode()) for word in ("the", "你好", "King's", " ", "123", "45", "\n\n", " x")]
    assert [len(c) for c in cut] == sizes


def test_error_for_a_broken_file_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "tiktoken.model"
    file.write_bytes(b"YQ== 0\nnot-base64! 1\n")
    with pytest.raises(ValueError, match=r"line 2: got b'not-base64! 1'"):
        read_ranks(file)
    file.write_bytes(b"YQ== 0\nYg== 2\n")
    with pytest.raises(ValueError, match=r"ranks have gaps; expected 0…1"):
        read_ranks(file)


def test_empty_vocabulary_and_list_as_configuration_are_rejected(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: expected a JSON object, found list"):
        convert_directory(directory)
    (directory / "tokenizer_config.json").unlink()
    (directory / "tiktoken.model").write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"tiktoken.model lists no token; expected"):
        convert_directory(directory)
