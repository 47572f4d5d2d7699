"""Whether weights are in the memory of the nodes whose threads read them: pages are sampled after loading."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from farthing import _native
from farthing.cpus import own_cpus
from farthing.ops.cpu.packed import PackedFile

log = logging.getLogger(__name__)

Query = Callable[[list[int]], Sequence[int]]  # addresses -> the node of each page; negative: an errno
SAMPLED = 256  # pages of a node's memory, or of a file
_PAGE = 4096


def check_placement(memory: Sequence[tuple[int, int, int]], file: PackedFile | None) -> None:
    """Check weights: those packed into nodes' memory, (node, address, bytes), or else a mapped file."""
    cpus = own_cpus()
    if len({node for node, _, _ in memory}) > 1:
        check_nodes(memory)
    elif cpus.machine_nodes > 1 and file is not None:
        check_file(str(file.path), file.pages(), cpus.nodes)


def check_nodes(memory: Sequence[tuple[int, int, int]], query: Query = _native.nodes_of_pages) -> None:
    """Log how much of the nodes' memory, (node, address, bytes), is in other nodes."""
    pages: Mapping[int, list[int]] = defaultdict(list)
    step = max(1, sum(size for _, _, size in memory) // SAMPLED // _PAGE) * _PAGE
    for node, begin, size in memory:
        pages[node] += range(begin, begin + size, step)
    for node, found in pages.items():
        _check(
            f"node {node}'s weights", {node}, found, "memory of a node was full, or bound elsewhere", query
        )


def check_file(
    path: str, pages: Sequence[int], nodes: Collection[int], query: Query = _native.nodes_of_pages
) -> None:
    """The same for pages of a file that this process, on `nodes`, shares with others in the page cache."""
    advice = (
        "another process read the file first; drop it from the page cache and start this one first, or let "
        "one process use all nodes, which copies it to each"
    )
    _check(f"packed file {path}", nodes, pages, advice, query)


def _check(what: str, nodes: Collection[int], pages: Sequence[int], advice: str, query: Query) -> None:
    try:
        found = query(list(pages[:: -(-len(pages) // SAMPLED) or 1]))
    except RuntimeError as error:
        log.info("placement of %s: unknown, as the system refuses to tell (%s)", what, error)
        return
    known = [node for node in found if node >= 0]  # others were never read or written
    away = [node for node in known if node not in nodes]
    if away:
        log.warning(
            "placement of %s: %d of %d pages sampled are on other memory nodes (%s): %s",
            what, len(away), len(known), ", ".join(map(str, sorted(set(away)))), advice,
        )  # fmt: skip
    elif known:
        log.info("placement of %s: all of %d pages sampled are where they are read", what, len(known))
