"""Chat templates of the shapes in use, and a small tokenizer with the control tokens of all of them.

Each is written anew with the features of its family that matter here: how turns are delimited, what is
trimmed or split, and what is printed next to control tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from farthing.engine.tokenizer import DEEPSEEK_TEMPLATE, Tokenizer

CHATML = """\
{%- if tools %}{{ '<|im_start|>system\n' }}<tools>
{%- for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set text = m.content.split('</think>')[-1].lstrip('\n') %}
{{- '<|im_start|>assistant\n<think>\n' ~ (m.reasoning_content or '').strip('\n') ~ '\n</think>\n\n' ~ text }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments ~ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""  # noqa: E501
# Prints keys of schemas and names of parameters in brackets.
XML = """\
{%- for tool in tools or [] %}{{ '<function>' ~ tool.function.name ~ '\n' }}
{%- for key, field in tool.function.parameters.properties.items() %}
{%- for inner, value in field.items() %}{{ '<' ~ inner ~ '>' ~ value ~ '</' ~ inner ~ '>' }}{% endfor %}
{{- '<' ~ key ~ '>' ~ '</' ~ key ~ '>' }}{% endfor %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ (m.content | trim) }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>\n<function=' ~ call.function.name ~ '>\n' }}
{%- for key, value in (call.function.arguments if call.function.arguments is mapping else {}).items() %}
{{- '<parameter=' ~ key ~ '>\n' ~ value ~ '\n</parameter>\n<' ~ key ~ '>' ~ value ~ '<|' ~ value ~ '|>' }}
{%- endfor %}{{ '</function>\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
GLM = """\
[gMASK]<sop>{% for tool in tools or [] %}<|system|>{{ tool | tojson(ensure_ascii=False) }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|observation|>{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
{%- elif m.role == 'assistant' %}<|assistant|>
{%- if '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set text = m.content.split('</think>')[-1].lstrip('\n') %}
{%- else %}{% set thought = (m.reasoning_content or '') %}{% set text = m.content %}{% endif %}
{{- '\n<think>' ~ thought ~ '</think>\n' ~ (text | trim) }}
{%- for call in m.tool_calls or [] %}{{ '\n<tool_call>' ~ call.function.name }}
{{- '<arg_key>arguments</arg_key>\n<arg_value>' ~ call.function.arguments ~ '</arg_value>\n</tool_call>' }}
{%- endfor %}
{%- else %}<|{{ m.role }}|>{{ '\n' ~ m.content }}{{ '/nothink' if m.content.endswith('/off') }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
KIMI = """\
{%- if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}
{%- for m in messages %}
{%- set name = m.name or m.role %}
{%- if m.role == 'user' %}<|im_user|>{{ name }}<|im_middle|>
{%- elif m.role == 'assistant' %}<|im_assistant|>{{ name }}<|im_middle|>
{%- else %}<|im_system|>{{ name }}<|im_middle|>{% endif %}
{%- if m.role == 'tool' %}{{ '## Return of ' ~ m.tool_call_id ~ '\n' }}{% endif %}
{{- m.content }}
{%- if m.tool_calls %}<|tool_calls_section_begin|>{% for call in m.tool_calls %}<|tool_call_begin|>{{ call.id }}
{{- '<|tool_call_argument_begin|>' ~ call.function.arguments }}<|tool_call_end|>{% endfor %}
{{- '<|tool_calls_section_end|>' }}{% endif %}<|im_end|>
{%- endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"""  # noqa: E501
HARMONY = """\
<|start|>system<|message|>You are a model.<|end|>
{%- if tools %}<|start|>developer<|message|>{% for tool in tools %}{{ '// ' ~ tool.function.description ~ '\n' }}
{{- 'type ' ~ tool.function.name ~ ' = (_: {\n' }}
{%- for key, field in tool.function.parameters.properties.items() %}{{ key ~ ': ' }}
{{- field.enum | join(' | ') if field.enum else 'string' if field.type == 'string' else 'any' }}
{{- ',\n' }}{% endfor %}{{ '}) => any;\n' }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if '<|channel|>analysis<|message|>' in m.content %}{{ raise_exception('no channels in content') }}{% endif %}
{%- if m.reasoning_content %}<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' ~ m.content ~ '<|end|>' }}
{%- for call in m.tool_calls or [] %}<|start|>assistant to=functions.{{ call.function.name }}
{{- '<|channel|>commentary json<|message|>' ~ (call.function.arguments | tojson) ~ '<|call|>' }}{% endfor %}
{%- elif m.role == 'tool' %}<|start|>functions.{{ m.name or 'tool' }} to=assistant<|channel|>commentary<|message|>
{{- m.content | tojson }}<|end|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""  # noqa: E501
MISTRAL = """\
{{- bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{ m.content.strip() }}
{%- if m.tool_calls %}[TOOL_CALLS]{% for call in m.tool_calls %}{{ call.function.name }}[ARGS]{{ call.function.arguments }}
{%- endfor %}{% endif %}{{ eos_token }}
{%- elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content | tojson }}[/TOOL_RESULTS]
{%- else %}{% if loop.last and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{{- '[INST] ' ~ m.content ~ ' [/INST]' }}{% endif %}{% endfor %}"""  # noqa: E501
LLAMA = """\
{{- bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' }}
{%- if loop.first and tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}
{{- m.content | trim }}
{%- for call in m.tool_calls or [] %}{{ '{"name": "' ~ call.function.name ~ '"}' ~ call.function.arguments }}{% endfor %}
{{- '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""  # noqa: E501
MINIMAX = """\
]~!b[{% for tool in tools or [] %}]~b]system{{ '\n<tool>' ~ (tool.function | tojson) ~ '</tool>\n' }}[e~[{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ ']~b]tool\n<response>' ~ m.content ~ '</response>[e~[\n' }}
{%- elif m.role == 'assistant' %}{{ ']~b]ai\n' }}
{%- if m.reasoning_content %}{{ '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' }}{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ '\n<minimax:tool_call>\n<invoke name="' ~ call.function.name ~ '">' }}
{{- call.function.arguments }}</invoke></minimax:tool_call>{% endfor %}{{ '[e~[\n' }}
{%- else %}{{ ']~b]' ~ m.role ~ '\n' ~ m.content ~ '[e~[\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ ']~b]ai\n<think>\n' }}{% endif %}"""  # noqa: E501

TEMPLATES = {
    "chatml": CHATML,
    "xml": XML,
    "deepseek": DEEPSEEK_TEMPLATE,
    "glm": GLM,
    "kimi": KIMI,
    "harmony": HARMONY,
    "mistral": MISTRAL,
    "llama": LLAMA,
    "minimax": MINIMAX,
}

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = (
    [BOS, EOS, "<｜User｜>", "<｜Assistant｜>"]
    + [f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")]
    + [f"<｜tool▁{name}｜>" for name in ("outputs▁begin", "outputs▁end", "output▁begin", "output▁end")]
    + [f"<|im_{name}|>" for name in ("start", "end", "system", "user", "assistant", "middle")]
    + [f"<|tool_{name}|>" for name in ("calls_section_begin", "calls_section_end", "call_begin", "call_end")]
    + ["<|tool_call_argument_begin|>", "<|object_ref_start|>", "<|endoftext|>", "<|fim_prefix|>"]
    + [f"<|{name}|>" for name in ("system", "user", "assistant", "observation", "start", "end", "message")]
    + [f"<|{name}|>" for name in ("channel", "call", "start_header_id", "end_header_id", "eot_id", "return")]
    + ["[gMASK]", "<sop>", "/nothink", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]"]
    + ["[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "]~!b[", "]~b]", "[e~["]
)
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
PLAIN += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "｜DSML｜"]
PLAIN += ["<minimax:tool_call>", "</minimax:tool_call>"]
TEXTUAL = ["  ", "    ", "domainword"]  # added, but not control tokens
WORDS = ["th", "in", "think", "user", "Us", "Ġthe", "im", "_start", "tool", "ar", "ra", "start", "|>", "<|"]
KINDS = ("bytes", "stripping", "folding", "merging", "first")


@cache
def tokenizer(kind: str = "bytes", template: str | None = None) -> Tokenizer:
    """kind: bytes, stripping (tokens swallow white space), folding (the normalizer maps look-alikes to
    tokens), merging (the vocabulary holds control tokens that whole words become), first (a prefix for the
    first word only)."""
    merges = [("t", "h"), ("i", "n"), ("u", "s"), ("|", ">"), ("<", "|"), ("U", "s"), ("i", "m"), ("a", "r")]
    merges += [("r", "a")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inside = ["<think>", "<sop>", "[INST]"] if kind == "merging" else []
    words = [*alphabet, *(a + b for a, b in merges), *inside]
    vocabulary = {word: i for i, word in enumerate(words)}
    if kind == "merging":
        vocabulary["<|im_end|>"] = len(vocabulary) + 7  # the ids have a gap
    backend = HfTokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "merging"))
    split = pre_tokenizers.Split(Regex(r"\s+|[^\s]+" if kind == "merging" else r" ?[^\s]+|\s+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [split, level]
    if kind == "first":
        parts.insert(0, pre_tokenizers.Metaspace(prepend_scheme="first"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    folds = kind == "folding"
    if folds:
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    strips: dict[str, Any] = {"lstrip": True, "rstrip": True} if kind == "stripping" else {}
    backend.add_special_tokens([AddedToken(text, normalized=folds, **strips) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, normalized=folds) for text in PLAIN])
    backend.add_tokens([AddedToken(text, normalized=False) for text in TEXTUAL])
    return Tokenizer(backend, {"bos_token": BOS, "eos_token": EOS}, chat_template=template)
