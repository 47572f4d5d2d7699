"""DeepSeek's chat template, for checkpoints without one, and what any template gets as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def flatten(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with text parts joined to one string and without null fields, which templates do not expect.
    Raises ValueError on other kinds of content."""
    result = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{i}].role: got {role!r}; expected one of {ROLES}")
        if isinstance(content, list | tuple):
            content = "".join(_text(i, part) for part in content)
        elif content is not None and not isinstance(content, str):
            raise ValueError(f"messages[{i}].content: got {type(content).__name__}; expected text")
        given = {**message, "content": content}
        result.append({name: value for name, value in given.items() if value is not None})
    return result


def _text(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"messages[{index}].content has a part of type {kind!r}; expected 'text'")
