"""Chat templates: Jinja in a sandbox, with the environment in which transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


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
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def variables(source: str) -> frozenset[str]:
    """The variables a template reads. Empty if it does not compile: rendering reports the error."""
    environment = _environment()
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
    except (jinja2.TemplateError, RecursionError, OverflowError):
        return frozenset()
    return frozenset(names - environment.globals.keys())


def compile_template(source: str) -> Callable[..., str]:
    """A function that renders the template; it raises ValueError where the template refuses its input."""
    try:
        template = _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError, OverflowError) as error:
        raise ValueError(f"chat_template does not compile: {error}") from error

    def render(**values: Any) -> str:
        try:
            return template.render(values)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"messages do not fit the chat template: {error}") from error

    return render
