"""`farthing`, or `python -m farthing`: reads ahead what a command imports, then runs it."""

from __future__ import annotations

import sys

from farthing.process import read_ahead


def main() -> None:
    """Entry point of the `farthing` script."""
    try:  # around the imports, too, during which Ctrl-C would print a traceback
        if "serve" in sys.argv[1:2]:
            read_ahead("serve")
        from farthing.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)  # as shells do: 128 and the signal's number


if __name__ == "__main__":
    main()
