"""Conversations between a client and a model, whatever the API and whatever the model's chat format.

    types       Conversation, Turn, Tool, ToolCall: what every API's request becomes
    deltas      Reasoning, Text, CallStart, CallArguments: what every model's output becomes
    formats     one small file per chat format: renders a conversation, parses the output
    strict      grammars that hold calls to their schemas
    select      the format of a model

Nothing here knows HTTP or the engine.
"""

from farthing.conversation.base import ChatFormat, ControlTokens, Tags
from farthing.conversation.types import (
    Answer,
    CallArguments,
    CallStart,
    Conversation,
    Delta,
    Reasoning,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    Turn,
    collect,
)

__all__ = [
    "Answer",
    "CallArguments",
    "CallStart",
    "ChatFormat",
    "ControlTokens",
    "Conversation",
    "Delta",
    "Reasoning",
    "Tags",
    "Text",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "Turn",
    "collect",
]
