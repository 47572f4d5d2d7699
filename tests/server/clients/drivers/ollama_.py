"""The ollama package."""

import json

from common import JSON, LOOP, PLAIN, SCHEMA, look, run
from ollama import Client, ResponseError

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks up.", "parameters": SCHEMA}}


def ask(url, says, model="tiny", **fields):
    messages = says if isinstance(says, list) else [{"role": "user", "content": says}]
    return Client(host=url).chat(model=model, messages=messages, **fields)


def tools(url):
    turns = [{"role": "user", "content": LOOP}]
    message = ask(url, turns, tools=[TOOL]).message
    (call,) = message.tool_calls
    turns += [message, {"role": "tool", "tool_name": "look", "content": look(**call.function.arguments)}]
    return ask(url, turns, tools=[TOOL]).message.content


def errors(url):
    try:
        ask(url, PLAIN, "absent")
    except ResponseError as error:
        return error.status_code


run(
    {
        "answer": lambda url: ask(url, PLAIN).message.content,
        "stream": lambda url: "".join(part.message.content or "" for part in ask(url, PLAIN, stream=True)),
        "tools": tools,
        "structured": lambda url: json.loads(ask(url, JSON, format=SCHEMA).message.content),
        "reasoning": lambda url: ask(url, PLAIN, think=True).message.thinking or "",
        "errors": errors,
    }
)
