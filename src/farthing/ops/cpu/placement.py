"""Whether weights are in the memory of the nodes whose threads read them: pages are sampled after loading."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from farthing import _native
from farthing.cpus import own_cpus

log = logging.getLogger(__name__)

Query = Callable[[list[int]], Sequence[int]]  # addresses -> the node of each page; negative: an errno
SAMPLED = 256  # pages of a node's memory
_PAGE = 4096


def check_placement(memory: Sequence[tuple[int, int, int]]) -> None:
    """Check weights in nodes' memory, (node, address, bytes), on a machine with several nodes."""
    if len({node for node, _, _ in memory}) > 1 or own_cpus().machine_nodes > len(own_cpus().nodes):
        check_nodes(memory)


def check_nodes(memory: Sequence[tuple[int, int, int]], query: Query = _native.nodes_of_pages) -> None:
    """Log how much of the nodes' memory, (node, address, bytes), is in other nodes."""
    pages: Mapping[int, list[int]] = defaultdict(list)
    step = max(1, sum(size for _, _, size in memory) // SAMPLED // _PAGE) * _PAGE
    for node, begin, size in memory:
        pages[node] += range(begin, begin + size, step)
    for node, found in pages.items():
        _check(node, found, query)


def _check(node: int, pages: Sequence[int], query: Query) -> None:
    try:
        found = query(list(pages[:: -(-len(pages) // SAMPLED) or 1]))
    except RuntimeError as error:
        log.info("placement of node %d's weights: unknown, as the system refuses to tell (%s)", node, error)
        return
    known = [at for at in found if at >= 0]  # others were never read or written
    away = [at for at in known if at != node]
    what = f"placement of node {node}'s weights"
    if away:
        log.warning(
            "%s: %d of %d pages sampled are on other memory nodes (%s): memory of a node was full, or bound "
            "elsewhere",
            what, len(away), len(known), ", ".join(map(str, sorted(set(away)))),
        )  # fmt: skip
    elif known:
        log.info("%s: all of %d pages sampled are where they are read", what, len(known))
