"""The routes of all APIs."""

from __future__ import annotations

from fastapi import FastAPI

from farthing.server.api import embeddings, messages, ollama, openai, responses
from farthing.server.errors import Documented
from farthing.server.service import Service

ERRORS = openai.ERRORS  # unless an API documents its own
_STREAMED: Documented = {
    200: {
        "content": {"application/json": {}, "text/event-stream": {}},
        "description": "One document, or a stream",
    }
}


def add_routes(api: FastAPI, service: Service) -> None:
    """Add every API's routes."""
    for each in (openai, responses, messages):
        each.add_routes(api, service, _STREAMED)
    embeddings.add_routes(api, service)
    ollama.add_routes(api, service)
