"""Fixtures of the compression tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from farthing.compress.evaluate import Corpus
from tests.compress.conftest import corpus_of, data, model_dir

__all__ = ["corpus", "data", "model_dir"]


@pytest.fixture(scope="module")
def corpus(model_dir: Path, data: Path) -> Corpus:
    """600 tokens of the data."""
    return corpus_of(data, model_dir, 64, 600)
