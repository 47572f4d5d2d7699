"""A suffix automaton over a growing list of tokens (Blumer et al. 1985).

It finds earlier occurrences of the text's ending. Every state represents a set of substrings that end at the
same positions. The state of the whole text links to that of its longest ending that also occurs earlier.
Appending a token takes amortized constant time, and memory is linear in the text.
"""

from __future__ import annotations

from collections.abc import Sequence

_REFRESH = 8  # states per token whose last position is updated; longer chains keep an older position


class SuffixAutomaton:
    """Grows with a text. State 0 is the empty substring."""

    __slots__ = ("_end", "_last", "_length", "_link", "_next", "earlier", "matched", "size")

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]  # transitions by token
        self._link: list[int] = [-1]  # the state of the longest proper suffix that is in another state
        self._length: list[int] = [0]  # of the longest substring
        self._end: list[int] = [-1]  # a recent position at which the substrings end
        self._last = 0  # state of the whole text
        self.size = 0  # tokens so far
        self.matched = 0  # length of the longest ending of the text that occurs earlier
        self.earlier = -1  # position of its last token in that earlier occurrence

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        following, link, length, end = self._next, self._link, self._length, self._end
        new = self._state({}, length[self._last] + 1, self.size)
        p = self._last
        while p >= 0 and token not in following[p]:
            following[p][token] = new
            p = link[p]
        if p < 0:
            link[new] = 0
        else:
            q = following[p][token]
            if length[q] > length[p] + 1:  # split off the substrings that now end here too
                clone = self._state(following[q].copy(), length[p] + 1, end[q])
                link[clone] = link[q]
                while p >= 0 and following[p].get(token) == q:
                    following[p][token] = clone
                    p = link[p]
                link[q] = q = clone
            link[new] = q
        self.matched, self.earlier = length[link[new]], end[link[new]]
        state = link[new]
        for _ in range(_REFRESH):
            if state <= 0:
                break
            end[state] = self.size
            state = link[state]
        self._last = new
        self.size += 1

    def _state(self, following: dict[int, int], length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(0)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1
