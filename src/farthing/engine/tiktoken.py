"""Convert a tiktoken vocabulary (Kimi's `tiktoken.model`) to tokenizer.json, once:

    python -m farthing.engine.tiktoken ./Kimi-K2.5

A tiktoken file lists `base64(token) rank`; its merges are implied: a token is the merge of the two pieces
that remain of its bytes when only lower ranks may merge.
"""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from farthing.checkpoint.shards import read_json
from farthing.tokenizer_gguf import KIMI

VOCABULARY = "tiktoken.model"
RESERVED = 256  # ids after the vocabulary; those without a name are `<|reserved_token_ID|>`


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank. Raises ValueError naming the line that is not `base64 rank`."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{file}, line {number}: got {line[:60]!r}; expected base64 and a rank"
            ) from None
    if not ranks:
        raise ValueError(f"{file} lists no token; expected lines of base64 and a rank")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{file}: ranks have gaps; expected 0…{len(ranks) - 1}, each once")
    return ranks


def pieces(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """The token's bytes after all merges of a rank lower than `below`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, below), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def convert(ranks: Mapping[bytes, int], named: Mapping[int, tuple[str, bool]]) -> Tokenizer:
    """named: text of the added tokens by id, and whether decoding skips them as special."""
    letters = _letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = pieces(token, ranks, rank)
        if len(parts) == 2:
            merges.append((text(parts[0]), text(parts[1])))
    vocabulary = {text(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(KIMI), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    behind = range(len(ranks), max(len(ranks) + RESERVED, *(i + 1 for i in named)) if named else len(ranks))
    for i in behind:  # one by one: ids follow the order of additions
        content, special = named.get(i, (f"<|reserved_token_{i}|>", True))
        added = AddedToken(content, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    return tokenizer


def convert_directory(path: Path) -> Path:
    """Write tokenizer.json next to tiktoken.model; returns it. Raises FileNotFoundError, ValueError."""
    config = path / "tokenizer_config.json"
    listed = read_json(config) if config.is_file() else {}
    named = {int(i): _added(config, i, t) for i, t in (listed.get("added_tokens_decoder") or {}).items()}
    out = path / "tokenizer.json"
    convert(read_ranks(path / VOCABULARY), named).save(str(out))
    return out


def _added(file: Path, token_id: str, token: Any) -> tuple[str, bool]:
    """Text, and whether it is special: false if the file does not say, as in transformers."""
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise ValueError(
            f"{file}: added_tokens_decoder[{token_id!r}]: got {token!r}; expected an object with content"
        )
    return token["content"], token.get("special", False) is True


def _letters() -> list[str]:
    """The character of each byte in byte-level BPE: printable Latin-1 for itself, others from U+0100 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m farthing.engine.tiktoken MODEL_DIRECTORY")
    try:
        print(convert_directory(Path(sys.argv[1])))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
