"""Loading of tokenizer.json, a file that other tools wrote, with errors that name the file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

_MOST_GAPS = 1 << 20  # ids without a token; the library walks through all ids when it writes a tokenizer
_LARGE = re.compile(rb":\s*[1-9]\d{6}")  # an id, or digits in a token's text


def read_tokenizer(file: Path) -> Tokenizer:
    """Load a tokenizer that neither truncates nor pads, as transformers does. Raises ValueError, OSError."""
    data = file.read_bytes()
    if _LARGE.search(data):
        _check_ids(file, data)
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{file} is not a tokenizer file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_ids(file: Path, data: bytes) -> None:
    """Raise ValueError for ids far beyond the number of tokens; other defects are left to tokenizers."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return
    ids = _ids(raw) if isinstance(raw, dict) else []
    limit = len(ids) + _MOST_GAPS
    if (last := max(ids, default=0)) >= limit:
        raise ValueError(
            f"{file} has token ids up to {last:,}; expected less than {limit:,} for {len(ids):,} tokens"
        )


def _ids(raw: dict[str, Any]) -> list[int]:
    """All token ids of the file that are integers."""
    model, added = raw.get("model"), raw.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    listed = list(vocab.values()) if isinstance(vocab, dict) else []
    tokens = added if isinstance(added, list) else []
    listed += [token.get("id") for token in tokens if isinstance(token, dict)]
    return [token for token in listed if isinstance(token, int)]
