"""DeepSeek V3.2: rules that the checkpoint ships as code and not as a template.

Source: encoding_dsv32.py of the DeepSeek-V3.2 release. Reasoning before the last user turn is dropped.
"""

from __future__ import annotations

from farthing.conversation.base import THINK, ChatFormat, ControlTokens, Delimiters, FormatError
from farthing.conversation.formats.dsml import MARK, DsmlCalls, last_request, syntax, to_json, write_calls
from farthing.conversation.types import Conversation, Tool, Turn

SECTION = "function_calls"
_RESULTS = Delimiters("<function_results>", "</function_results>", "<result>", "</result>")

# The text the model was trained with.
_TOOLS = f"""## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{MARK}function_calls>" block like the following as part of your reply to the user:
<{MARK}function_calls>
<{MARK}invoke name="$FUNCTION_NAME">
<{MARK}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{MARK}parameter>
...
</{MARK}invoke>
<{MARK}invoke name="$FUNCTION_NAME2">
...
</{MARK}invoke>
</{MARK}function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:
<{MARK}function_calls>
...
</{MARK}function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
@@SCHEMAS@@
</functions>
"""  # noqa: E501


def _described(tools: tuple[Tool, ...]) -> str:
    return _TOOLS.replace("@@SCHEMAS@@", "\n".join(to_json(tool.document()) for tool in tools))


def render(conversation: Conversation, tokens: ControlTokens) -> str:
    """The prompt."""
    thinks = V32.thinks(conversation, default=False)
    turns = list(conversation.turns)
    if conversation.offered:
        turns.insert(0, Turn("system"))  # the tools come first, in a system turn of their own
    last = last_request(turns)
    parts = [tokens.bos]
    results = _Results()
    for position, turn in enumerate(turns):
        opens = "<think>" if thinks and position >= last else "</think>"
        if turn.role == "system":
            described = conversation.offered if position == 0 else ()
            parts += (turn.text, "\n\n" + _described(described) if described else "")
        elif turn.role == "developer":
            parts += ("<｜User｜>\n\n# The user's message is: ", turn.text, "<｜Assistant｜>", opens)
        elif turn.role == "user":
            parts += ("<｜User｜>", turn.text, "<｜Assistant｜>", opens)
        elif turn.role == "tool":
            following = turns[position + 1].role if position + 1 < len(turns) else None
            parts += results.write(turn, following, opens)
        else:
            results.expect(turn)
            keeps = thinks and position > last
            parts += (
                turn.reasoning + "</think>" if keeps else "",
                turn.text,
                write_calls(turn.calls, SECTION),
            )
            parts.append("" if conversation.resume and position + 1 == len(turns) else tokens.eos)
    return "".join(parts)


class _Results:
    """The outputs of one turn's calls, in one block."""

    def __init__(self) -> None:
        self._calls = self._written = 0

    def expect(self, turn: Turn) -> None:
        """The calls that the next tool turns answer."""
        self._calls, self._written = len(turn.calls), 0

    def write(self, turn: Turn, following: str | None, opens: str) -> list[str]:
        """One output, with the block's beginning and end where they belong."""
        if self._written >= self._calls:
            raise FormatError(
                "a tool turn answers no call; expected it after an assistant turn with tool_calls"
            )
        self._written += 1
        parts = ["\n\n<function_results>"] if self._written == 1 else []
        parts.append(f"\n<result>{_RESULTS.broken(turn.text)}</result>")
        if self._written == self._calls or following != "tool":
            parts.append(f"\n</function_results>\n\n{opens}")
        return parts


V32 = ChatFormat(
    "deepseek_v32",
    render,
    lambda tools, tokens=frozenset(): DsmlCalls(tools),
    THINK,
    efforts=("none",),
    markup=frozenset((MARK,)),
    syntax=syntax(SECTION),
)
