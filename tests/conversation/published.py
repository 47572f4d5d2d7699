"""The shapes of published chat templates: what each family's template does with turns, tools, calls, results
and reasoning. They are written anew, with short texts in place of the published instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """A template, and what it can take. arguments: the form in which its documentation gives those of calls.
    drops: it leaves the system turn out unless the last turn is a user's."""

    source: str
    arguments: Literal["object", "text"] = "object"
    tools: bool = True
    short_ids: bool = False
    drops: bool = False


_GLM_TEXT = """\
{%- macro visible(c) -%}{%- if c is string -%}{{- c }}{%- elif c is iterable and c is not mapping -%}
{%- for i in c -%}{{- i.text if i is mapping else i }}{%- endfor -%}{%- else -%}{{- c }}{%- endif -%}{%- endmacro -%}
{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}{% set ns.last = loop.index0 -%}{%- endif %}{%- endfor %}
"""  # noqa: E501


def _glm4(arguments: str) -> str:
    return f"""\
[gMASK]<sop>{{%- if tools -%}}<|system|>
Tools:
{{% for tool in tools %}}
{{{{ tool | tojson(ensure_ascii=False) }}}}
{{% endfor %}}{{%- endif -%}}{_GLM_TEXT}{{% for m in messages %}}
{{%- if m.role == 'user' -%}}<|user|>
{{{{ visible(m.content) }}}}
{{{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible(m.content).endswith("/nothink")) else '' -}}}}
{{%- elif m.role == 'assistant' -%}}<|assistant|>
{{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}}{{%- set text = visible(m.content) %}}
{{{{ '\\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' }}}}
{{%- if text.strip() -%}}{{{{ '\\n' + text.strip() }}}}{{%- endif -%}}
{{% if m.tool_calls %}}{{% for tc in m.tool_calls %}}{{%- if tc.function %}}{{%- set tc = tc.function %}}{{%- endif %}}
{{{{ '\\n<tool_call>' + tc.name }}}}
{{% set _args = {arguments} %}}
{{% for k, v in _args.items() %}}
<arg_key>{{{{ k }}}}</arg_key>
<arg_value>{{{{ v | tojson(ensure_ascii=False) if v is not string else v }}}}</arg_value>
{{% endfor %}}
</tool_call>{{% endfor %}}{{% endif %}}
{{%- elif m.role == 'tool' -%}}
{{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}}{{{{- '<|observation|>' }}}}{{%- endif %}}
{{{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}}}
{{%- elif m.role == 'system' -%}}<|system|>
{{{{ visible(m.content) }}}}{{%- endif -%}}{{%- endfor -%}}
{{%- if add_generation_prompt -%}}<|assistant|>{{{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}}}{{%- endif -%}}"""  # noqa: E501


def _glm5(tool: str, empty: str) -> str:
    return f"""\
[gMASK]<sop>{{%- if tools -%}}<|system|>{{% for tool in tools %}}
{{{{ {tool} | tojson(ensure_ascii=False) }}}}{{% endfor %}}{{%- endif -%}}{_GLM_TEXT}{{% for m in messages %}}
{{%- if m.role == 'user' -%}}<|user|>{{{{ visible(m.content) }}}}
{{%- elif m.role == 'assistant' -%}}<|assistant|>{{%- set text = visible(m.content) %}}
{{%- if m.reasoning_content is string %}}{{%- set thought = m.reasoning_content %}}{{%- endif %}}
{{%- if ((clear_thinking is defined and not clear_thinking) or loop.index0 > ns.last) and thought -%}}
{{{{ '<think>' + thought.strip() + '</think>' }}}}{{%- else -%}}{{{{ {empty} }}}}{{%- endif -%}}
{{{{ text.strip() }}}}
{{%- for tc in m.tool_calls or [] %}}{{{{- '<tool_call>' + tc.function.name -}}}}
{{% set _args = tc.function.arguments %}}{{% for k, v in _args.items() %}}<arg_key>{{{{ k }}}}</arg_key><arg_value>{{{{ v | tojson(ensure_ascii=False) if v is not string else v }}}}</arg_value>{{% endfor %}}</tool_call>{{% endfor %}}
{{%- elif m.role == 'tool' -%}}
{{%- if loop.first or messages[loop.index0 - 1].role != "tool" %}}{{{{- '<|observation|>' }}}}{{%- endif %}}
{{{{- '<tool_response>' + m.content + '</tool_response>' }}}}
{{%- elif m.role == 'system' -%}}<|system|>{{{{ visible(m.content) }}}}{{%- endif -%}}{{%- endfor -%}}
{{%- if add_generation_prompt -%}}<|assistant|>{{{{- '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' -}}}}{{%- endif -%}}"""  # noqa: E501


def _kimi(thought: str, opening: str) -> str:
    return f"""\
{{%- macro text(msg) -%}}{{%- set c = msg.get('content') -%}}{{%- if c is string -%}}{{{{ c }}}}{{%- elif c is not none -%}}{{% for p in c -%}}{{{{ p['text'] }}}}{{%- endfor -%}}{{%- endif -%}}{{%- endmacro -%}}
{{%- set ns = namespace(answered=-1) -%}}
{{%- for i in range(messages|length-1, -1, -1) -%}}{{%- if messages[i]['role'] == 'assistant' and not messages[i].get('tool_calls') -%}}{{%- set ns.answered = i -%}}{{%- break -%}}{{%- endif -%}}{{%- endfor -%}}
{{%- if tools -%}}<|im_system|>tool_declare<|im_middle|>{{{{ tools | tojson(separators=(',', ':')) }}}}<|im_end|>{{%- endif -%}}
{{%- if messages[0]['role'] != 'system' -%}}<|im_system|>system<|im_middle|>You are a model.<|im_end|>{{%- endif -%}}
{{%- for m in messages -%}}{{%- set name = m.get('name') or m['role'] -%}}
{{%- if m['role'] == 'user' -%}}<|im_user|>{{%- elif m['role'] == 'assistant' -%}}<|im_assistant|>{{%- else -%}}<|im_system|>{{%- endif -%}}
{{{{ name }}}}<|im_middle|>
{{%- if m['role'] == 'assistant' -%}}{thought}{{{{ text(m) }}}}
{{%- if m.get('tool_calls') -%}}<|tool_calls_section_begin|>{{%- for call in m['tool_calls'] -%}}
<|tool_call_begin|>{{{{ call['id'] }}}}<|tool_call_argument_begin|>{{% if call['function']['arguments'] is string %}}{{{{ call['function']['arguments'] }}}}{{% else %}}{{{{ call['function']['arguments'] | tojson }}}}{{% endif %}}<|tool_call_end|>
{{%- endfor -%}}<|tool_calls_section_end|>{{%- endif -%}}
{{%- elif m['role'] == 'tool' -%}}## Return of {{{{ m.tool_call_id }}}}
{{{{ text(m) }}}}{{%- else -%}}{{{{ text(m) }}}}{{%- endif -%}}<|im_end|>{{%- endfor -%}}
{{%- if add_generation_prompt -%}}<|im_assistant|>assistant<|im_middle|>{opening}{{%- endif -%}}"""  # noqa: E501


_KIMI_THOUGHT = "<think>{{ m.get('reasoning_content', '') if loop.index0 > ns.answered else '' }}</think>"
_KIMI_OPENING = (
    "{%- if thinking is defined and thinking is false -%}<think></think>{%- else -%}<think>{%- endif -%}"
)

MINIMAX = """\
{%- set first = messages[0] if messages[0].role == 'system' else none -%}{%- set rest = messages[1:] if first else messages -%}
{%- set ns = namespace(last=-1) %}{% for m in rest %}{%- if m.role == 'user' %}{% set ns.last = loop.index0 -%}{%- endif %}{%- endfor %}
{{- ']~!b[' ~ ']~b]system' ~ '\n' }}{{- first.content if first and first.content else (model_identity | default('A helper.')) }}
{%- if tools -%}{{- '\n\n<tools>\n' }}{%- for tool in tools -%}<tool>{{ tool.function | tojson(ensure_ascii=False) }}</tool>
{% endfor -%}{{- '</tools>' }}{%- endif -%}{{- '[e~[\n' }}
{%- set seen = namespace(name=none) -%}
{%- for m in rest -%}
{%- if m.role == 'assistant' -%}{{- ']~b]ai\n' }}
{%- if m.reasoning_content is string and m.reasoning_content and loop.index0 > ns.last -%}{{- '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' }}{%- endif -%}
{%- if m.content -%}{{- m.content }}{%- endif -%}
{%- if m.tool_calls -%}{{- '\n<minimax:tool_call>\n' }}
{%- for call in m.tool_calls -%}{{- '<invoke name="' + call.function.name + '">' }}
{% set _args = call.function.arguments %}{%- for k, v in _args | items %}{{- '<parameter name="' + k + '">' }}{{- v | tojson(ensure_ascii=False) if v is not string else v }}{{- '</parameter>' }}
{% endfor %}{{- '</invoke>\n' }}{%- endfor -%}{{- '</minimax:tool_call>' }}{%- set seen.name = m.tool_calls[-1].function.name -%}{%- else -%}{%- set seen.name = none -%}{%- endif -%}{{- '[e~[\n' }}
{%- elif m.role == 'tool' -%}{%- if seen.name is none -%}{{- raise_exception('a result without a call') }}{%- endif -%}
{%- if rest[loop.index0 - 1].role != 'tool' -%}{{- ']~b]tool' }}{%- endif -%}{{- '\n<response>' ~ m.content ~ '</response>' }}
{%- if loop.last or rest[loop.index0 + 1].role != 'tool' -%}{{- '[e~[\n' -}}{%- endif -%}
{%- else -%}{{- ']~b]' ~ m.role ~ '\n' ~ m.content ~ '[e~[\n' }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- ']~b]ai\n<think>\n' }}{%- endif -%}"""  # noqa: E501


def _qwen(call: str, thought: str = "", opening: str = "", default: str = "") -> str:
    return f"""\
{{%- if tools %}}{{{{- '<|im_start|>system\\n' }}}}{{%- if messages[0].role == 'system' %}}{{{{- messages[0].content + '\\n\\n' }}}}{{%- else %}}{{{{- '{default}' }}}}{{%- endif %}}
{{{{- '<tools>' }}}}{{%- for tool in tools %}}{{{{- "\\n" }}}}{{{{- tool | tojson }}}}{{%- endfor %}}{{{{- '\\n</tools><|im_end|>\\n' }}}}
{{%- elif messages[0].role == 'system' %}}{{{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}}}{{%- elif '{default}' %}}{{{{- '<|im_start|>system\\n{default}<|im_end|>\\n' }}}}{{%- endif %}}
{{%- set ns = namespace(last=messages|length - 1, found=false) %}}
{{%- for m in messages[::-1] %}}{{%- set i = (messages|length - 1) - loop.index0 %}}
{{%- if not ns.found and m.role == "user" and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}}{{%- set ns.found = true %}}{{%- set ns.last = i %}}{{%- endif %}}{{%- endfor %}}
{{%- for m in messages %}}{{%- set text = m.content if m.content is string else '' %}}
{{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}}{{{{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>' + '\\n' }}}}
{{%- elif m.role == 'assistant' %}}{{%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}}
{{{{- '<|im_start|>' + m.role + '\\n' }}}}{thought}{{{{- text }}}}
{{%- for tool_call in m.tool_calls or [] %}}{{%- if (loop.first and text) or (not loop.first) %}}{{{{- '\\n' }}}}{{%- endif %}}
{{%- if tool_call.function %}}{{%- set tool_call = tool_call.function %}}{{%- endif %}}{call}{{%- endfor %}}{{{{- '<|im_end|>\\n' }}}}
{{%- elif m.role == 'tool' %}}{{%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}}{{{{- '<|im_start|>user' }}}}{{%- endif %}}
{{{{- '\\n<tool_response>\\n' + text + '\\n</tool_response>' }}}}
{{%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}}{{{{- '<|im_end|>\\n' }}}}{{%- endif %}}{{%- endif %}}{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{opening}{{%- endif %}}"""  # noqa: E501


_JSON_CALL = """{{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}{%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}"""  # noqa: E501
_QUOTING_CALL = """{{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}"""  # noqa: E501
_XML_CALL = """{{- '<tool_call>\\n<function=' + tool_call.name + '>\\n' }}{%- if tool_call.arguments is defined %}{%- for k, v in tool_call.arguments | items %}{{- '<parameter=' + k + '>\\n' }}{%- set v = v | tojson | safe if v is mapping or (v is sequence and v is not string) else v | string %}{{- v }}{{- '\\n</parameter>\\n' }}{%- endfor %}{%- endif %}{{- '</function>\\n</tool_call>' }}"""  # noqa: E501
_THOUGHT = """{%- if loop.index0 > ns.last and (loop.last or reasoning) %}{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"""  # noqa: E501
_ALWAYS = "{{- '<think>\\n' + reasoning | trim + '\\n</think>\\n\\n' if loop.index0 > ns.last else '' }}"
_NO_THINK = "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"  # noqa: E501
_THINK = "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false else '<think>\\n' }}"  # noqa: E501

GPT_OSS = """\
{{- '<|start|>system<|message|>Identity.\nDate: ' + strftime_now('%Y-%m-%d') + '\nReasoning: ' + (reasoning_effort | default('medium')) + '<|end|>' }}
{%- set developer = messages[0].content if messages[0].role in ['developer', 'system'] else '' %}{%- set rest = messages[1:] if messages[0].role in ['developer', 'system'] else messages %}
{%- if developer or tools %}{{- '<|start|>developer<|message|>' + developer }}{%- for tool in tools or [] %}{{- '\n// ' + tool.function.description + '\ntype ' + tool.function.name + ' = (_: {' }}
{%- for name, spec in tool.function.parameters.properties.items() %}{{- '\n' + name + ('?' if name not in (tool.function.parameters.required or []) else '') + ': ' + (spec.enum | join(' | ') if spec.enum else spec.type | string) + ',' }}{%- endfor %}{{- '\n}) => any;' }}{%- endfor %}{{- '<|end|>' }}{%- endif %}
{%- set called = namespace(name=none) %}
{%- for m in rest %}
{%- if m.role == 'assistant' %}
{%- if m.tool_calls %}{%- set call = m.tool_calls[0].function %}
{%- if m.content and m.thinking %}{{- raise_exception('Cannot pass both content and thinking') }}{%- endif %}
{%- if m.content or m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' + call.arguments | tojson + '<|call|>' }}{%- set called.name = call.name %}
{%- else %}{%- if loop.last and not add_generation_prompt and m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}{%- set called.name = none %}{%- endif %}
{%- elif m.role == 'tool' %}{%- if called.name is none %}{{- raise_exception('a result without a call') }}{%- endif %}
{{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}
{%- else %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""  # noqa: E501
GEMMA3 = """\
{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception("roles must alternate") }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (prefix if loop.first else '') }}
{%- if m['content'] is string -%}{{ m['content'] | trim }}{%- elif m['content'] is iterable -%}{%- for i in m['content'] -%}{{ i['text'] | trim }}{%- endfor -%}{%- endif -%}
{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""  # noqa: E501
GEMMA4 = """\
{%- macro value(v) -%}{%- if v is string -%}{{- '<|"|>' + v + '<|"|>' -}}{%- elif v is boolean -%}{{- 'true' if v else 'false' -}}{%- elif v is mapping -%}{{- '{' -}}{%- for k, x in v | dictsort -%}{{- k -}}:{{- value(x) -}}{%- if not loop.last -%},{%- endif -%}{%- endfor -%}{{- '}' -}}{%- elif v is sequence -%}[{%- for x in v -%}{{- value(x) -}}{%- if not loop.last -%},{%- endif -%}{%- endfor -%}]{%- else -%}{{- v -}}{%- endif -%}{%- endmacro -%}
{{- bos_token -}}{%- if (enable_thinking is defined and enable_thinking) or tools or messages[0]['role'] in ['system', 'developer'] -%}{{- '<|turn>system\n' -}}{%- if enable_thinking is defined and enable_thinking -%}{{- '<|think|>\n' -}}{%- endif -%}
{%- if messages[0]['role'] in ['system', 'developer'] -%}{{- messages[0]['content'] | trim -}}{%- endif -%}{%- for tool in tools or [] -%}{{- '<|tool>declaration:' + tool.function.name + value(tool.function.parameters) + '<tool|>' -}}{%- endfor -%}{{- '<turn|>\n' -}}{%- endif -%}
{%- for m in messages -%}{%- if m.role in ['user', 'assistant'] -%}
{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{%- for call in m.tool_calls or [] -%}{{- '<|tool_call>call:' + call.function.name + '{' -}}{%- if call.function.arguments is mapping -%}{%- for k, v in call.function.arguments | dictsort -%}{{- k -}}:{{- value(v) -}}{%- if not loop.last -%},{%- endif -%}{%- endfor -%}{%- elif call.function.arguments is string -%}{{- call.function.arguments -}}{%- endif -%}{{- '}<tool_call|>' -}}{%- endfor -%}
{{- (m.content or '') | trim -}}{{- '<turn|>\n' -}}
{%- elif m.role == 'tool' -%}{{- '<|tool_response>' + m.content + '<tool_response|>' -}}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\n' -}}{%- endif -%}"""  # noqa: E501
LLAMA31 = """\
{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n\n" + system + "<|eot_id|>" }}
{%- if tools is not none %}{%- if messages | length == 0 %}{{- raise_exception("no user message") }}{%- endif %}{%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\n\n' }}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}{{- first + "<|eot_id|>" }}{%- endif %}
{%- for m in messages %}{%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in m %}{%- if not m.tool_calls | length == 1 %}{{- raise_exception("one call at once") }}{%- endif %}{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
{%- else %}{{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}{%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}{%- else %}{{- m.content }}{%- endif %}{{- "<|eot_id|>" }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""  # noqa: E501


def _mistral(system: str, user: str) -> str:
    return f"""\
{{%- if messages[0]["role"] == "system" %}}{{%- set system = messages[0]["content"] %}}{{%- set rest = messages[1:] %}}{{%- else %}}{{%- set rest = messages %}}{{%- endif %}}
{{%- set users = rest | selectattr("role", "equalto", "user") | list %}}
{{%- set ns = namespace(i=0) %}}{{%- for m in rest %}}{{%- if m.role == "user" or (m.role == "assistant" and m.tool_calls is not defined) %}}{{%- if (m["role"] == "user") != (ns.i % 2 == 0) %}}{{{{- raise_exception("roles must alternate") }}}}{{%- endif %}}{{%- set ns.i = ns.i + 1 %}}{{%- endif %}}{{%- endfor %}}
{{{{- bos_token }}}}{system}
{{%- for m in rest %}}{{%- if m["role"] == "user" %}}{{%- if tools is not none and (m == users[-1]) %}}{{{{- "[AVAILABLE_TOOLS] [" }}}}{{%- for tool in tools %}}{{{{- tool | tojson }}}}{{{{- ", " if not loop.last else "]" }}}}{{%- endfor %}}{{{{- "[/AVAILABLE_TOOLS]" }}}}{{%- endif %}}{user}
{{%- elif m.tool_calls is defined and m.tool_calls is not none %}}{{{{- m.content or '' }}}}{{{{- "[TOOL_CALLS] [" }}}}
{{%- for call in m.tool_calls %}}{{%- set out = call.function | tojson %}}{{{{- out[:-1] }}}}
{{%- if call.id is not defined or call.id | length != 9 %}}{{{{- raise_exception("ids must have nine letters") }}}}{{%- endif %}}{{{{- ', "id": "' + call.id + '"}}' }}}}{{{{- ", " if not loop.last else "]" + eos_token }}}}{{%- endfor %}}
{{%- elif m["role"] == "assistant" %}}{{{{- " " + m["content"] | trim + eos_token }}}}
{{%- elif m["role"] in ("tool_results", "tool") %}}{{{{- '[TOOL_RESULTS] {{"content": ' + m.content | tojson + ', ' }}}}
{{%- if not m.tool_call_id is defined or m.tool_call_id | length != 9 %}}{{{{- raise_exception("ids must have nine letters") }}}}{{%- endif %}}{{{{- '"call_id": "' + m.tool_call_id + '"}}[/TOOL_RESULTS]' }}}}
{{%- else %}}{{{{- raise_exception("unknown role") }}}}{{%- endif %}}{{%- endfor %}}"""  # noqa: E501


MISTRAL4 = """\
{%- set effort = reasoning_effort if reasoning_effort is defined else 'none' %}{%- if effort not in ['none', 'high'] %}{{- raise_exception('effort') }}{%- endif %}
{{- bos_token }}{%- if messages[0].role == 'system' %}{{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}{{- '[MODEL_SETTINGS]{"reasoning_effort": "' + effort + '"}[/MODEL_SETTINGS]' }}
{%- for m in rest %}{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{%- if m.reasoning %}{{- '[THINK]' + m.reasoning + '[/THINK]' }}{%- elif m.reasoning_content %}{{- '[THINK]' + m.reasoning_content + '[/THINK]' }}{%- endif %}{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}{%- endfor %}{{- eos_token }}
{%- else %}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}"""  # noqa: E501
MIXTRAL = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}
{%- for m in rest %}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{%- if m['role'] == 'user' %}{%- if loop.first and system is defined %}{{- ' [INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}{%- else %}{{- ' [INST] ' + m['content'] + ' [/INST]' }}{%- endif %}{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"""  # noqa: E501
DEEPSEEK_V2 = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""  # noqa: E501


def _deepseek(text: str, opening: str, fence: bool = True) -> str:
    begin, end = (
        ("function<｜tool▁sep｜>", "'\\n' + '```json' + '\\n' +") if fence else ("", "'<｜tool▁sep｜>' +")
    )
    close = "+ '\\n' + '```'" if fence else ""
    return f"""\
{{% if not add_generation_prompt is defined %}}{{% set add_generation_prompt = false %}}{{% endif %}}{{% if not thinking is defined %}}{{% set thinking = false %}}{{% endif %}}{{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system='') %}}
{{%- for message in messages %}}{{%- if message['role'] == 'system' %}}{{% set ns.system = ns.system + message['content'] %}}{{%- endif %}}{{%- endfor %}}{{{{ bos_token }}}}{{{{ ns.system }}}}{{{{ tools | tojson if tools else '' }}}}
{{%- for message in messages %}}
{{%- if message['role'] == 'user' %}}{{%- set ns.is_tool = false -%}}{{{{ '<｜User｜>' + message['content'] }}}}{{%- endif %}}
{{%- if message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] is not none %}}{{%- if ns.is_tool %}}{{{{ '<｜tool▁outputs▁end｜>' }}}}{{%- else %}}{{{{ '<｜Assistant｜>' }}}}{{%- endif %}}{{%- set ns.is_first = false %}}{{%- set ns.is_tool = false -%}}
{{%- for tool in message['tool_calls'] %}}{{%- if not ns.is_first %}}{{{{ (message['content'] or '') + '<｜tool▁calls▁begin｜>' }}}}{{%- set ns.is_first = true %}}{{%- endif %}}{{{{ '<｜tool▁call▁begin｜>{begin}' + tool['function']['name'] + {end} tool['function']['arguments'] {close} + '<｜tool▁call▁end｜>' }}}}{{%- endfor %}}{{{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}}}{{%- endif %}}
{{%- if message['role'] == 'assistant' and (message['tool_calls'] is not defined or message['tool_calls'] is none) %}}{{%- set content = message['content'] %}}{text}{{%- if ns.is_tool %}}{{{{ '<｜tool▁outputs▁end｜>' + content + '<｜end▁of▁sentence｜>' }}}}{{%- set ns.is_tool = false -%}}{{%- else %}}{{{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}}}{{%- endif %}}{{%- endif %}}
{{%- if message['role'] == 'tool' %}}{{%- if not ns.is_tool %}}{{{{ '<｜tool▁outputs▁begin｜>' }}}}{{%- endif %}}{{%- set ns.is_tool = true -%}}{{{{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}}}{{%- endif %}}
{{%- endfor -%}}{{% if ns.is_tool %}}{{{{ '<｜tool▁outputs▁end｜>' }}}}{{% endif %}}{{% if add_generation_prompt and not ns.is_tool %}}{{{{ '<｜Assistant｜>' }}}}{opening}{{% endif %}}"""  # noqa: E501


_AFTER = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""  # noqa: E501
SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nA small model<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""  # noqa: E501
SMOLLM3 = """\
{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}{%- set mode = "/think" if enable_thinking else "/no_think" %}
{{- "<|im_start|>system\n" }}{%- if messages[0].role == "system" %}{%- if "/no_think" in messages[0].content %}{%- set mode = "/no_think" %}{%- endif %}{{- messages[0].content.replace("/no_think", "").rstrip() }}{%- endif %}{{- "\nMode: " ~ mode ~ "\nDate: " ~ strftime_now("%d %B %Y") ~ "\n" }}
{%- if tools %}{{- "<tools>" }}{%- for tool in tools %}{{- "\n" ~ (tool | string) }}{%- endfor %}{{- "\n</tools>" }}{%- endif %}{{- "<|im_end|>\n" }}
{%- for m in messages %}{%- set content = m.content if m.content is string else "" %}
{%- if m.role == "user" %}{{- "<|im_start|>user\n" + content + "<|im_end|>\n" }}
{%- elif m.role == "assistant" %}{% generation %}{{- "<|im_start|>assistant\n" ~ ("<think>\n\n</think>\n" if mode == "/no_think" else "") ~ content.lstrip("\n") }}{%- for call in m.tool_calls or [] %}{{- "<tool_call>" ~ (call.function | tojson(sort_keys=true)) ~ "</tool_call>" }}{%- endfor %}{{- "<|im_end|>\n" }}{% endgeneration %}
{%- elif m.role == "tool" %}{{- "<|im_start|>user\n" + content + "<|im_end|>\n" }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" ~ ("" if mode == "/think" else "<think>\n\n</think>\n") }}{%- endif %}"""  # noqa: E501
GRANITE = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}{%- else %}{%- set system = "Today's date: " + strftime_now('%B %d, %Y') + ".\nA model." %}{%- if tools and documents %}{%- set system = system + " Both." %}{%- elif tools %}{%- set system = system + " Tools." %}{%- elif documents %}{%- set system = system + " Documents." %}{%- endif %}{%- if thinking %}{%- set system = system + " Think." %}{%- endif %}{%- set rest = messages %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}
{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>\n' }}{%- endif %}
{%- for m in rest %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + (m['content'] or '') }}{%- if m.tool_calls %}{{- '<|tool_call|>' }}{{- m.tool_calls | map(attribute='function') | list | tojson }}{%- endif %}{{- '<|end_of_text|>\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' }}{%- if controls %}{{- ' ' + controls | tojson }}{%- endif %}{{- '<|end_of_role|>' }}{%- endif %}{%- endfor %}"""  # noqa: E501
OLMOE = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + '
' }}
{% elif message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + '
' }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
' + message['content'] + eos_token + ('
' if not loop.last else '') }}
{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>
' }}{% endif %}{% endfor %}"""
PHI4 = """\
{% for message in messages %}{% if (message['role'] == 'system') %}{{ '<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>' }}{% elif (message['role'] == 'user') %}{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}{% elif (message['role'] == 'assistant') %}{{ '<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""  # noqa: E501
HERMES = """\
{%- macro kind(spec) %}{%- if spec.type is string %}{{- spec.type }}{%- elif spec.type is iterable %}{{- 'Union[' + spec.type | join(',') + ']' }}{%- endif %}{%- endmacro %}
{{- bos_token }}{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{%- set tool = tool.function if tool.function is defined else tool %}{{- '{"name": "' + tool.name + '", "description": "' + tool.name + '(' }}{%- for name, spec in tool.parameters.properties | items %}{{- name + ': ' + kind(spec) }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ')", "parameters": ' }}{{- tool.parameters | tojson }}{{- '}\n' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}{%- if m.role in ('user', 'system') or (m.role == 'assistant' and m.tool_calls is not defined) %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' + (m.content or '') }}{%- for call in m.tool_calls %}{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>tool\n' }}{%- endif %}{{- '<tool_response>\n' + m.content + '\n</tool_response>' }}{%- if not loop.last and loop.nextitem.role == 'tool' %}{{- '\n' }}{%- else %}{{- '<|im_end|>' }}{%- endif %}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""  # noqa: E501

_MISTRAL_LAST = '{%- if loop.last and system is defined %}{{- "[INST] " + system + "\\n\\n" + m["content"] + "[/INST]" }}{%- else %}{{- "[INST] " + m["content"] + "[/INST]" }}{%- endif %}'  # noqa: E501
_MISTRAL_FIRST = '{{- "[SYSTEM_PROMPT]" + system + "[/SYSTEM_PROMPT]" if system is defined else "" }}'
_MISTRAL_USER = '{{- "[INST]" + m["content"] + "[/INST]" }}'

SHAPES = {
    "glm45": Shape(_glm4("tc.arguments")),
    "glm46": Shape(_glm4("tc.arguments or {}")),
    "glm47": Shape(_glm5("tool", "'</think>'")),
    "glm5": Shape(
        _glm5("tool.function", "'<think></think>' if loop.index0 > ns.last else '</think>'")
    ),
    "kimi_k2": Shape(_kimi("", "")),
    "kimi_k2_thinking": Shape(_kimi(_KIMI_THOUGHT, "")),
    "kimi_k25": Shape(_kimi(_KIMI_THOUGHT, _KIMI_OPENING)),
    "minimax_m2": Shape(MINIMAX),
    "qwen2_5": Shape(_qwen(_QUOTING_CALL, default="A helper.")),
    "qwen3": Shape(_qwen(_JSON_CALL, _THOUGHT, _NO_THINK)),
    "qwen3_coder": Shape(_qwen(_XML_CALL)),
    "qwen3_next": Shape(_qwen(_JSON_CALL)),
    "qwen3_5": Shape(_qwen(_XML_CALL, _ALWAYS, _THINK)),
    "gpt_oss": Shape(GPT_OSS),
    "gemma3": Shape(GEMMA3, tools=False),
    "gemma4": Shape(GEMMA4),
    "llama3_1": Shape(LLAMA31),
    "mistral_7b": Shape(_mistral("", _MISTRAL_LAST), short_ids=True, drops=True),
    "mistral_small": Shape(_mistral(_MISTRAL_FIRST, _MISTRAL_USER), short_ids=True),
    "mistral_small_4": Shape(MISTRAL4),
    "mixtral": Shape(MIXTRAL, tools=False),
    "deepseek_v2": Shape(DEEPSEEK_V2, tools=False),
    "deepseek_v3": Shape(_deepseek("", ""), "text"),
    "deepseek_r1": Shape(_deepseek(_AFTER, "{{ '<think>\\n' }}"), "text"),
    "deepseek_v31": Shape(
        _deepseek(_AFTER, "{{ '<think>' if thinking else '</think>' }}", fence=False), "text"
    ),
    "smollm2": Shape(SMOLLM2, tools=False),
    "smollm3": Shape(SMOLLM3),
    "granite": Shape(GRANITE),
    "olmoe": Shape(OLMOE, tools=False),
    "phi4": Shape(PHI4, tools=False),
    "chatml": Shape(CHATML, tools=False),
    "hermes": Shape(HERMES),
}  # fmt: skip
