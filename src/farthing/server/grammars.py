"""The grammar of an answer: the client's, or the one of required or restricted tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from farthing.conversation import forced
from farthing.conversation.formats.base import ChatFormat
from farthing.conversation.strict import call_grammar, forced_grammar
from farthing.conversation.types import Conversation
from farthing.engine.request import CallParams, StructuredOutputsParams
from farthing.server.errors import ApiError
from farthing.server.formats import ModelFormats


@dataclass(frozen=True, slots=True)
class Grammars:
    """At most one of the two is set."""

    structured: StructuredOutputsParams | None  # of the whole answer
    calls: CallParams | None
    listed: bool = False  # `structured` forces calls as JSON instead of the model's format

    @property
    def whole(self) -> bool:
        """Whether a grammar applies from the beginning of the answer."""
        return self.structured is not None or (self.calls is not None and not self.calls.openers)


def grammars(
    conversation: Conversation,
    structured: StructuredOutputsParams | None,
    form: ChatFormat,
    formats: ModelFormats,
    room: int | None = None,
) -> Grammars:
    """structured: the client's constraint, used if no call is required. room: the answer's maximum number of
    tokens. Raises ApiError (400)."""
    required = conversation.choice.mode == "required"
    if structured is not None and not required:
        return Grammars(structured, None)
    try:
        if required:
            found = forced_grammar(conversation, form.syntax, formats.special_id, room)
        else:
            found = call_grammar(conversation, form.syntax, formats.special_id)
    except ValueError as error:
        raise ApiError(400, str(error), param="tools", code="invalid_value") from error
    if found is not None:
        return Grammars(None, CallParams(openers=found.openers, grammar=found.grammar))
    if required:
        return Grammars(StructuredOutputsParams(json=forced.schema(conversation, room)), None, listed=True)
    return Grammars(None, None)
