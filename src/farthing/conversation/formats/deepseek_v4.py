"""DeepSeek V4: rules that the checkpoint ships as code and not as a template.

Source: encoding_dsv4.py of the DeepSeek-V4 release. Tool results are part of a user turn. Reasoning of
earlier turns is dropped unless tools are in play. The model's own rules then also drop developer turns before
the last request; Farthing keeps those, as nothing a client wrote may vanish. The tags around results are
ordinary text, so they are broken in texts that stand in a user turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from farthing.conversation.base import THINK, ChatFormat, ControlTokens, Delimiters, FormatError
from farthing.conversation.formats.dsml import MARK, DsmlCalls, syntax, to_json, write_calls
from farthing.conversation.types import Conversation, Tool, ToolCall

SECTION = "tool_calls"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
RESULT, RESULT_END = "<tool_result>", "</tool_result>"
_RESULTS = Delimiters(RESULT, RESULT_END)

# The texts the model was trained with.
_EFFORTS = {
    "low": "",
    "high": "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the "
    "root cause, rigorously stress-testing your logic against all potential paths, edge cases, and "
    "adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n",
    "max": "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively "
    "decompose the problem into its most fundamental components, trace every causal chain to its root, and "
    "resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are "
    "certain that no assumption remains unchecked and no error remains undiscovered.\n\n",
}
_MEANS = {"minimal": "low", "low": "low", "medium": "low", "high": "high", "max": "max", None: "high"}
_TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<{MARK}tool_calls>" block like the following:

<{MARK}tool_calls>
<{MARK}invoke name="$TOOL_NAME">
<{MARK}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{MARK}parameter>
...
</{MARK}invoke>
<{MARK}invoke name="$TOOL_NAME2">
...
</{MARK}invoke>
</{MARK}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

@@SCHEMAS@@

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""  # noqa: E501


def _described(tools: tuple[Tool, ...]) -> str:
    return _TOOLS.replace("@@SCHEMAS@@", "\n".join(to_json(tool.document()) for tool in tools))


@dataclass(slots=True)
class _Part:
    """A turn of the format: user texts and tool results that follow one another are one."""

    role: str
    texts: list[str] = field(default_factory=list)
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    describes: bool = False  # the tools


def _parts(conversation: Conversation) -> list[_Part]:
    parts: list[_Part] = []
    for turn in conversation.turns:
        if turn.role in ("user", "tool"):
            if not parts or parts[-1].role != "user":
                parts.append(_Part("user"))
            if turn.role == "tool":
                parts[-1].texts.append(f"{RESULT}{_RESULTS.broken(turn.text)}{RESULT_END}")
            else:
                parts[-1].texts.append(_RESULTS.broken(turn.text))
        else:
            text = _RESULTS.broken(turn.text) if turn.role == "developer" else turn.text
            parts.append(_Part(turn.role, [text], reasoning=turn.reasoning, calls=turn.calls))
    if conversation.offered:
        system = next((part for part in parts if part.role == "system"), None)
        if system is None:
            system = _Part("system", [""])
            parts.insert(0, system)
        system.describes = True
    return parts


def render(conversation: Conversation, tokens: ControlTokens) -> str:
    """The prompt."""
    thinks = V4.thinks(conversation, default=True)
    parts = _parts(conversation)
    last = max((i for i, part in enumerate(parts) if part.role in ("user", "developer")), default=-1)
    keeps = bool(conversation.offered)  # the reasoning of all turns
    out = [tokens.bos, _EFFORTS[_MEANS[conversation.effort]] if thinks else ""]
    for position, part in enumerate(parts):
        following = parts[position + 1].role if position + 1 < len(parts) else None
        described = "\n\n" + _described(conversation.offered) if part.describes else ""
        if part.role == "assistant":
            reasoning = part.reasoning + "</think>" if thinks and (keeps or position > last) else ""
            out += (reasoning, part.texts[0], write_calls(part.calls, SECTION))
            out.append("" if conversation.resume and following is None else tokens.eos)
            continue
        if part.role == "developer" and not part.texts[0]:
            raise FormatError("a developer turn is empty; expected text")
        out += ("" if part.role == "system" else USER, "\n\n".join(part.texts), described)
        generates = conversation.generate if following is None else following == "assistant"
        if generates:
            opens = thinks and (keeps or position >= last)
            out += (ASSISTANT, "<think>" if opens else "</think>")
    return "".join(out)


V4 = ChatFormat(
    "deepseek_v4",
    render,
    lambda tools, tokens=frozenset(): DsmlCalls(tools),
    THINK,
    efforts=("none", "minimal", "low", "medium", "high", "max"),
    markup=frozenset((MARK,)),
    syntax=syntax(SECTION),
)
