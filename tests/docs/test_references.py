"""What pages name exists, and the changelog says everything once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.docs.pages import pages

ROOT = Path(__file__).parents[2]
FILES = [
    path.relative_to(ROOT).as_posix()
    for top in ("src", "tests", "bench", "native", "docs", "deploy")
    for path in (ROOT / top).rglob("*.*")
]
PATTERNS = {"isa/kernels_NAME.cpp"}  # stand for several files


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    named = set(re.findall(r"`([\w./-]+\.(?:py|cpp|h|inl))`", prose)) - PATTERNS
    missing = [name for name in sorted(named) if not any(f"/{file}".endswith(f"/{name}") for file in FILES)]
    assert not missing


def test_changelog_has_each_line_once_in_a_version() -> None:
    for version in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        lines = Counter(line for line in version.splitlines() if line.startswith(("- ", "### ")))
        assert not [line for line, count in lines.items() if count > 1], version.splitlines()[0]
