"""LiteLLM: chat completions, then messages."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # prices are not downloaded
import litellm
from common import JSON, LOOP, PLAIN, SCHEMA, look, run

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks up.", "parameters": SCHEMA}}
FORM = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}


def ask(url, says, model="tiny", claude=False, **fields):
    messages = says if isinstance(says, list) else [{"role": "user", "content": says}]
    base, model = (url, f"anthropic/{model}") if claude else (f"{url}/v1", f"openai/{model}")
    return litellm.completion(
        model=model,
        api_base=base,
        api_key="none",
        messages=messages,
        max_tokens=2000,
        num_retries=0,
        **fields,
    )


def said(*asked, **fields):
    return ask(*asked, **fields).choices[0].message


def stream(url, **fields):
    return "".join(part.choices[0].delta.content or "" for part in ask(url, PLAIN, stream=True, **fields))


def tools(url, **fields):
    turns = [{"role": "user", "content": LOOP}]
    message = said(url, turns, tools=[TOOL], **fields)
    (call,) = message.tool_calls
    result = look(**json.loads(call.function.arguments))
    turns += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": result},
    ]
    return said(url, turns, tools=[TOOL], **fields).content


def reasoning(url, **fields):
    return (
        said(
            url, PLAIN, allowed_openai_params=["reasoning_effort"], reasoning_effort="high", **fields
        ).reasoning_content
        or ""
    )


def errors(url, **fields):
    try:
        ask(url, PLAIN, "absent", **fields)
    except litellm.NotFoundError as error:
        return error.status_code


run(
    {
        "answer": lambda url: said(url, PLAIN).content,
        "stream": stream,
        "tools": tools,
        "structured": lambda url: json.loads(said(url, JSON, response_format=FORM).content),
        "reasoning": reasoning,
        "errors": errors,
        "answer (messages)": lambda url: said(url, PLAIN, claude=True).content,
        "stream (messages)": lambda url: stream(url, claude=True),
        "tools (messages)": lambda url: tools(url, claude=True),
        "errors (messages)": lambda url: errors(url, claude=True),
    }
)
