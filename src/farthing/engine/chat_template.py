"""Chat templates: Jinja in a sandbox, with the names Hugging Face templates expect."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

# DeepSeek's format, for checkpoints without a template. Reasoning up to </think> is
# dropped from the history, as the model was trained; tools are described in the system prompt.
DEEPSEEK_TEMPLATE = """\
{%- set ns = namespace(system='', after_tool=false) -%}
{%- for m in messages if m['role'] in ('system', 'developer') -%}
  {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + (m['content'] or '') -%}
{%- endfor -%}
{%- if tools -%}
  {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') -%}
  {%- set ns.system = ns.system + '## Tools\\nYou may call these functions:' -%}
  {%- for tool in tools -%}
    {%- set ns.system = ns.system + '\\n' + (tool['function'] | tojson) -%}
  {%- endfor -%}
  {%- set ns.system = ns.system + '\\nTo call one, answer with\\n'
      ~ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function'
      ~ '<｜tool▁sep｜>NAME\\n```json\\nARGUMENTS\\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' -%}
{%- endif -%}
{{- bos_token ~ ns.system -}}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}
    {%- set ns.after_tool = false -%}
    {{- '<｜User｜>' ~ (m['content'] or '') -}}
  {%- elif m['role'] == 'assistant' -%}
    {{- '' if ns.after_tool else '<｜Assistant｜>' -}}
    {%- set ns.after_tool = false -%}
    {{- (m['content'] or '').split('</think>')[-1] | trim -}}
    {%- if m['tool_calls'] -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for call in m['tool_calls'] -%}
        {%- set f = call['function'] -%}
        {%- set arguments = f['arguments'] if f['arguments'] is string else f['arguments'] | tojson -%}
        {{- '\\n' if not loop.first -}}
        {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' ~ f['name'] ~ '\\n```json\\n' ~ arguments -}}
        {{- '\\n```<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- elif m['role'] == 'tool' -%}
    {{- '\\n' if ns.after_tool else '<｜tool▁outputs▁begin｜>' -}}
    {%- set ns.after_tool = true -%}
    {{- '<｜tool▁output▁begin｜>' ~ (m['content'] or '') ~ '<｜tool▁output▁end｜>' -}}
    {%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.after_tool -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""

ROLES = ("system", "developer", "user", "assistant", "tool")


def compile_template(source: str) -> Callable[..., str]:
    """A function that renders the template; it raises ValueError where the template refuses its input."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        # Jinja's own filter escapes for HTML, which a model has never seen.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    try:
        template = environment.from_string(source)
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


def flatten(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with text parts joined to one string. Raises ValueError on other kinds of content."""
    result = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{i}].role: got {role!r}; expected one of {ROLES}")
        if isinstance(content, list | tuple):
            content = "".join(_text(i, part) for part in content)
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"messages[{i}].content: got {type(content).__name__}; expected text")
        result.append({**message, "content": content})
    return result


def _text(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"messages[{index}].content has a part of type {kind!r}; expected 'text'")
