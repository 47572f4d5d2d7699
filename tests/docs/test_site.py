"""The documentation site and the pages outside it have no dead links."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, pages

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_site_builds_without_dead_links(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="needs the docs extra: pip install '.[docs]'")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "build/site/index.html").exists()


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_index_lists_every_page() -> None:
    docs = ROOT / "docs"
    listed = {docs / link for link in LINK.findall((docs / "index.md").read_text())} | {docs / "index.md"}
    missing = [str(page.relative_to(docs)) for page in docs.rglob("*.md") if page not in listed]
    assert missing == [], "link these pages in docs/index.md"


def test_prose_has_at_most_110_columns() -> None:
    for page in pages():
        prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        assert [line for line in prose.splitlines() if len(line) > 110 and line[0] not in "|!"] == [], page
