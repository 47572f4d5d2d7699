"""A pre-imported process that waits on stdin for the command to run.

Importing torch takes most of a small model's cold start. `python -m farthing.fleet.standby` imports it, reads
one line, a JSON list of `farthing`'s arguments, and becomes that command. It exits if stdin ends without a
line.
"""

from __future__ import annotations

import importlib
import json
import sys

from farthing import launch

PRELOAD = ("torch", "farthing.engine.engine", "farthing.server.app", "farthing.server.run", "uvicorn")


def main() -> None:
    """Wait for a line, then run it as `farthing ARGUMENTS`."""
    for module in PRELOAD:
        importlib.import_module(module)
    line = sys.stdin.readline()
    if not line:
        return
    launch.begin()
    from farthing.cli.app import main as farthing

    sys.argv = ["farthing", *json.loads(line)]
    farthing()


if __name__ == "__main__":
    main()
