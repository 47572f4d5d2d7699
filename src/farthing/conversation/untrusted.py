"""Keeps text that others wrote from becoming control tokens of the prompt.

A tokenizer splits a prompt at its added tokens first, so a web page that contains `<｜User｜>` could end a
tool's result and speak as the user. Before a conversation is rendered, MARK is inserted into each such text
within it: the tokenizer then sees no token there, while trimming, splitting and JSON in templates work as
before. `Tokenizer.encode` removes the marks and encodes what is left between genuine control tokens as text.
No client can send MARK, and a forged one would only keep its own text from becoming a token.

A token may also arise where text meets the template's: a template that prints `<` + key + `>` turns the key
`think` into one. So a mark also goes before or after a text that is, begins or ends like part of a token.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from farthing.conversation.base import THINK, Tags
from farthing.conversation.scan import MARK, alternatives, plain
from farthing.conversation.types import Conversation, Tool, ToolCall, Turn

# Words that templates look up in tools and compare. They are marked only if a token is such a word in
# brackets.
_WORDS = frozenset(
    re.findall(
        r"\S+",
        """type function name description parameters strict text object array string number integer boolean
        null properties required items enum default title const format pattern nullable anyOf oneOf allOf
        not $ref $defs definitions additionalProperties minimum maximum minLength maxLength""",
    )
)
_NEVER = "(?!)"
_ESCAPED = "\\ud800"  # MARK as JSON in ASCII and Python's repr write it
_ESCAPED_MARK = re.compile(r"\\ud800(?!\\+ud[c-f])")  # and not the first half of a character
_QUOTED = re.compile(r"(?<!\\)((?:\\\\)+)(?=ud800)")  # a backslash before that text within JSON
_BRACKETS = "<>[]{}|｜/"
_LITERAL = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_UNIT = re.compile(  # a character of a JSON string; a surrogate pair is one
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL
)


def _any_of(characters: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(set(characters)))) or _NEVER)


class Untrusted:
    """Marks text of clients, tools and models. Thread-safe."""

    def __init__(self, tokens: Iterable[str], normalize: Callable[[str], str] | None = None) -> None:
        """tokens: the texts of control tokens, of two characters or more. normalize: what the tokenizer does
        to text before it looks for them, if it does."""
        texts = sorted(set(tokens))
        self._normalize = normalize
        firsts, lasts = {text[0] for text in texts}, {text[-1] for text in texts}
        rests = {first: alternatives(text[1:] for text in texts if text[0] == first) for first in firsts}
        self._token = re.compile(alternatives(texts) or _NEVER)
        # The first characters of all tokens, including those that overlap.
        self._begins = re.compile(
            "|".join(f"{re.escape(c)}(?={rest})" for c, rest in rests.items()) or _NEVER
        )
        self._starts = {text[:at] for text in texts for at in range(1, len(text))}
        self._ends = {text[at:] for text in texts for at in range(1, len(text))}
        self._sorted_ends = sorted(self._ends)
        self._longest = max(map(len, texts), default=0)
        self._firsts, self._lasts = _any_of(firsts), _any_of(lasts)
        self._words = _WORDS - {text.strip(_BRACKETS) for text in texts}
        self._short = lru_cache(8192)(self._edges)

    def text(self, text: str) -> str:
        """A text with marks wherever it could become, or become part of, a control token."""
        if not text:
            return text
        if self._normalize is not None and self._normalize(text) != text:
            half = len(text) // 2  # what it becomes may be a token: any mark keeps it text
            text = text[:half] + MARK + text[half:]
        marked = self._within(text).replace(_ESCAPED, f"\\{MARK}ud800")
        return self._short(marked) if len(marked) <= self._longest else self._edges(marked)

    def value(self, value: Any) -> Any:
        """A JSON value with all of its strings and keys marked."""
        if isinstance(value, str):
            return value if value in self._words else self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(entry) for entry in value]
        return value

    def answer(self, text: str, tags: Tags | None = THINK) -> str:
        """An assistant's text. The tags of a whole block of reasoning at its beginning keep their meaning,
        unless tags is None."""
        rest = text.lstrip()
        if tags is None or not rest.startswith(tags.open) or tags.close not in rest:
            return self.text(text)
        start = len(text) - len(rest) + len(tags.open)
        end = text.index(tags.close, start)
        after = end + len(tags.close)
        return text[:start] + self.text(text[start:end]) + tags.close + self.text(text[after:])

    def arguments(self, text: str) -> str:
        """The arguments of a call: marked as the text they are and as the strings that parsing yields."""
        if _ESCAPED in text:
            text = _QUOTED.sub(rf"\g<1>{MARK}", text)
        return self._edges(self._within(_LITERAL.sub(self._literal, text)))

    def conversation(self, conversation: Conversation, tags: Tags | None = THINK) -> Conversation:
        """The same conversation with everything that a client may have copied from elsewhere marked.

        tags: of reasoning, if what renders it removes that from the beginning of an answer.
        """
        return replace(
            conversation,
            turns=tuple(self._turn(turn, tags) for turn in conversation.turns),
            tools=tuple(map(self._tool, conversation.tools)),
            template_options=self.options(options) if (options := conversation.template_options) else {},
        )

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages in OpenAI's form, whose content is one text or None, in the same way."""
        return [{self._switch(key): self._field(message, key) for key in message} for message in messages]

    def options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a template. Their names and plain words are switches, which templates compare."""
        return {name: self._switch(value) for name, value in options.items()}

    def _switch(self, value: Any) -> Any:
        """A value, or the name of a field, of which templates look up and compare plain words."""
        return value if isinstance(value, str) and value.isidentifier() else self.value(value)

    def _turn(self, turn: Turn, tags: Tags | None) -> Turn:
        answer = turn.role == "assistant" and not turn.reasoning
        return replace(
            turn,
            text=self.answer(turn.text, tags) if answer else self.text(turn.text),
            reasoning=self.text(turn.reasoning),
            calls=tuple(
                ToolCall(self.text(call.id), self.text(call.name), self.arguments(call.arguments))
                for call in turn.calls
            ),
            call_id=None if turn.call_id is None else self.text(turn.call_id),
            name=None if turn.name is None else self.text(turn.name),
            extra={self._switch(name): self.value(value) for name, value in turn.extra.items()},
        )

    def _tool(self, tool: Tool) -> Tool:
        return replace(
            tool,
            name=self.text(tool.name),
            description=None if tool.description is None else self.text(tool.description),
            parameters=None if tool.parameters is None else self.value(tool.parameters),
        )

    def _field(self, message: Mapping[str, Any], key: str) -> Any:
        value = message[key]
        if key == "role":
            return value
        reasons = message.get("reasoning_content") or message.get("reasoning")
        if key == "content" and isinstance(value, str) and message.get("role") == "assistant" and not reasons:
            return self.answer(value)
        if key == "tool_calls" and isinstance(value, list | tuple):
            return [self._call(call) for call in value]
        return self.value(value)

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        marked = self.value(call)
        if isinstance(function, Mapping) and isinstance(arguments := function.get("arguments"), str):
            marked["function"] |= {"arguments": self.arguments(arguments)}
        return marked

    def _within(self, text: str) -> str:
        """A text without whole tokens."""
        return self._begins.sub(rf"\g<0>{MARK}", text) if self._token.search(text) else text

    def _edges(self, text: str) -> str:
        """A text without whole tokens that cannot form one with what a template prints next to it either.

        Templates may trim it, so marks go next to the first and the last character that is not white space.
        """
        body = text.strip()
        if not body:
            return text
        lead, end = text.index(body[0]), len(text.rstrip())
        head, tail = body[: self._longest], body[-self._longest :]
        after = any(tail[found.start() :] in self._starts for found in self._firsts.finditer(tail))
        before = any(head[: found.end()] in self._ends for found in self._lasts.finditer(head))
        if before or (len(body) < self._longest and self._inside(body)):
            text, end = text[:lead] + MARK + text[lead:], end + 1
        return text[:end] + MARK + text[end:] if after else text

    def _inside(self, text: str) -> bool:
        """Whether a token contains this text, other than at its start."""
        at = bisect_left(self._sorted_ends, text)
        return at < len(self._sorted_ends) and self._sorted_ends[at].startswith(text)

    def _literal(self, found: re.Match[str]) -> str:
        """A string within JSON, marked by the text that it encodes."""
        literal = found[0]
        if "\\" not in literal:
            body = literal[1:].removesuffix('"')
            return '"' + self.text(body) + literal[1 + len(body) :]
        try:
            content = json.loads(literal if literal.endswith('"') else literal + '"', strict=False)
            if self.text(content) == content:
                return literal
        except ValueError:  # it was cut off within an escape
            pass
        closed = literal.endswith('"')
        return MARK.join(
            ['"', *_UNIT.findall(literal[1:-1] if closed else literal[1:]), '"' if closed else ""]
        )


TRUSTED = Untrusted(())  # marks no token


def unmarked(message: str) -> str:
    """A message about a marked conversation, as it is about the original."""
    return plain(printed(message))


def printed(prompt: str) -> str:
    """A prompt that a template has printed, with the marks that it has escaped as marks again."""
    return _ESCAPED_MARK.sub(MARK, prompt) if _ESCAPED in prompt else prompt
