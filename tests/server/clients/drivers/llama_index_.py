"""LlamaIndex's client of servers that speak OpenAI's API."""

import openai
from common import JSON, LOOP, PLAIN, look, run
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Place(BaseModel):
    """A place."""

    city: str
    days: int


def model(url, name="tiny"):
    return OpenAILike(
        api_base=f"{url}/v1", api_key="none", model=name, max_tokens=900, max_retries=0,
        context_window=100_000, is_chat_model=True, is_function_calling_model=True,
        should_use_structured_outputs=True,
    )  # fmt: skip


def turn(text, role="user", **fields):
    return ChatMessage(role=role, content=text, additional_kwargs=fields)


def tools(url):
    offered, turns = [FunctionTool.from_defaults(fn=look)], [turn(LOOP)]
    answer = model(url).chat_with_tools(offered, chat_history=turns)
    (call,) = model(url).get_tool_calls_from_response(answer)
    result = turn(look(**call.tool_kwargs), "tool", tool_call_id=call.tool_id)
    return model(url).chat_with_tools(offered, chat_history=[*turns, answer.message, result]).message.content


def errors(url):
    try:
        model(url, "absent").chat([turn(PLAIN)])
    except openai.NotFoundError as error:
        return error.status_code


run(
    {
        "answer": lambda url: model(url).chat([turn(PLAIN)]).message.content,
        "stream": lambda url: "".join(part.delta or "" for part in model(url).stream_chat([turn(PLAIN)])),
        "tools": tools,
        "structured": lambda url: model(url).as_structured_llm(Place).chat([turn(JSON)]).raw.model_dump(),
        "errors": errors,
    }
)
