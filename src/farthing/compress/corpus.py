"""Text for evaluation and calibration, as windows of token ids.

A file has one JSON object per line: {"text": …} or {"ids": […]}.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from farthing.model import ModelConfig
from farthing.tokenizer_file import read_tokenizer


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one document: each of ids[1:] is predicted from those before it."""

    ids: Tensor  # [n + 1] int64
    document: int

    @property
    def tokens(self) -> int:
        """Number of predictions."""
        return len(self.ids) - 1


@dataclass(frozen=True, slots=True)
class Corpus:
    """Windows and the size of their text in bytes (0 if only ids are known)."""

    windows: list[Window]
    bytes: int

    @property
    def tokens(self) -> int:
        """Total number of predictions."""
        return sum(w.tokens for w in self.windows)


def halves(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Two parts of about equal size without a common document: one to choose on, one to evaluate on.

    Raises ValueError for a single document. Bytes are unknown in either part.
    """
    documents = {w.document for w in corpus.windows}
    if len(documents) < 2:
        raise ValueError(
            "the data has one document; expected at least two, one to choose on and one to evaluate on"
        )
    parts: tuple[list[Window], list[Window]] = ([], [])
    tokens = [0, 0]
    for number in sorted(documents):
        own = [w for w in corpus.windows if w.document == number]
        smaller = int(tokens[1] < tokens[0])
        parts[smaller].extend(own)
        tokens[smaller] += sum(w.tokens for w in own)
    return Corpus(parts[0], 0), Corpus(parts[1], 0)


def load_corpus(
    data: Path,
    model: Path,
    config: ModelConfig,
    window: int,
    max_tokens: int | None = None,
    option: str = "data",
) -> Corpus:
    """Whole documents of `data`, until `max_tokens` is reached; at most the model's context per window.

    `model` is the directory with the tokenizer, `config` gives the vocabulary size. `option` names `data` in
    errors. Raises ValueError or FileNotFoundError.
    """
    if not data.is_file():
        raise FileNotFoundError(
            f"{option}: got {str(data)!r}, which does not exist; expected JSON lines with 'text' or 'ids'"
        )
    window = min(window, config.max_position_embeddings)
    return windows_of(
        _documents(data, model, config), window, max_tokens, f"{option}: got {str(data)!r}, which"
    )


def windows_of(
    documents: Iterator[tuple[list[int], int]],
    window: int,
    max_tokens: int | None = None,
    named: str = "the text",
) -> Corpus:
    """(ids, bytes) of each document -> windows of `window` predictions, every token predicted once.

    `named` begins the error about documents without text.
    """
    if window < 1:
        raise ValueError(f"window: got {window}; expected at least 1 token")
    windows: list[Window] = []
    tokens = total = 0
    for number, (ids, size) in enumerate(documents):
        if max_tokens is not None and tokens >= max_tokens:
            break
        row = torch.tensor(ids, dtype=torch.int64)
        windows += [Window(row[i : i + window + 1], number) for i in range(0, len(ids) - 1, window)]
        tokens += max(len(ids) - 1, 0)
        total += size
    if not windows:
        raise ValueError(f"{named} has no token to predict; expected at least one document of two tokens")
    return Corpus(windows, total)


def _documents(data: Path, model: Path, config: ModelConfig) -> Iterator[tuple[list[int], int]]:
    tokenizer: Tokenizer | None = None
    with data.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{data}:{number} is not JSON ({error})") from error
            ids: list[int]
            if isinstance(row, dict) and isinstance(row.get("ids"), list):
                ids, size = row["ids"], 0
            elif isinstance(row, dict) and isinstance(row.get("text"), str):
                tokenizer = tokenizer or load_tokenizer(model)
                ids, size = encode(tokenizer, row["text"], config.bos_token_id), _utf8_size(row["text"])
            else:
                raise ValueError(f"{data}:{number} has neither 'text' nor 'ids'; expected one of them")
            _check_ids(ids, config.vocab_size, f"{data}:{number}")
            yield ids, size


def _check_ids(ids: list[int], vocab_size: int, where: str) -> None:
    """Raise ValueError naming the first id that the model has no embedding for."""
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise ValueError(
                f"{where}: token id {str(i)[:40]}; expected a whole number from 0 to {vocab_size - 1}"
            )


def _utf8_size(text: str) -> int:
    return len(text.encode(errors="replace"))  # JSON may contain lone surrogates


def load_tokenizer(model: Path) -> Tokenizer:
    """Load tokenizer.json of a model directory."""
    file = model / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; expected a tokenizer, or data given as 'ids'")
    return read_tokenizer(file)


def encode(tokenizer: Tokenizer, text: str, bos: int | None) -> list[int]:
    """Token ids after one BOS, from which the first token is predicted."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids if bos is None else [bos, *ids]


def calibration_corpus(
    model: Path, config: ModelConfig, held_out: Path | None, tokens: int, window: int, seed: int = 0
) -> Corpus:
    """About `tokens` tokens of the Python standard library, without the files named in `held_out`.

    These sources are available wherever Python is, and calibration needs no labels.
    """
    tokenizer = load_tokenizer(model)
    window = min(window, config.max_position_embeddings)
    excluded = set(_paths(held_out)) if held_out and held_out.is_file() else set()
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        f for f in root.rglob("*.py")
        if "site-packages" not in f.parts and not _excluded(f.relative_to(root), excluded)
    )  # fmt: skip
    random.Random(seed).shuffle(files)
    if not files:
        raise FileNotFoundError(f"no Python sources under {root}; expected a calibration file")

    def documents() -> Iterator[tuple[list[int], int]]:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            ids = encode(tokenizer, text, config.bos_token_id)[: window + 1]  # many files, one window each
            _check_ids(ids, config.vocab_size, f"{model / 'tokenizer.json'}")
            yield ids, len(text.encode())

    return windows_of(documents(), window, tokens)


def _paths(held_out: Path) -> Iterator[str]:
    with held_out.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield str(json.loads(line).get("path", ""))


def _excluded(file: Path, excluded: set[str]) -> bool:
    return any(str(file).endswith(name) or name.endswith(str(file)) for name in excluded if name)


def batches(windows: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    """Batches of consecutive windows, about `tokens` tokens each."""
    batch: list[Window] = []
    size = 0
    for window in windows:
        if batch and size + window.tokens > tokens:
            yield batch
            batch, size = [], 0
        batch.append(window)
        size += window.tokens
    if batch:
        yield batch
