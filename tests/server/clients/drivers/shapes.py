"""Requests in the shapes of clients that cannot run here: Open WebUI (a web service) and Cline (an editor's).

Written from what their public sources send; `shapes.json` has the bodies.
"""

import json
import os
from pathlib import Path

import httpx
from common import CITY, LOOP, PLAIN, SCHEMA, look, run

SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text())[Path(os.environ["CLIENT"]).name]
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks up.", "parameters": SCHEMA}}


def send(url, shape, messages=(), **fields):
    """Post a body in a shape; a body without messages is sent as it is."""
    path, body = SHAPES[shape]["path"], SHAPES[shape]["body"] | fields
    if messages:
        body["messages"] = [*body["messages"], *messages]
    headers = SHAPES["headers"] | {"Authorization": "Bearer none"}
    return httpx.post(url + path, json=body, headers=headers, timeout=60)


def read(answer):
    """Text, reasoning and calls of a stream, either in events or in lines of JSON."""
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line and line[0] != ":"]
    found, calls = {"content": "", "thought": ""}, {}
    for each in map(json.loads, (line for line in lines if line != "[DONE]")):
        delta = each["message"] if "message" in each else (each["choices"] or [{"delta": {}}])[0]["delta"]
        found["content"] += delta.get("content") or ""
        found["thought"] += delta.get("reasoning_content") or delta.get("thinking") or ""
        for call in delta.get("tool_calls") or ():
            function = call["function"]
            index = call.get("index", function.get("index", 0))
            made = calls.setdefault(
                index, {"id": call.get("id"), "name": function.get("name"), "arguments": ""}
            )
            given = function.get("arguments") or ""
            made["arguments"] += given if isinstance(given, str) else json.dumps(given)
    assert "[DONE]" in lines or each["done"]
    return found["content"], found["thought"], list(calls.values())


def user(text):
    """A turn as the client writes it."""
    return {"role": "user", "content": [{"type": "text", "text": text}] if "parts" in SHAPES else text}


def tools(url, shape):
    content, _, (call,) = read(send(url, shape, [user(LOOP)], tools=[TOOL]))
    given = json.loads(call["arguments"])
    assert call["name"] == "look" and given == CITY
    native = "/api/" in SHAPES[shape]["path"]
    function = {"name": "look", "arguments": given if native else call["arguments"]}
    made = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": call["id"], "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": call["id"], "content": look(**given)}
    return read(send(url, shape, [user(LOOP), made, result], tools=[TOOL]))[0]


def listed(url):
    """The lists of models, which a client reads first."""
    for path, field, name in SHAPES.get("lists", ()):
        answer = httpx.get(url + path, headers=SHAPES["headers"], timeout=60)
        assert "tiny" in [each[name] for each in answer.json()[field]], answer.text


def check(shape, what):
    def answer(url):
        listed(url)
        document = send(url, shape, [user(PLAIN)]).json()
        return (document["message"] if "message" in document else document["choices"][0]["message"])[
            "content"
        ]

    return {
        "answer": answer,
        "stream": lambda url: read(send(url, shape, [user(PLAIN)]))[0],
        "tools": lambda url: tools(url, shape),
        "reasoning": lambda url: read(send(url, shape, [user(PLAIN)]))[1],
        "errors": lambda url: send(url, shape, [user(PLAIN)], model="absent").status_code,
    }[what]


run(
    {f"{what} ({shape})": check(shape, what) for what, shapes in SHAPES["checks"].items() for shape in shapes}
)
