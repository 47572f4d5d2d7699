"""Training text: Python standard library sources, split into train and held-out, tokenized and packed."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

Ids = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]  # one document, as narrow as the ids allow
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL_TOKENS = (
    *(BOS, EOS, PAD, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *(
        "<｜tool▁outputs▁begin｜>",
        "<｜tool▁outputs▁end｜>",
        "<｜tool▁output▁begin｜>",
        "<｜tool▁output▁end｜>",
    ),
    "<｜tool▁sep｜>",
)
# A word includes the one character before it (space, dot, underscore …); an indent includes its newline.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class Document:
    """One source file: path relative to the library's root, and its text."""

    path: str
    text: str


def add_hash(found: Any, documents: Iterable[Document]) -> None:
    """Add the paths and texts of the documents to the hash `found`."""
    for document in documents:
        for part in (document.path, document.text):
            found.update(hashlib.sha256(part.encode()).digest())


def find_sources(root: Path | None = None) -> list[Document]:
    """Every UTF-8 `.py` file under `root` (default: this interpreter's standard library), sorted by path.

    Installed packages are skipped. Of files with equal text only the first is kept.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents, seen = [], set()
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        try:
            text = file.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            documents.append(Document(relative.as_posix(), text))
    if not documents:
        raise ValueError(f"no Python sources under {root}; expected a directory with .py files")
    return documents


def split(documents: Sequence[Document], every: int = 25) -> tuple[list[Document], list[Document]]:
    """(train, held-out): a file is held out if its hash is 0 modulo `every` and it has no near-duplicate.

    A file is a near-duplicate if more than half of its distinct lines of 20 characters or more also occur in
    one other file. Training on that other file would leak it, so it goes into the training set.
    """
    owners: dict[str, set[int]] = defaultdict(set)
    for i, document in enumerate(documents):
        for line in _long_lines(document.text):
            owners[line].add(i)
    train: list[Document] = []
    held: list[Document] = []
    for i, document in enumerate(documents):
        digest = int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8], "big")
        lucky = digest % every == 0 and not _nearly_equal_to_another(i, document.text, owners)
        (held if lucky else train).append(document)
    return train, held


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 20}


def _nearly_equal_to_another(index: int, text: str, owners: dict[str, set[int]]) -> bool:
    lines = _long_lines(text)
    shared: dict[int, int] = defaultdict(int)
    for line in lines:
        for other in owners[line]:
            if other != index:
                shared[other] += 1
    return max(shared.values(), default=0) * 2 > len(lines)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries, DeepSeek's special tokens first (bos 0, eos 1)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the text only yields {tokenizer.get_vocab_size()} entries"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Ids]:
    """Token ids of each document, between the document-start and document-end tokens.

    Raises ValueError if the tokenizer lacks those tokens.
    """
    ids = tokenizer.get_vocab()
    if missing := [token for token in (BOS, EOS) if token not in ids]:
        raise ValueError(f"tokenizer.json: has no token {missing[0]!r}; expected DeepSeek's tokenizer")
    bos, eos = ids[BOS], ids[EOS]
    dtype: type[np.unsignedinteger[Any]] = np.uint16 if max(ids.values()) < 1 << 16 else np.uint32
    encodings = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    return [np.array([bos, *e.ids, eos], dtype=dtype) for e in encodings]


class PackedBatches:
    """Endless shuffled batches of windows cut from the concatenated documents.

    Each pass shuffles the documents, joins them, cuts windows of the requested length and shuffles those. The
    result depends only on (seed, pass number, window length), so `state_dict` is four integers.
    """

    def __init__(self, documents: Sequence[Ids], seed: int = 0) -> None:
        self.documents = list(documents)
        self.seed = seed
        self.tokens = sum(len(d) for d in self.documents)
        self.passes, self.length, self.index = 0, 0, 0
        self._stream: Ids = np.empty(0, np.uint16)
        self._starts: np.ndarray[Any, np.dtype[np.int64]] = np.empty(0, np.int64)

    def next(self, sequences: int, length: int) -> Tensor:
        """[sequences, length + 1] int64; consecutive windows of a pass share one token."""
        if self.tokens <= length + 1:
            raise ValueError(f"{self.tokens} tokens of text are too few for windows of {length} tokens")
        if length != self.length and self.length:
            self.passes, self.index = self.passes + 1, 0
        if length != self.length or not self._starts.size:
            self._cut(length)
        rows: list[Ids] = []
        while len(rows) < sequences:
            if self.index == len(self._starts):
                self.passes, self.index = self.passes + 1, 0
                self._cut(length)
            start = self._starts[self.index]
            rows.append(self._stream[start : start + length + 1])
            self.index += 1
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _cut(self, length: int) -> None:
        rng = np.random.default_rng([self.seed, self.passes, length])
        self._stream = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
        offset = int(rng.integers(0, (len(self._stream) - 1) % length + 1))
        self._starts = rng.permutation((len(self._stream) - 1 - offset) // length) * length + offset
        self.length = length

    def state_dict(self) -> dict[str, int]:
        """Position of the next batch."""
        return {"seed": self.seed, "passes": self.passes, "length": self.length, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position of `state_dict`."""
        self.seed, self.passes, self.index = state["seed"], state["passes"], state["index"]
        self.length = 0
        if state["length"]:
            self._cut(state["length"])
