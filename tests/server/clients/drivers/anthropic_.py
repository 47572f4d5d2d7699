"""The anthropic package."""

import json
from functools import cache

from anthropic import Anthropic, NotFoundError
from common import JSON, LOOP, PLAIN, SCHEMA, look, run

TOOL = {"name": "look", "description": "Looks up.", "input_schema": SCHEMA}


@cache
def client(url):
    return Anthropic(base_url=url, api_key="none", max_retries=0)


def ask(url, says, **fields):
    messages = says if isinstance(says, list) else [{"role": "user", "content": says}]
    fields = {"model": "tiny", "max_tokens": 2000} | fields
    if fields.pop("stream", False):
        with client(url).messages.stream(messages=messages, **fields) as stream:
            return stream.get_final_message()
    return client(url).messages.create(messages=messages, **fields)


def text(message):
    return "".join(block.text for block in message.content if block.type == "text")


def tools(url, **fields):
    turns, fields = [{"role": "user", "content": LOOP}], fields | {"tools": [TOOL]}
    message = ask(url, turns, **fields)
    (call,) = (block for block in message.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": look(**call.input)}
    turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    return text(ask(url, turns, **fields))


def reasoning(url):
    message = ask(url, PLAIN, thinking={"type": "enabled", "budget_tokens": 1024}, stream=True)
    return "".join(block.thinking for block in message.content if block.type == "thinking")


def errors(url):
    try:
        ask(url, PLAIN, model="absent")
    except NotFoundError as error:
        return error.status_code


FORM = {"format": {"type": "json_schema", "schema": SCHEMA}}
CHECKS = {
    "answer": lambda url: text(ask(url, PLAIN)),
    "stream": lambda url: text(ask(url, PLAIN, stream=True)),
    "tools": tools,
    "tools (stream)": lambda url: tools(url, stream=True),
    "structured": lambda url: json.loads(text(ask(url, JSON, output_config=FORM))),
    "reasoning": reasoning,
    "errors": errors,
}

if __name__ == "__main__":
    run(CHECKS)
