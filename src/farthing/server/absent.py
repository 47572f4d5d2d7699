"""Endpoints of OpenAI's and Anthropic's APIs that do not exist here, with the reasons."""

from __future__ import annotations

_STATELESS = "nothing is stored between requests except recent responses"
_TEXT = "the model reads and writes text only"
# Prefixes of paths, as far as a reason applies to all paths below.
_REASONS = {
    "/v1/responses/compact": "compaction of responses: send shorter input, or truncation = 'auto'",
    "/v1/conversations": f"conversations: {_STATELESS}; use previous_response_id, or send all items in input",
    "/v1/messages/batches": "message batches: send each request to /v1/messages",
    "/v1/batches": "batches: send each request itself",
    "/v1/complete": "Anthropic's text completions: use /v1/messages",
    "/v1/embeddings": "embeddings: the model is a causal language model",
    "/v1/moderations": "moderations: the model is a causal language model",
    "/v1/rerank": "reranking: the model is a causal language model",
    "/v1/score": "scores: the model is a causal language model",
    "/v1/audio": f"audio: {_TEXT}",
    "/v1/images": f"images: {_TEXT}",
    "/v1/videos": f"videos: {_TEXT}",
    "/v1/realtime": f"realtime sessions: {_TEXT}; use /v1/responses with stream = true",
    "/v1/files": f"files: {_STATELESS}; send their text",
    "/v1/uploads": f"uploads: {_STATELESS}; send their text",
    "/v1/vector_stores": f"vector stores: {_STATELESS}",
    "/v1/assistants": "assistants: use /v1/responses",
    "/v1/threads": "threads: use /v1/responses",
    "/v1/containers": "containers: the server runs no code",
    "/v1/skills": "skills: the server runs no code",
    "/v1/fine_tuning": "fine-tuning: see `farthing train`",
    "/v1/evals": "evals: see `farthing eval`",
    "/v1/organization": "administration of organizations",
    "/v1/organizations": "administration of organizations",
}


def reason(path: str) -> str | None:
    """Why an endpoint does not exist; None if it belongs to no known API."""
    parts = path.rstrip("/").split("/")
    for length in range(len(parts), 2, -1):
        if (why := _REASONS.get("/".join(parts[:length]))) is not None:
            return f"{path} is not served: {why}"
    return None
