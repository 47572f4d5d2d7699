"""Chat templates: Jinja in a sandbox, with the environment in which transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache, partial
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_multi_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from farthing.conversation.scan import plain


class _Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training. Here it prints its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call block, so that the body has the scope it has in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a model has never seen.
    value = _sorted(value) if sort_keys else value
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)


# A mark in a text (see `untrusted`) must not change its place, so texts are sorted as they are without marks.


def _key(case_sensitive: bool, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return plain(value) if case_sensitive else plain(value).lower()


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value, key=partial(_key, True))}
    return [_sorted(entry) for entry in value] if isinstance(value, list | tuple) else value


def _dictsort(
    value: Mapping[Any, Any], case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[tuple[Any, Any]]:
    if by not in ("key", "value"):
        raise jinja2.TemplateError(f"dictsort by {by!r}; expected 'key' or 'value'")
    at = int(by == "value")
    return sorted(value.items(), key=lambda item: _key(case_sensitive, item[at]), reverse=reverse)


@jinja2.pass_environment
def _sort(
    environment: jinja2.Environment,
    value: Iterable[Any],
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: str | int | None = None,
) -> list[Any]:
    key = make_multi_attrgetter(environment, attribute, postprocess=partial(_key, case_sensitive))
    return sorted(value, key=key, reverse=reverse)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters |= {"tojson": _tojson, "dictsort": _dictsort, "sort": _sort}
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


_CONSTANT = " constant"  # no name that a template can spell


class _WithoutConstants(NodeTransformer):
    """Replaces constants by a variable: Jinja computes expressions of constants when it compiles, however
    large, and a template is somebody else's program."""

    def visit_Const(self, node: nodes.Const) -> nodes.Name:  # named by Jinja
        return nodes.Name(_CONSTANT, "load", lineno=node.lineno)


def variables(source: str) -> frozenset[str]:
    """The variables a template reads, found without computing anything. Empty if it does not compile:
    rendering reports the error."""
    try:
        names = meta.find_undeclared_variables(_tree(source))
    except _FAULTS:
        return frozenset()
    return frozenset(names - _environment().globals.keys() - {_CONSTANT})


def check_template(source: str) -> None:
    """Raises ValueError for a template that does not compile, found without computing anything."""
    with _compiling():
        _environment().compile(_tree(source), raw=True)


def _tree(source: str) -> nodes.Template:
    tree = _WithoutConstants().visit(_environment().parse(source))
    assert isinstance(tree, nodes.Template)
    return tree


_FAULTS = (jinja2.TemplateError, RecursionError, OverflowError)


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise ValueError(f"chat_template does not compile: {error}") from error


def compile_template(source: str) -> Callable[..., str]:
    """A function that renders the template; it raises ValueError where the template refuses its input."""
    with _compiling():
        template = _environment().from_string(source)

    def render(**values: Any) -> str:
        try:
            return template.render(values)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"messages do not fit the chat template: {error}") from error

    return render
