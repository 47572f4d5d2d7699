"""The formats of calls that only the models' own templates render, by the markup that those print."""

from __future__ import annotations

from collections.abc import Mapping

from farthing.conversation.base import CallFormat, ChatFormat
from farthing.conversation.formats.gemma import GEMMA3, GEMMA4
from farthing.conversation.formats.hermes import HERMES
from farthing.conversation.formats.llama3 import GRANITE, LLAMA3
from farthing.conversation.formats.minimax_m2 import MINIMAX_M2
from farthing.conversation.formats.mistral import MISTRAL, MISTRAL_LIST
from farthing.conversation.formats.qwen3_coder import QWEN3_CODER

# The first that a template contains decides: Qwen3-Coder's has Hermes' tags, too.
BY_MARKUP: Mapping[str, CallFormat] = {
    "<|tool_call>": GEMMA4,
    "<minimax:tool_call>": MINIMAX_M2,
    "<function=": QWEN3_CODER,
    "[ARGS]": MISTRAL,
    "[TOOL_CALLS]": MISTRAL_LIST,
    "<|tool_call|>": GRANITE,
    "<tool_call>": HERMES,
    "<|start_header_id|>": LLAMA3,
}
# Formats without tools, by model type.
TOOLLESS: Mapping[str, ChatFormat] = {"gemma3": GEMMA3, "gemma3_text": GEMMA3}
