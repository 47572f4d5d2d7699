"""What every client does: the conversations, what the scripted model says in them, and a runner."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

HELLO, DONE, RESULT, THOUGHT = "Hello there, 日!", "Done.", "RESULT-42", "Hm, 日."
CITY = {"city": 'Zürich "2>&1" \\ 日', "days": 3}
_SAID = json.dumps(CITY, ensure_ascii=False)
PLAIN, LOOP, JSON = "Say hello.", f"Call the tool look with {_SAID}.", f"Answer as JSON: {_SAID}."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def look(city: str, days: int) -> str:
    """Looks up the weather."""
    assert {"city": city, "days": days} == CITY
    return RESULT


def run(checks: dict[str, Callable[[str], object]]) -> None:
    """Print, for each server, what each check found: `ok`, or what was wrong.

    The argument is a JSON list: address of the server, reasoning of its model. A check of errors returns the
    status of the client's own exception for a model that is not served.
    """
    for url, thought in json.loads(sys.argv[1]):
        expected = {"answer": HELLO, "stream": HELLO, "tools": DONE, "structured": CITY, "errors": 404}
        expected["reasoning"] = thought
        found = {}
        for name, check in checks.items():
            try:
                got = check(url)
                found[name] = "ok" if got == expected[name.split()[0]] else f"got {got!r}"
            except Exception:
                found[name] = traceback.format_exc(limit=-3)
        print(json.dumps(found), flush=True)
