"""The tokenizer that a GGUF file's metadata describes, and the metadata that describes a tokenizer."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # values of token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

_WITH_MARKS = (  # Qwen3.5: marks belong to words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


_HAN_APART = (rf"[{inner}&&[^\p{{Han}}]]" for inner in (_UPPER[1:-1], _LOWER[1:-1]))
_KIMI_UPPER, _KIMI_LOWER = _HAN_APART
# How Kimi cuts text before merging: Chinese characters apart, words with their case, up to three digits.
KIMI = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}*{_KIMI_LOWER}+{_CONTRACTIONS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}+{_KIMI_LOWER}*{_CONTRACTIONS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# DeepSeek-V2: letters that have a case, punctuation in ASCII and its full width, Chinese to Korean.
_V2_TEXT = (
    r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+"
)  # fmt: skip


def _split(*patterns: str) -> Any:
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _words(digits: str) -> Any:
    return _split(_WORDS.format(digits=digits))


def _cased(digits: str, endings: str = "") -> Any:
    """Words that end where a capital letter follows a small one."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{_UPPER}*{_LOWER}+{endings}|{start}{_UPPER}+{_LOWER}*{endings}"
    return _split(rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _bytes() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_apart() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes()])


# tokenizer.ggml.pre -> how text is cut before merging
_CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": _bytes,
    "smollm": _digits_apart,
    "llama-bpe": lambda: _words(r"\p{N}{1,3}"),
    "qwen2": lambda: _words(r"\p{N}"),
    "stablelm2": lambda: _words(r"\p{N}"),
    "qwen35": lambda: _split(_WITH_MARKS),
    "chatglm-bpe": lambda: _words(r"\p{N}{1,3}"),
    "glm4": lambda: _words(r"\p{N}{1,3}"),
    "deepseek-llm": lambda: _split(*_V2_TEXT, r"\p{N}"),
    "deepseek-coder": lambda: _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _V2_TEXT[-1], r"\p{N}"),
    "deepseek-v3": lambda: _split(r"\p{N}{1,3}", _CJK, _DEEPSEEK),
    "kimi-k2": lambda: _split(KIMI),
    "gpt-4o": lambda: _cased(r"\p{N}{1,3}", _CONTRACTIONS),
    "minimax-m2": lambda: _cased(r"\p{N}{1,3}", _CONTRACTIONS),
    "tekken": lambda: _cased(r"\p{N}"),
    "seed-coder": lambda: _split(_WORDS.format(digits=r"\p{N}").replace(r"]+[\r\n]*", r"\r\n]+")),
}
# Further names of the same cuts.
_SAME = {
    "olmo": "gpt-2", "mellum": "gpt-2", "refact": "smollm", "starcoder": "smollm", "command-r": "smollm",
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "pixtral": "llama-bpe", "falcon3": "llama-bpe",
    "smaug-bpe": "chatglm-bpe", "dbrx": "chatglm-bpe", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2",
    "hunyuan": "stablelm2", "solar-open": "stablelm2", "hunyuan-dense": "deepseek-v3",
    "joyai-llm": "deepseek-v3", "llama4": "gpt-4o",
}  # fmt: skip
_COMPOSED = ("qwen2", "qwen35")  # their text is put into Unicode's composed form
_WHOLE = ("llama-bpe", "glm4", "tekken")  # a word that is a token is taken whole, whatever its merges


def tokenizer_of(file: str, fields: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """(tokenizer, tokenizer_config.json) of metadata without its prefix `tokenizer.`.

    Raises ValueError for tokenizers that are not read, with those that are.
    """
    if (model := fields.get("model")) not in ("gpt2", "llama", "gemma4"):
        raise ValueError(
            f"{file}: tokenizer.ggml.model: got {model!r}; expected 'gpt2' (byte-level BPE), 'gemma4' or "
            "'llama' (SentencePiece); other models: their Hugging Face directory with safetensors"
        )
    pre = fields.get("pre")
    fields = {**fields, "pre": _SAME.get(str(pre), pre)}
    if model == "gpt2" and fields["pre"] not in _CUTS:
        known = ", ".join(sorted([*_CUTS, *_SAME]))
        raise ValueError(f"{file}: tokenizer.ggml.pre: got {pre!r}; expected one of {known}")
    tokens: list[str] = fields.get("tokens") or []
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocabulary) < len(tokens):
        raise ValueError(f"{file}: tokenizer.ggml.tokens: expected a list of tokens without duplicates")
    kinds = fields.get("token_type") or []
    try:
        backend = _byte_level(vocabulary, fields) if model == "gpt2" else _sentencepiece(vocabulary, fields)
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{file}: tokenizer.ggml.merges or scores: {error}") from error
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return backend, _described(tokens, fields)


def led_by(system: str, described: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's description whose template begins conversations without a system turn with this one."""
    if not system or (template := described.get("chat_template")) is None:
        return described
    turn = f'{{"role": "system", "content": {json.dumps(system, ensure_ascii=False)}}}'
    led = "messages and messages[0].role not in ['system', 'developer']"
    start = f"{{%- if {led} %}}{{%- set messages = [{turn}] + messages %}}{{%- endif -%}}"
    return described | {"chat_template": start + template}


def stops_apart(generation: dict[str, Any], backend: Tokenizer) -> dict[str, Any]:
    """With the stops that are control tokens as ids: an answer's text never shows them."""
    stops = generation.pop("stop_strings", [])
    tokens = {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}
    ids = [tokens[stop] for stop in stops if stop in tokens]
    texts = [stop for stop in stops if stop and stop not in tokens]
    return generation | ({"stop_token_ids": ids} if ids else {}) | ({"stop_strings": texts} if texts else {})


def _byte_level(vocabulary: dict[str, int], fields: Mapping[str, Any]) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("merges") or []]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=fields["pre"] in _WHOLE))
    backend.pre_tokenizer = _CUTS[fields["pre"]]()
    backend.decoder = decoders.ByteLevel()
    if fields["pre"] in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(vocabulary: dict[str, int], fields: Mapping[str, Any]) -> Tokenizer:
    """Without stored merges, they are every split of a token in two others; those of higher scores come
    first."""
    scores, kinds = fields["scores"], fields["token_type"]
    if fields["model"] == "gemma4":
        parts = (merge.partition(" ") for merge in fields["merges"])
        return _with_spaces(vocabulary, [(first, second) for first, _, second in parts], fields)
    found = []
    for token, i in vocabulary.items():
        if kinds[i] == _NORMAL:
            pairs = [(token[:k], token[k:]) for k in range(1, len(token))]
            pairs = [(a, b) for a, b in pairs if a in vocabulary and b in vocabulary]
            found += [
                (-scores[i], pair)
                for pair in sorted(pairs, key=lambda p: (vocabulary[p[0]], vocabulary[p[1]]))
            ]
    return _with_spaces(vocabulary, [pair for _, pair in sorted(found, key=lambda f: f[0])], fields)


def _with_spaces(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], fields: Mapping[str, Any]
) -> Tokenizer:
    """Spaces are letters, and bytes tokens; text is not cut before merging."""
    kinds = fields["token_type"]
    unknown = next((token for token, i in vocabulary.items() if kinds[i] == _UNKNOWN), None)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(fields.get("add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _described(tokens: list[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"add_bos_token": bool(fields.get("add_bos_token", fields["model"] == "llama"))}
    for name in ("bos", "eos"):
        at = fields.get(f"{name}_token_id")
        if at is not None and at < len(tokens):
            found[f"{name}_token"] = tokens[at]
    if fields.get("chat_template"):
        found["chat_template"] = fields["chat_template"]
    return found


# Text in which all of _CUTS differ, and what a normalizer composes.
_PROBE = (
    "It's DON'T we'LL 1234567 a1b22 camelCase HTTPServer x=12;y+=3/4 你好，世界かな ελληνικά Привет "
    "e\u0301a\u0308   three   spaces\t\ttab\n\n  new\r\nline...!?  (a)[b]{c} <d>|e @f #g_h 🙂🙂 नमस्ते ١٢٣ "
    "naïve \u00a0x /usr/bin\nend;\n"
)


def fields_of(where: str, backend: Tokenizer, rows: int, architecture: str) -> dict[str, Any]:
    """The fields `model` to `merges` or `scores` of a tokenizer.json, with a token for each of `rows`.

    Raises ValueError for a tokenizer that GGUF cannot describe: what `tokenizer_of` makes of the fields has
    to cut a text alike.
    """
    stored = json.loads(backend.to_str())["model"]
    if stored.get("type") != "BPE":
        raise ValueError(f"{where}: got a tokenizer of type {stored.get('type')!r}; expected 'BPE'")
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= rows:
        raise ValueError(f"{where}: found token {max(vocabulary.values())}; expected less than {rows}")
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [_UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i], kinds[i] = token, _NORMAL
        if i in added:
            tokens[i], kinds[i] = added[i].content, _CONTROL if added[i].special else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["merges"]]
    fields: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    if stored.get("byte_fallback"):
        fields |= _scored(vocabulary, kinds, merges, stored.get("unk_token"))
        first = backend.encode("a", add_special_tokens=False).tokens[:1]
        fields |= {"model": "llama", "pre": "default", "add_space_prefix": bool(first[0].startswith("▁"))}
    else:
        pre = _pre_of(where, backend, bool(stored.get("ignore_merges")), architecture)
        fields |= {"model": "gpt2", "pre": pre, "merges": merges}
    expected = backend.encode(_PROBE, add_special_tokens=False).ids
    if tokenizer_of(where, fields)[0].encode(_PROBE, add_special_tokens=False).ids != expected:
        raise ValueError(f"{where}: expected a tokenizer that GGUF describes; text would be cut otherwise")
    return fields


def _scored(
    vocabulary: Mapping[str, int], kinds: list[int], merges: list[str], unknown: Any
) -> dict[str, Any]:
    """Scores that order the tokens as the merges do which make them; marks the tokens of bytes."""
    scores = [0.0] * len(kinds)
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), place)
    for token, i in vocabulary.items():
        if kinds[i] == _NORMAL:
            scores[i] = -float(rank.get(token, len(merges)))
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            kinds[i] = _BYTE
        elif token == unknown:
            kinds[i] = _UNKNOWN
    return {"scores": scores}


def _pre_of(where: str, backend: Tokenizer, whole: bool, architecture: str) -> str:
    """The name of how a tokenizer cuts text, of several equal ones the architecture's."""
    normalizer, own = backend.normalizer, backend.pre_tokenizer
    text = _PROBE if normalizer is None else normalizer.normalize_str(_PROBE)
    composed = unicodedata.normalize("NFC", _PROBE)
    cut = [] if own is None else [piece for piece, _ in own.pre_tokenize_str(_PROBE)]
    for name in sorted(_CUTS, key=lambda name: not architecture.startswith(name)):
        same = [piece for piece, _ in _CUTS[name]().pre_tokenize_str(_PROBE)] == cut
        if same and whole == (name in _WHOLE) and text == (composed if name in _COMPOSED else _PROBE):
            return name
    raise ValueError(
        f"{where}: found a tokenizer that cuts text in a way of its own; expected that of one of "
        f"{', '.join(_CUTS)}"
    )
