"""The page for everyone: what axe-core finds of it at three widths, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.browser import browser_only, look, wait_for
from tests.server.test_dashboard import charts
from tests.server.test_page import chatting, press, say

pytestmark = browser_only

RICH = (
    "<think>First.</think># Title\n\n- [x] a\n- [ ] b\n\n`code` [link](https://ok.example) $x^2$\n\n"
    "```python\nx = 'a'  # b\nif x: print(1)\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> quote\n\n"
    "$$\\int x\\,dx$$"
)
FIND = """
const done = arguments[0];
axe.run(document, {resultTypes: ["violations"]}).then(({ violations }) =>
  done(violations.filter((each) => ["serious", "critical"].includes(each.impact)).map((each) =>
    [each.id, ...each.nodes.map((node) => `${node.html} ${node.failureSummary}`)].join(" | "))));
"""


def faults(page: Any) -> list[str]:
    """The serious and critical ones of the page as it is now."""
    package = pytest.importorskip("axe_core_python")
    page.execute_script((Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found: list[str] = page.execute_async_script(FIND)
    return found


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chat_has_no_serious_faults(browser: Any, scheme: str, width: int) -> None:
    with chatting([RICH]) as (server, _):
        look(browser, server.url, width, scheme)
        browser.execute_script("localStorage.clear()")
        look(browser, server.url, width, scheme)
        wait_for(browser, "document.querySelector('.compose option')")
        assert faults(browser) == []
        say(browser, "Hello")
        browser.execute_script("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        assert faults(browser) == []
        press(browser, "Settings")
        assert faults(browser) == []
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        browser.get("about:blank")


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["server", "gateway"])
def test_charts_have_no_serious_faults(browser: Any, kind: str, scheme: str, width: int) -> None:
    with charts(browser, kind, width, scheme):
        assert faults(browser) == []
        browser.get("about:blank")
