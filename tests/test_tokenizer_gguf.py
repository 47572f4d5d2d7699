"""Tokenizers from GGUF metadata: SentencePiece's merges by score, and how byte-level text is cut."""

from __future__ import annotations

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from farthing.tokenizer_gguf import _CUTS, _SAME, tokenizer_of

BYTES = [f"<0x{i:02X}>" for i in range(256)]


def sentencepiece(**changes: object) -> dict[str, object]:
    pieces = {"▁": -5.0, "a": -6.0, "b": -7.0, "c": -8.0, "ab": -1.0, "bc": -0.5, "▁a": -2.0, "▁ab": -3.0}
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces, "<mark>"]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + list(pieces.values()) + [0.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def test_sentencepiece_merges_the_best_score_first() -> None:
    fields = sentencepiece()
    tokens = fields["tokens"]
    assert isinstance(tokens, list)
    tokenizer, config = tokenizer_of("file", fields)

    def pieces(text: str) -> list[str]:
        return [tokens[i] for i in tokenizer.encode(text, add_special_tokens=False).ids]

    assert pieces("abc") == ["▁a", "bc"]  # bc has the best score; ab is not possible any more
    assert pieces("ab ab") == ["▁ab", "▁ab"]
    assert pieces("é<mark>b") == ["▁", "<0xC3>", "<0xA9>", "<mark>", "▁", "b"]
    for text in ("abc", " ab  c", "é\n"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert config["add_bos_token"] and config["bos_token"] == "<s>"
    bare, _ = tokenizer_of("file", sentencepiece(add_space_prefix=False))
    assert bare.decode(bare.encode("ab", add_special_tokens=False).ids) == "ab"
    assert [tokens[i] for i in bare.encode("ab", add_special_tokens=False).ids] == ["ab"]


def test_control_tokens_are_special_and_those_of_users_are_text() -> None:
    kinds = [2, 3, 3] + [6] * 256 + [1] * 8
    for kind, shown in ((3, "a"), (4, "a<mark>")):
        tokenizer, _ = tokenizer_of("file", sentencepiece(token_type=[*kinds, kind]))
        ids = tokenizer.encode("a<mark>", add_special_tokens=False).ids
        assert tokenizer.decode(ids) == shown


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("deepseek-v3", "x=1234;你好abc", ["x", "=", "123", "4", ";", "你好", "abc"]),
        ("glm4", "It's 1234", ["It", "'s", "Ġ", "123", "4"]),
        ("minimax-m2", "camelCase don't", ["camel", "Case", "Ġdon't"]),
        ("gpt-4o", "camelCase don't 1234", ["camel", "Case", "Ġdon't", "Ġ", "123", "4"]),
        ("tekken", "camelCase 12", ["camel", "Case", "Ġ", "1", "2"]),
        ("deepseek-llm", "Don't x=12;你好", ["Don", "'", "t", "Ġx", "=", "1", "2", ";", "你好"]),
        ("deepseek-coder", "Don't x=12", ["Don", "'", "t", "Ġx", "=", "1", "2"]),
        ("kimi-k2", "你好abc camelCase 1234", ["你好", "abc", "Ġcamel", "Case", "Ġ", "123", "4"]),
        ("seed-coder", "x!?\n 12", ["x", "!?", "\n", "Ġ", "1", "2"]),
    ],
)
def test_text_is_cut_before_merging(pre: str, text: str, expected: list[str]) -> None:
    found = [piece for piece, _ in _CUTS[pre]().pre_tokenize_str(text)]
    cut = [p if p.isascii() or p.startswith("Ġ") else bytes_of(p) for p in found]
    assert cut == expected


def test_other_names_of_a_cut_are_read_as_it() -> None:
    """Each name that llama.cpp treats as another one's, which makes the same tokens of a text."""
    tokens = sorted(ByteLevel.alphabet())
    text = "It's 1234 camelCase 你好!?\n x"
    for name, cut in _SAME.items():
        fields = {"model": "gpt2", "tokens": tokens, "merges": [], "token_type": [1] * len(tokens)}
        ids = [tokenizer_of("file", fields | {"pre": pre})[0].encode(text).ids for pre in (name, cut)]
        assert ids[0] == ids[1]


def bytes_of(piece: str) -> str:
    from tokenizers.decoders import ByteLevel

    decoded: str = ByteLevel().decode([piece])
    return decoded


@pytest.mark.parametrize(("pre", "name"), [("qwen2", "Qwen2Tokenizer"), ("qwen35", "Qwen3_5Tokenizer")])
def test_text_is_read_as_by_the_tokenizer_that_transformers_builds(pre: str, name: str) -> None:
    """With composed and decomposed letters alike."""
    alphabet = sorted(ByteLevel.alphabet())
    fields = {"model": "gpt2", "pre": pre, "tokens": alphabet, "merges": []}
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    theirs = getattr(pytest.importorskip("transformers"), name)(vocab=vocabulary, merges=[]).backend_tokenizer
    ours, _ = tokenizer_of("file", fields)
    for text in ("e\u0301a\u0308 é", "\u0958\u0929\u093c", "\u1112\u1161\u11ab 한", "it's 12 नमस्ते\r\n x"):
        normal = [text if t.normalizer is None else t.normalizer.normalize_str(text) for t in (ours, theirs)]
        assert normal[0] == normal[1]
        cuts = (t.pre_tokenizer.pre_tokenize_str(normal[0]) for t in (ours, theirs))
        assert next(cuts) == next(cuts)
