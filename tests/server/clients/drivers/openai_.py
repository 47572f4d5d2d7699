"""The openai package: chat completions, then responses."""

import json
from functools import cache

from common import JSON, LOOP, PLAIN, SCHEMA, look, run
from openai import NotFoundError, OpenAI

TOOL = {"name": "look", "description": "Looks up.", "parameters": SCHEMA}


@cache
def client(url):
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chat(url, says, **fields):
    messages = says if isinstance(says, list) else [{"role": "user", "content": says}]
    fields = {"model": "tiny", "max_tokens": 900} | fields
    if fields.pop("stream", False):
        with client(url).chat.completions.stream(messages=messages, **fields) as stream:
            return stream.get_final_completion().choices[0].message
    return client(url).chat.completions.create(messages=messages, **fields).choices[0].message


def tools(url, **fields):
    turns, fields = (
        [{"role": "user", "content": LOOP}],
        fields | {"tools": [{"type": "function", "function": TOOL}]},
    )
    message = chat(url, turns, **fields)
    (call,) = message.tool_calls
    result = look(**json.loads(call.function.arguments))
    turns += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    return chat(url, turns, **fields).content


def respond(url, says, **fields):
    fields = {"model": "tiny", "max_output_tokens": 900, "input": says} | fields
    if fields.pop("stream", False):
        with client(url).responses.stream(**fields) as stream:
            return stream.get_final_response()
    return client(url).responses.create(**fields)


def tools_of_responses(url, **fields):
    turns = [{"role": "user", "content": LOOP}]
    fields |= {"tools": [{"type": "function", "strict": False, **TOOL}]}
    output = respond(url, turns, **fields).output
    call = output[-1]
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": look(**json.loads(call.arguments)),
    }
    return respond(url, [*turns, *output, result], **fields).output_text


def reasoning_of_responses(url):
    items = respond(url, PLAIN, reasoning={"effort": "high"}, stream=True).output
    return "".join(
        part.text for item in items if item.type == "reasoning" for part in item.content or item.summary
    )


def refused(ask):
    try:
        ask()
    except NotFoundError as error:
        return error.status_code


FORM = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
TEXT = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}}
CHECKS = {
    "answer": lambda url: chat(url, PLAIN).content,
    "stream": lambda url: chat(url, PLAIN, stream=True).content,
    "tools": tools,
    "tools (stream)": lambda url: tools(url, stream=True),
    "structured": lambda url: json.loads(chat(url, JSON, response_format=FORM).content),
    "reasoning": lambda url: (
        getattr(chat(url, PLAIN, reasoning_effort="high"), "reasoning_content", None) or ""
    ),
    "errors": lambda url: refused(lambda: chat(url, PLAIN, model="absent")),
    "answer (responses)": lambda url: respond(url, PLAIN).output_text,
    "stream (responses)": lambda url: respond(url, PLAIN, stream=True).output_text,
    "tools (responses)": tools_of_responses,
    "tools (responses, stream)": lambda url: tools_of_responses(url, stream=True),
    "structured (responses)": lambda url: json.loads(respond(url, JSON, text=TEXT).output_text),
    "reasoning (responses)": reasoning_of_responses,
    "errors (responses)": lambda url: refused(lambda: respond(url, PLAIN, model="absent")),
}

if __name__ == "__main__":
    run(CHECKS)
