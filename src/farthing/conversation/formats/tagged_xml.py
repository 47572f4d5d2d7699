"""Calls written parameter by parameter between tags that hold names: Qwen3-Coder's and MiniMax's.

    <tool_call> <function=NAME> <parameter=KEY>VALUE</parameter> … </function> … </tool_call>

The formats do not say which values are strings: the tool's schema does.
"""

from __future__ import annotations

from dataclasses import dataclass

from farthing.conversation.base import MAX_HEAD, CallFormat
from farthing.conversation.formats.parameters import ParameterCalls
from farthing.conversation.scan import MARK
from farthing.conversation.strict import Section, TaggedCalls
from farthing.conversation.types import Tool


@dataclass(frozen=True, slots=True)
class XmlTags:
    """The tags of one format. call, parameter: up to the name, which `named` ends. line: what stands around a
    value and is no part of it."""

    open: str
    close: str
    call: str
    call_end: str
    parameter: str
    parameter_end: str
    named: str
    line: str = ""

    @property
    def all(self) -> frozenset[str]:
        """All tags."""
        return frozenset(
            (self.open, self.close, self.call, self.call_end, self.parameter, self.parameter_end)
        )


class XmlCalls(ParameterCalls):
    """Parses the calls described above.

    Models leave the outer tag out: a call of a known function begins without it. They also write the whole
    call as JSON, {"name": …, "arguments": {…}}. Only its own closing tag, or that of all calls, ends a value.
    """

    def __init__(self, form: XmlTags, tools: tuple[Tool, ...]) -> None:
        self._form, self.tags = form, form.all
        super().__init__(tools)
        self._section = False  # within the outer tags
        self._spelled = form.open[0] + MARK + form.open[1:]
        self._quoting = False  # the text holds an outer tag that other tokens spell, and perhaps a whole call
        self._naming = ""  # the tag whose name is being read
        self._fresh = False  # nothing of the value has been read
        self._newline = ""  # the end of the value so far, which may be no part of it

    # States.

    def _in_section(self) -> bool:
        """Between calls: a call follows, or JSON, or the model only wrote about the tag."""
        return self._until_tag(self._between)

    def _in_call(self) -> bool:
        return self._until_tag(self._stray.append)

    def _in_name(self) -> bool:
        end = self._buffer.find(self._form.named, 0, MAX_HEAD)
        if end < 0:
            broken = any(mark in self._buffer[:MAX_HEAD] for mark in "<\n")
            if not broken and len(self._buffer) < MAX_HEAD:
                return False
        name = self._buffer[: max(end, 0)]
        if end < 0 or not name.strip() or "<" in name or "\n" in name:
            self._unnamed()
            return True
        if self._naming == self._form.parameter:
            self._take(end + len(self._form.named))
            self._start_value(name.strip(), None)
            self._fresh, self._newline, self._state = True, "", self._in_value
        elif self._callable(name) if self._section else name in self._schemas:
            self._take(end + len(self._form.named))
            self._start_call(name)
            self._state = self._in_call
        else:
            self._unnamed()
        return True

    # Shared by the states.

    def _outer(self, text: str) -> None:
        self._quoting = self._quoting or self._spelled in text
        super()._outer(text)

    def _between(self, text: str) -> None:
        if not self._stray:
            text = text.lstrip()
        if self._stray or text.startswith("{"):
            self._stray.append(text)
        elif text:
            self._state, self._section = self._outside, False
            self._outer(text)

    def _unnamed(self) -> None:
        """A tag without a name: within a call it is dropped, elsewhere text."""
        self._state = self._in_call if self._open else self._outside
        if not self._open:
            self._outer(self._naming)

    def _abandon(self) -> None:
        if self._state == self._in_section and "".join(self._stray).lstrip().startswith('{"'):
            self._stray = []
        super()._abandon()

    def _end_reasoning(self, tag: str) -> None:
        self._section = False
        super()._end_reasoning(tag)

    def _enter(self, tag: str) -> None:
        form = self._form
        if self._quoting and self._state == self._outside and tag not in (form.open, form.close):
            self._outer(tag)
            return
        if self._state == self._in_value:
            if tag not in (form.parameter_end, form.close):
                self._push_value(tag)
                return
            self._end_value()
            self._state = self._in_call
        if self._state == self._in_section:
            self._end_json()
        if tag in (form.open, form.close):
            self._end_call()
            self._trailing.take()
            self._section, self._quoting = tag == form.open, False
            self._state = self._in_section if self._section else self._outside
            self._blank = self._blank or not self._section
        elif tag == form.call:
            self._end_call()
            self._naming, self._state = tag, self._in_name
        elif tag == form.parameter and self._open:
            self._naming, self._state = tag, self._in_name
        elif tag == form.call_end and self._open:
            self._end_call()
            self._blank, self._state = True, self._in_section if self._section else self._outside

    def _end_json(self) -> None:
        """What stands between the outer tags outside a call: a call as JSON, or text."""
        text, self._stray = "".join(self._stray).strip(), []
        self._call_as_json(text)

    # Values.

    def _push_value(self, text: str) -> None:
        if line := self._form.line:
            text = self._newline + text
            if self._fresh:
                text, self._fresh = text.removeprefix(line), False
            self._newline = line if text.endswith(line) else ""
            text = text.removesuffix(line)
        if text:
            super()._push_value(text)


def xml_format(
    name: str, form: XmlTags, *, opener: str, begin: str, end: str, section: Section, key: str
) -> CallFormat:
    """The calls of one format. opener … key: as in `TaggedCalls`; the tags give the rest of a parameter."""
    parameter = f"{form.parameter}{{name}}{form.named}{form.line}"
    syntax = TaggedCalls(
        openers=(opener,),
        begin=begin,
        string=parameter,
        json=parameter,
        value_end=form.line + form.parameter_end,
        end=end,
        marks=form.all,
        section=section,
        key=key,
    )
    return CallFormat(name, lambda tools, tokens=frozenset(): XmlCalls(form, tools), form.all, syntax)
