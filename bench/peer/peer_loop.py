"""The loop of bench/decode.py's peers: "BATCH PROMPT NEW" a line -> "seconds S"."""

import sys
from collections.abc import Callable


def answer(seconds: Callable[[int, int, int], float]) -> None:
    """Warm up, print "ready", and answer until the input ends."""
    seconds(1, 32, 4)
    print("ready", flush=True)
    for line in sys.stdin:
        print("seconds", seconds(*map(int, line.split())), flush=True)
