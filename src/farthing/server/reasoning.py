"""Splits what a reasoning model writes into its reasoning and its answer, as it streams.

DeepSeek-R1 marks its reasoning in three ways: `<think>…</think>` written out, the closing tag alone (the
prompt already ends with `<think>`), or no tag at all. A tag may be split over any number of chunks.
"""

from __future__ import annotations

from typing import Literal

OPEN, CLOSE = "<think>", "</think>"

Part = tuple[Literal["reasoning", "content"], str]


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt leaves the model inside its reasoning."""
    return prompt.rstrip().endswith(OPEN)


def held_back(text: str, tag: str) -> int:
    """How many characters at the end of `text` might be the beginning of `tag`."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0


def split_reasoning(text: str, prompt_opens: bool) -> tuple[str, str]:
    """(reasoning, content) of a whole output.

    Unlike the streaming parser, which has already sent what stood before it, this also accepts a closing
    tag that nothing opened.
    """
    parser = ReasoningParser(prompt_opens or CLOSE in text)
    parts = parser.push(text) + parser.finish()
    return (
        "".join(piece for kind, piece in parts if kind == "reasoning"),
        "".join(piece for kind, piece in parts if kind == "content"),
    )


class ReasoningParser:
    """Text chunks in, (kind, text) parts out; white space around the tags is dropped.

    prompt_opens: the prompt ends with `<think>`, so that the output begins inside the reasoning. A model
    that repeats the tag is understood as well.
    """

    def __init__(self, prompt_opens: bool) -> None:
        self._buffer = ""
        self._after_start: Literal["reasoning", "content"] = "reasoning" if prompt_opens else "content"
        self._state: Literal["start", "reasoning", "closed", "content"] = "start"
        self._begun = False  # whether any reasoning was sent

    @property
    def reasoning(self) -> bool:
        """Whether the text that comes next belongs to the reasoning, as far as is known."""
        return self._state == "reasoning" or (self._state == "start" and self._after_start == "reasoning")

    def push(self, text: str) -> list[Part]:
        """What can be told after one more chunk."""
        self._buffer += text
        parts: list[Part] = []
        while (step := getattr(self, f"_{self._state}")()) is not None:
            parts += [part for part in step if part[1]]
        return parts

    def finish(self) -> list[Part]:
        """What is left when the output ends: text that could have become a tag."""
        kind: Literal["reasoning", "content"] = "reasoning" if self.reasoning else "content"
        rest, self._buffer = self._buffer, ""
        if kind == "reasoning":
            rest = rest.strip() if not self._begun else rest.rstrip()
        return [(kind, rest)] if rest else []

    # Each state consumes from the buffer and returns parts, or None when it needs more text.

    def _start(self) -> list[Part] | None:
        text = self._buffer.lstrip()
        if text.startswith(OPEN):
            self._buffer, self._state = text[len(OPEN) :], "reasoning"
            return []
        if OPEN.startswith(text):
            return None
        self._state = self._after_start
        return []

    def _reasoning(self) -> list[Part] | None:
        if not self._begun:
            self._buffer = self._buffer.lstrip()
        before, tag, after = self._buffer.partition(CLOSE)
        if tag:
            self._buffer, self._state = after, "closed"
            return [("reasoning", before.rstrip())]
        ready = before[: len(before) - held_back(before, CLOSE)].rstrip()
        if not ready:
            return None
        self._begun = True
        self._buffer = before[len(ready) :]
        return [("reasoning", ready)]

    def _closed(self) -> list[Part] | None:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return None
        self._state = "content"
        return []

    def _content(self) -> list[Part] | None:
        if not self._buffer:
            return None
        text, self._buffer = self._buffer, ""
        return [("content", text)]
