"""The tokenizer that a GGUF file's metadata describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_CONTROL, _USER_DEFINED = 3, 4  # values of token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> Any:
    words = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _bytes() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


# tokenizer.ggml.pre -> how text is cut before merging
_CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": _bytes,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes()]),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}
_COMPOSED = ("qwen2",)  # their text is put into Unicode's composed form
_WHOLE = ("llama-bpe",)  # a word that is a token is taken whole, whatever its merges


def tokenizer_of(file: str, fields: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """(tokenizer, tokenizer_config.json) of metadata without its prefix `tokenizer.`.

    Raises ValueError for tokenizers that are not read, with those that are.
    """
    if (model := fields.get("model")) != "gpt2":
        raise ValueError(
            f"{file}: tokenizer.ggml.model: got {model!r}; expected 'gpt2' (byte-level BPE); other models: "
            "their Hugging Face directory with safetensors"
        )
    if (pre := fields.get("pre")) not in _CUTS:
        raise ValueError(f"{file}: tokenizer.ggml.pre: got {pre!r}; expected one of {', '.join(_CUTS)}")
    tokens: list[str] = fields.get("tokens") or []
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocabulary) < len(tokens):
        raise ValueError(f"{file}: tokenizer.ggml.tokens: expected a list of tokens without duplicates")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("merges") or []]
    try:
        bpe = models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE)
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{file}: tokenizer.ggml.merges: {error}") from error
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = _CUTS[pre]()
    backend.decoder = decoders.ByteLevel()
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    kinds = fields.get("token_type") or []
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return backend, _described(tokens, fields)


def _described(tokens: list[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"add_bos_token": bool(fields.get("add_bos_token", False))}
    for name in ("bos", "eos"):
        at = fields.get(f"{name}_token_id")
        if at is not None and at < len(tokens):
            found[f"{name}_token"] = tokens[at]
    if fields.get("chat_template"):
        found["chat_template"] = fields["chat_template"]
    return found
