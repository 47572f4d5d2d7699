"""Nothing tells a user to install `farthing` from PyPI, where the name is free for anyone to take."""

from __future__ import annotations

import re
import subprocess

from tests.docs.pages import ROOT

# `pip install farthing`, `pip install 'farthing[fleet]'`, `pip install --upgrade farthing`, but not
# `pip install 'farthing @ git+…'`; "farthing[fleet]" alone invites the same.
PIP = re.compile(r"""pip3?\s+install\b[^\n`|]*?[ '"]farthing(?:\[[^]]*\])?(?!\s*@)(?=['"`\s,;)]|$)""")
EXTRA = re.compile(r"farthing\[")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".sh", ".tpl", ".html", ".js", ""}
DECLARED = {"pyproject.toml", "src/farthing/extras.py"}  # extras that include others


def test_no_page_or_message_installs_the_name_from_an_index() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, check=True
    )
    found = []
    for name in listed.stdout.decode().splitlines():
        path = ROOT / name
        if path.suffix not in TEXT or name.startswith("tests/") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{name}: {match.group()}" for match in PIP.finditer(text)]
        if name not in DECLARED:
            found += [f"{name}: {match.group()}" for match in EXTRA.finditer(text)]
    assert found == []


def test_the_patterns_find_what_they_are_for() -> None:
    bad = ("pip install farthing", "pip install 'farthing[fast]'", 'pip install -U "farthing"')
    assert all(PIP.search(text) for text in bad)
    good = ("pip install '.[fast]'", "pip install 'farthing[fast] @ git+https://host/repo'", "pip install .")
    assert not any(PIP.search(text) for text in good)
