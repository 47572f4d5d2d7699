"""Grammars that hold tool calls to their schemas in the model's own format, written in Lark for llguidance.

If the model may also answer in text, a call's opening tag starts the grammar, which ends with the call. If
it must call, the grammar is that of the whole answer. Formats differ in how they write arguments: as JSON
(`JsonCalls`), or as one tagged text per parameter (`TaggedCalls`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from farthing.conversation import forced
from farthing.conversation.arguments import MAX_REFERENCES, Budget, Kinds, kinds_of, resolved
from farthing.conversation.forced import COMPACT, arguments_schema, declared, object_schema, rebased
from farthing.conversation.types import Conversation, Tool

# Builds a Lark grammar, as llguidance reads it, of texts that hold special tokens and JSON.

_SLASH = re.compile(r"(?<!\\)/")  # would end a regular expression
_ANY = r"(.|\n)"
_ROOT = "root"  # the name of a whole schema among the definitions of its part
MAX_CHARACTERS = 262_144  # of a grammar
_MAX_PARTS = 32_768  # of the schemas in it, counting one as often as it is referred to


class Lark:
    """Expressions are strings that can be put one after another.

    special: the id of a mark that the tokenizer knows as one special token, which no literal text matches.
    """

    def __init__(self, marks: Iterable[str], special: Callable[[str], int | None]) -> None:
        known = ((mark, special(mark)) for mark in sorted(marks, key=len, reverse=True))
        self._tokens = {mark: f"<[{token}]>" for mark, token in known if token is not None}
        self._split = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        self._rules: list[str] = []
        self._shared: dict[str, str] = {}  # definition -> name
        self._size = 0  # characters of the rules
        self._roots: dict[
            int, Mapping[str, Any]
        ] = {}  # by identity, which would be given to others otherwise
        self.budget = Budget(_MAX_PARTS)

    def text(self, literal: str) -> str:
        """A literal text; nothing for an empty one."""
        return " ".join(self._terminal(piece) for piece in self._pieces(literal))

    def until(self, tag: str) -> str:
        """Any text up to a tag, the tag included."""
        first, *rest = self._pieces(tag)
        if first in self._tokens:  # special tokens are no text: they end it
            head = f"{self.regex(f'{_ANY}+')}? {self._terminal(first)}"
        else:
            head = self._rule("text", f"/{_ANY}*{_escaped(first)}/", lazy=not rest)
        return " ".join((head, *map(self._terminal, rest)))

    def json(self, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> str:
        """JSON that fits a schema. root: the schema that references in it refer to, if that is another."""
        if root is None or '"$ref"' not in (text := json.dumps(schema)):
            return self._rule("json", _json(schema))
        self._roots[id(root)] = root
        refers = f"#/$defs/{_ROOT}"
        return self.rule(
            f"{id(root)} {text}",
            lambda: _json(rebased(schema, refers) | {"$defs": {_ROOT: rebased(root, refers)}}),
        )

    def rule(self, key: str, build: Callable[[], str]) -> str:
        """A rule that is built once per key, and may refer to itself."""
        if key not in self._shared:
            self._shared[key] = name = f"rule_{len(self._shared)}"
            self._add(f"{name}: {build()}")
        return self._shared[key]

    def regex(self, pattern: str) -> str:
        """Text that a regular expression matches as a whole."""
        pattern = _SLASH.sub(r"\/", pattern)
        return self._rule("text", f"/{pattern}/")

    @staticmethod
    def either(options: Iterable[str]) -> str:
        """One of several expressions."""
        return f"({' | '.join(options)})"

    def grammar(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join(("%llguidance {}", f"start: {start}", *self._rules, ""))

    def _rule(self, kind: str, definition: str, lazy: bool = False) -> str:
        key = f"{lazy} {definition}"
        if key not in self._shared:
            self._shared[key] = name = f"{kind}_{len(self._shared)}"
            self._add(f"{name}{'[lazy]' if lazy else ''}: {definition}")
        return self._shared[key]

    def _add(self, rule: str) -> None:
        self._size += len(rule)
        if self._size > MAX_CHARACTERS:  # every parameter with a reference repeats the whole schema
            raise ValueError(
                f"tools: their schemas make a grammar of more than {MAX_CHARACTERS} characters; expected "
                "simpler ones"
            )
        self._rules.append(rule)

    def _pieces(self, literal: str) -> list[str]:
        pieces, at = [], 0
        for match in self._split.finditer(literal):
            pieces += [literal[at : match.start()], match[0]]
            at = match.end()
        return [piece for piece in (*pieces, literal[at:]) if piece]

    def _terminal(self, piece: str) -> str:
        return self._tokens.get(piece) or json.dumps(piece, ensure_ascii=False)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(dict(schema) | {'x-guidance': COMPACT})}"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", "\\/").replace("\\\n", "\\n")


ANY_OBJECT = {"type": "object"}
# What else may stand at the root of a schema whose arguments are written parameter by parameter.
_PLAIN_ROOT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_PLAIN_ROOT |= {"title", "description", "$schema", "$id", "examples", "default", "$comment"}
_MARKUP = set('"<>\n')  # not in the name of a parameter that is written in a tag
_LIMITS = {"pattern", "format", "minLength", "maxLength", "enum", "const", "allOf", "not", "if"}


@dataclass(frozen=True, slots=True)
class Section:
    """The texts around an answer's calls."""

    begin: str
    between: str  # may be left out
    end: str


class Syntax(Protocol):
    """How a format writes calls."""

    @property
    def section(self) -> Section:
        """The texts around an answer's calls."""

    @property
    def openers(self) -> tuple[str, ...]:
        """Texts that begin a call."""

    @property
    def marks(self) -> frozenset[str]:
        """Parts of the markup that may be special tokens."""

    def calls(self, tools: list[Tool], lark: Lark) -> str:
        """An expression for what follows an opener, up to the end of the call."""

    def call(self, tool: Tool, lark: Lark) -> str:
        """The same for a call of one tool."""


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """Text is free until one of `openers`, then obeys the grammar until it ends; without openers, always."""

    openers: tuple[str, ...]
    grammar: str


def call_grammar(
    conversation: Conversation, syntax: Syntax | None, special: Callable[[str], int | None]
) -> CallGrammar | None:
    """The grammar of the calls that a client restricts; None if there is nothing to restrict.

    special: the id of a text that is one special token. Raises ValueError naming a tool whose schema the
    format cannot hold.
    """
    choice = conversation.choice
    restricted = choice.names or any(tool.strict for tool in conversation.offered)
    if syntax is None or choice.mode != "auto" or not restricted:
        return None
    names = set(choice.names)
    tools = [tool for tool in conversation.offered if not names or tool.name in names]
    lark = Lark(syntax.marks, special)
    try:
        return CallGrammar(syntax.openers, lark.grammar(syntax.calls(tools, lark)))
    except RecursionError:
        raise ValueError("tools: a schema is nested too deeply; expected fewer levels") from None


def forced_grammar(
    conversation: Conversation,
    syntax: Syntax | None,
    special: Callable[[str], int | None],
    room: int | None = None,
) -> CallGrammar | None:
    """The grammar of an answer if a call is required; None if not, or if the format has no grammar for it.

    room: the answer's maximum number of tokens.
    """
    if syntax is None or conversation.choice.mode != "required":
        return None
    lark, section, opener = Lark(syntax.marks, special), syntax.section, syntax.openers[0]
    try:
        calls = [syntax.call(replace(tool, strict=True), lark) for tool in forced.eligible(conversation)]
    except (ValueError, RecursionError):
        return None
    first = f"{lark.text(section.begin + opener)} {lark.either(calls)}"
    between = f"{lark.text(section.between)}? " if section.between else ""
    most = forced.most_calls(conversation, room) - 1
    later = f"({between}{lark.text(opener)} {lark.either(calls)}){{0,{most}}}" if most else ""
    end = lark.text(section.end)
    return CallGrammar((), lark.grammar(f"{first} {later} {end}"))


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """Arguments as JSON between two texts.

    styles: (before, after) pairs, of which a call has one. `before` holds {name}, and {index} where calls are
    numbered.
    """

    openers: tuple[str, ...]
    styles: tuple[tuple[str, str], ...]
    marks: frozenset[str]
    section: Section

    def calls(self, tools: list[Tool], lark: Lark) -> str:
        """See Syntax."""
        return lark.either(self.call(tool, lark) for tool in tools)

    def call(self, tool: Tool, lark: Lark) -> str:
        """See Syntax."""
        return lark.either(self._call(tool, style, lark) for style in self.styles)

    def _call(self, tool: Tool, style: tuple[str, str], lark: Lark) -> str:
        before, after = style
        head, numbered, tail = before.partition("{index}")
        parts = [lark.text(head.replace("{name}", tool.name))]
        if numbered:
            parts += (lark.regex("[0-9]{1,4}"), lark.text(tail))
        schema = arguments_schema(tool) if tool.strict else ANY_OBJECT
        return " ".join((*parts, lark.json(schema), lark.text(after)))


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a tool: its schema, and the tool's, which references refer to."""

    tool: str
    name: str
    schema: Mapping[str, Any]
    root: Mapping[str, Any]
    required: bool
    budget: Budget

    @property
    def kinds(self) -> Kinds:
        """JSON types the schema accepts; None: any."""
        return kinds_of(self.root, self.name, self.budget)

    @property
    def free(self) -> bool:
        """Whether the schema accepts any string."""
        return any(map(_free, self.branches()))

    def branches(self) -> Iterator[Mapping[str, Any]]:
        """The schema, or the members of the unions it is made of, without references."""
        return _branches(self.schema, self.root, self.budget)

    def options(self) -> list[str] | None:
        """The strings of a schema that lists its values, all of them strings."""
        (schema, *more) = self.branches()
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if more or not isinstance(values, list) or not values:
            return None
        return values if all(isinstance(value, str) and value for value in values) else None


def parameters_of(tool: Tool, budget: Budget) -> list[Parameter] | None:
    """A strict tool's parameters in order; None if its schema says more than what each of them may be."""
    schema = arguments_schema(tool)
    properties = schema.get("properties")
    if set(object_schema(tool.parameters)) - _PLAIN_ROOT or not isinstance(properties, Mapping):
        return None
    if any(not isinstance(part, Mapping) or set(name) & _MARKUP for name, part in properties.items()):
        return None
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(declared(name, properties) for name in required):
        return None
    needed = set(required)
    return [
        Parameter(tool.name, name, part, schema, name in needed, budget) for name, part in properties.items()
    ]


def text_value(parameter: Parameter, end: str, lark: Lark) -> str:
    """A string written as it is, without quotes, and the tag that ends it. Raises ValueError."""
    if options := parameter.options():
        return f"{lark.either(map(lark.text, options))} {lark.text(end)}"
    if parameter.free:
        return lark.until(end)
    return f"{lark.regex(_pattern(parameter))} {lark.text(end)}"


def _pattern(parameter: Parameter) -> str:
    """A regular expression for a string with a pattern or a length."""
    (schema, *more) = parameter.branches()
    limits = _LIMITS & set(schema)
    if limits == {"pattern"} and not more and isinstance(pattern := schema["pattern"], str):
        starts, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        body = pattern.removeprefix("^") if starts else pattern
        body = body[:-1] if ends else body
        return f"{'' if starts else '[^<]*'}({body}){'' if ends else '[^<]*'}"
    if limits <= {"minLength", "maxLength"} and not more:
        return f"[^<]{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
    how = ", ".join(sorted(limits)) or "a union"
    raise ValueError(
        f"tools: {parameter.tool!r} is strict and limits the string {parameter.name!r} by {how}, which "
        "this model's chat format cannot express; expected enum, const, pattern or lengths"
    )


def _branches(
    schema: Mapping[str, Any], root: Mapping[str, Any], budget: Budget, depth: int = MAX_REFERENCES
) -> Iterator[Mapping[str, Any]]:
    budget.spend()
    if isinstance(reference := schema.get("$ref"), str) and depth:
        schema = found if isinstance(found := resolved(root, reference), Mapping) else {}
    for union in ("anyOf", "oneOf"):
        if isinstance(members := schema.get(union), list) and depth:
            for member in members:
                if isinstance(member, Mapping):
                    yield from _branches(member, root, budget, depth - 1)
            return
    yield schema


def _free(schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type", "string")
    return (
        not _LIMITS & set(schema)
        and "$ref" not in schema
        and "string" in (kind if isinstance(kind, list) else [kind])
    )


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """Arguments as one tagged text per parameter: DSML, and GLM's.

    Texts hold {name}, the tool's or the parameter's. string, json: what begins a parameter whose value is
    text, or JSON; the same text where the format does not tell.
    """

    openers: tuple[str, ...]
    begin: str
    string: str
    json: str
    value_end: str
    end: str
    marks: frozenset[str]
    section: Section
    key: str  # a regular expression for names of parameters
    others: tuple[str, ...] = ()  # what else may follow an opener

    def calls(self, tools: list[Tool], lark: Lark) -> str:
        """See Syntax."""
        calls = [self.call(tool, lark) for tool in tools]
        return lark.either((*calls, *map(lark.text, self.others)))

    def call(self, tool: Tool, lark: Lark) -> str:
        """See Syntax."""
        line = '"\\n"?'
        parameters = parameters_of(tool, lark.budget) if tool.strict else None
        if parameters is not None:
            body = " ".join(
                f"({self._parameter(parameter, lark)} {line}){'' if parameter.required else '?'}"
                for parameter in parameters
            )
        elif tool.strict:  # the parsers take a whole object as well
            body = f"{lark.json(arguments_schema(tool))} {line}"
        else:
            body = f"({self._any(lark)} {line})*"
        return f"{lark.text(self.begin.format(name=tool.name))} {line} {body} {lark.text(self.end)}"

    @property
    def _told(self) -> bool:
        """Whether the markup says which values are text."""
        return self.string != self.json

    def _parameter(self, parameter: Parameter, lark: Lark) -> str:
        def begin(text: str) -> str:
            return lark.text(text.format(name=parameter.name))

        kinds = parameter.kinds
        json = f"{begin(self.json)} {lark.json(parameter.schema, parameter.root)} {lark.text(self.value_end)}"
        if not self._told:
            string = kinds == frozenset({"string"})
            plain = kinds is not None and kinds <= {"string", "null"} and parameter.free
            return (
                f"{begin(self.string)} {text_value(parameter, self.value_end, lark)}"
                if string or plain
                else json
            )
        if kinds is not None and "string" not in kinds:
            return json
        try:
            text = f"{begin(self.string)} {text_value(parameter, self.value_end, lark)}"
        except ValueError:
            return json
        return text if kinds == frozenset({"string"}) else lark.either((text, json))

    def _any(self, lark: Lark) -> str:
        """A parameter of a tool that is not strict."""
        options = []
        for text in dict.fromkeys((self.string, self.json)):
            before, _, after = text.partition("{name}")
            options.append(
                f"{lark.text(before)} {lark.regex(self.key)} {lark.text(after)} {lark.until(self.value_end)}"
            )
        return lark.either(options)
