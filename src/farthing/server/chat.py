"""/v1/chat/completions: a conversation in, the next turn out."""

from __future__ import annotations

import json
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from farthing.engine.request import SamplingParams
from farthing.server.chat_answer import ChatAnswer
from farthing.server.errors import ApiError
from farthing.server.events import EventStream
from farthing.server.protocol import ChatCompletionRequest, Message, Tool
from farthing.server.reasoning import opens_reasoning
from farthing.server.sampling import chat_params
from farthing.server.service import Service

_RESERVED = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}


async def chat(service: Service, body: ChatCompletionRequest, request: Request, client: str) -> Response:
    """Answer a chat request, streamed or whole. Raises ApiError, ClientGone."""
    engine = service.require_engine()
    model = service.check_model(body.model)
    tools = body.tools if body.tool_choice != "none" else None
    prompt = await render(
        service,
        client,
        body.messages,
        tools,
        body.add_generation_prompt,
        body.continue_final_message,
        body.chat_template_kwargs,
    )
    params = chat_params(body, engine.default_sampling)
    ids = await service.encode(prompt, False, client, "messages")
    job = await service.open(
        client,
        [ids],
        params,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        kind="delta" if body.stream else "final",
    )
    answer = ChatAnswer(
        body=body,
        model=model,
        identity=f"chatcmpl-{uuid.uuid4().hex}",
        created=service.now(),
        prompt_tokens=len(ids),
        tokenizer=engine.tokenizer,
        prompt_opens=_reasoning(service, params, prompt),
    )
    if body.stream:
        return EventStream(job, answer.stream(job))
    document = await job.guard(request.receive, answer.whole(job))
    return Response(json.dumps(document), media_type="application/json")


async def render(
    service: Service,
    client: str,
    messages: list[Message],
    tools: list[Tool] | None,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The prompt of a conversation by the model's chat template. Raises ApiError (400)."""
    if taken := _RESERVED & set(template_kwargs or {}):
        raise ApiError(
            400,
            f"chat_template_kwargs sets {sorted(taken)}; expected other names",
            param="chat_template_kwargs",
        )
    turns = [_turn(message) for message in messages]
    described = [tool.model_dump(exclude_none=True) for tool in tools or []]
    conversation = {
        "messages": turns,
        "tools": described or None,
        "add_generation_prompt": add_generation_prompt,
        **(template_kwargs or {}),
    }
    prompt = await service.render(conversation, client)
    return _cut_after_last(prompt, messages[-1]) if continue_final_message else prompt


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it. Without calls it has no `tool_calls`: templates that only ask whether
    the key is there would drop the text."""
    turn = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        turn["content"] = "".join(part.text for part in message.content)
    if not message.tool_calls:
        turn.pop("tool_calls", None)
    return turn


def _cut_after_last(prompt: str, last: Message) -> str:
    """The prompt up to the end of its last message's text, so that the model goes on writing it."""
    content = last.content if isinstance(last.content, str) else "".join(p.text for p in last.content or [])
    at = prompt.rfind(content.strip())
    if at < 0:
        raise ApiError(
            400,
            "continue_final_message: the chat template changes the last message, so it cannot be continued",
            param="continue_final_message",
        )
    return prompt[: at + len(content.strip())]


def _reasoning(service: Service, params: SamplingParams, prompt: str) -> bool | None:
    """None: the output is not parsed for reasoning; else whether the prompt has already opened it.

    A grammar holds from the first token on, so structured output leaves no room for reasoning.
    """
    if params.structured_outputs is not None or not service.reasons():
        return None
    return opens_reasoning(prompt)
