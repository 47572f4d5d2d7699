"""LangChain: an agent with a tool, over chat completions, responses and messages."""

import anthropic
import openai
from common import JSON, LOOP, PLAIN, SCHEMA, look, run
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


def chat(url, model="tiny", **fields):
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model=model, max_tokens=900, max_retries=0, **fields
    )


def claude(url, model="tiny", **fields):
    return ChatAnthropic(base_url=url, api_key="none", model=model, max_tokens=2000, max_retries=0, **fields)


def stream(model):
    return "".join(str(part.text) for part in model.stream(PLAIN))


def tools(model):
    agent = create_agent(model, tools=[tool(look)])
    return str(agent.invoke({"messages": [("user", LOOP)]})["messages"][-1].text)


def structured(model):
    form = SCHEMA | {"title": "place", "description": "A place."}
    return model.with_structured_output(form, method="json_schema").invoke(JSON)


def reasoning(message):
    return "".join(
        block.get("reasoning", "") for block in message.content_blocks if block["type"] == "reasoning"
    )


def errors(model, kind):
    try:
        model.invoke(PLAIN)
    except kind as error:
        return error.status_code


THINKS = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
run(
    {
        "answer": lambda url: str(chat(url).invoke(PLAIN).text),
        "stream": lambda url: stream(chat(url)),
        "tools": lambda url: tools(chat(url)),
        "structured": lambda url: structured(chat(url)),
        "errors": lambda url: errors(chat(url, "absent"), openai.NotFoundError),
        "answer (responses)": lambda url: str(chat(url, use_responses_api=True).invoke(PLAIN).text),
        "stream (responses)": lambda url: stream(chat(url, use_responses_api=True)),
        "tools (responses)": lambda url: tools(chat(url, use_responses_api=True)),
        "answer (messages)": lambda url: str(claude(url).invoke(PLAIN).text),
        "stream (messages)": lambda url: stream(claude(url)),
        "tools (messages)": lambda url: tools(claude(url)),
        "reasoning (messages)": lambda url: reasoning(claude(url, **THINKS).invoke(PLAIN)),
        "errors (messages)": lambda url: errors(claude(url, "absent"), anthropic.NotFoundError),
    }
)
