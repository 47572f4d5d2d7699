"""/v1/embeddings and /v1/rerank, by models made for them: Qwen3-Embedding and Qwen3-Reranker.

An embedding is the hidden state of the last token, of length one. A document's relevance is the probability
of "yes", of "yes" and "no", after the prompt that Qwen3-Reranker was trained with.
"""

from __future__ import annotations

import base64
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
from fastapi import Body as FromBody
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from farthing.engine.embedding import HIDDEN, PROBE, check_dimensions, check_pooling, embeddings
from farthing.engine.request import SamplingParams
from farthing.server.api.openai_protocol import OllamaError, TokenIds
from farthing.server.errors import STATUSES, ApiError, Documented
from farthing.server.formats import made_for
from farthing.server.jobs import Job
from farthing.server.schema import Body, FieldNames, Strict, words
from farthing.server.service import Service
from farthing.server.stream import PiecedAnswer, Pieces
from farthing.server.work import check_length, encode, submit

log = logging.getLogger("farthing.server")

MOST_INPUTS = 1024  # of a request
_BATCH = 65_536  # characters of documents that are joined with their query and tokenized at once
WARNING_HEADER = "X-Farthing-Warning"
_Text = Annotated[str, Field(min_length=1)]
_INPUT = FieldNames(prompt="input")
_DOCUMENTS = FieldNames(prompt="documents")


class EmbeddingsRequest(Body):
    """Body of /v1/embeddings."""

    known = words("user truncate_prompt_tokens")

    model: str | None = None
    input: (
        _Text
        | TokenIds
        | Annotated[list[_Text], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)


class Document(Strict):
    """A document to rank."""

    text: str


class RerankRequest(Body):
    """Body of /v1/rerank."""

    known = words("max_tokens_per_doc max_chunks_per_doc user")

    model: str | None = None
    query: _Text
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False
    instruction: str = "Given a web search query, retrieve relevant passages that answer the query"

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


class EmbedRequest(Body):
    """Body of /api/embed; of its older form /api/embeddings."""

    known = words("truncate options keep_alive")

    model: str
    input: str | Annotated[list[str], Field(max_length=MOST_INPUTS, fail_fast=True)] = ""
    prompt: str = ""
    dimensions: int | None = Field(default=None, ge=1)


# Embeddings.


async def embed(
    service: Service, request: Request, inputs: Sequence[str] | Sequence[list[int]], dimensions: int | None
) -> tuple[NDArray[np.float32], int]:
    """The embeddings [n, D] of texts or token ids, and the number of tokens. Raises ApiError."""
    engine, client = service.require_engine(), request.scope["client_name"]
    try:
        check_pooling(engine.config.model)
    except ValueError as error:
        raise ApiError(400, str(error), param="model", code="unsupported_model") from error
    try:
        check_dimensions(dimensions, engine.model_config.hidden_size)
    except ValueError as error:
        raise ApiError(400, str(error), param="dimensions", code="invalid_value") from error
    texts = [each for each in inputs if isinstance(each, str)]
    prompts = await encode(service, texts, True, client, "input") if texts else [*inputs]
    states = await _probed(service, request, prompts, HIDDEN, _INPUT)
    return embeddings(states, dimensions), sum(map(len, prompts))


async def _probed(
    service: Service,
    request: Request,
    prompts: Sequence[Any],
    params: SamplingParams,
    names: FieldNames,
) -> list[NDArray[np.float32]]:
    """What the engine reports of every prompt's last token."""
    job = await submit(service, request.scope["client_name"], prompts, params, kind="final", names=names)

    async def collect(job: Job) -> dict[int, NDArray[np.float32]]:
        found: dict[int, NDArray[np.float32]] = {}
        async for position, output in job.outputs():
            if output.probe is not None:
                found[position] = output.probe
        return found

    found = await job.guard(request.receive, collect(job))
    return [found[position] for position in range(len(prompts))]


def warning(service: Service, word: str, what: str) -> dict[str, str]:
    """A header if the model's name does not tell that it is made for this."""
    model = service.require_engine().config.model
    if made_for(model, word):
        return {}
    said = f"{service.names[0]} was not trained for {what}"
    log.warning("%s; expected a model such as Qwen3-%s", said, "Embedding" if word == "embed" else "Reranker")
    return {WARNING_HEADER: said.encode("ascii", "replace").decode()}


# Ranking, with Qwen3-Reranker's prompt.

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


async def scores(service: Service, request: Request, body: RerankRequest) -> tuple[list[float], int]:
    """The relevance of each document, and the number of tokens. Raises ApiError."""
    engine, client = service.require_engine(), request.scope["client_name"]
    tokenizer = engine.tokenizer
    answers = [tokenizer.backend.token_to_id(word) if tokenizer else None for word in ("yes", "no")]
    if tokenizer is None or None in answers:
        why = "the model's tokenizer has no tokens 'yes' and 'no'; expected a model such as Qwen3-Reranker"
        raise ApiError(400, why, param="model", code="unsupported_model")
    before, after = await encode(service, [_BEFORE, _AFTER], False, client)
    head = f"<Instruct>: {body.instruction}\n<Query>: {body.query}\n<Document>: "
    _check_lengths(service, head, body.texts)
    prompts = [
        [*before, *ids, *after]
        for texts in _batches(head, body.texts)
        for ids in await encode(service, texts, False, client, "documents", plain=True)
    ]
    probe = PROBE(probe=tuple(token for token in answers if token is not None))
    logits = np.stack(await _probed(service, request, prompts, probe, _DOCUMENTS)).astype(np.float64)
    return (1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))).tolist(), sum(map(len, prompts))


def _check_lengths(service: Service, head: str, texts: Sequence[str]) -> None:
    """Raises ApiError (400) before anything is joined: a query stands before each of its documents, so that a
    body of 2 MB can mean 2 GB of text."""
    engine, most = service.require_engine(), service.config.max_body_bytes
    check_length(engine, len(head), "query")
    check_length(engine, len(head) + max(map(len, texts)), "documents")
    total = len(head) * len(texts) + sum(map(len, texts))
    if total > most:
        why = f"documents: {len(texts)} with the query before each have {total} characters"
        raise ApiError(
            400, f"{why}; expected at most {most}", param="documents", code="context_length_exceeded"
        )


def _batches(head: str, texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts that the model reads, as many at once as have `_BATCH` characters together."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(head) + len(text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(head + text)
        size += len(batch[-1])
    yield batch


# The routes.


def _inputs(body: EmbeddingsRequest) -> Sequence[str] | Sequence[list[int]]:
    given: Any = body.input
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _written(vector: NDArray[np.float32], encoding: str) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return cast("list[float]", vector.tolist())


def _pieced(service: Service, request: Request, document: dict[str, Any]) -> Response:
    """Embeddings: writing a million numbers at once would hold the event loop for a second."""
    seconds, client = service.config.request_timeout, request.scope["client_name"]
    answer = PiecedAnswer(document, service.piece_writer, client, seconds)
    answer.headers.update(warning(service, "embed", "embeddings"))
    return answer


def add_routes(api: FastAPI, service: Service) -> None:
    """Add these routes."""
    errors: Documented = {status: {"model": OllamaError} for status in STATUSES}

    @api.post("/v1/embeddings", summary="Embed texts")
    async def embeddings(request: Request, body: EmbeddingsRequest = FromBody()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        model = service.check_model(body.model)
        vectors, tokens = await embed(service, request, _inputs(body), body.dimensions)
        data = (
            {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        )
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        document = {"object": "list", "data": Pieces(data), "model": model, "usage": usage}
        return _pieced(service, request, document)

    @api.post("/rerank", include_in_schema=False)
    @api.post("/v1/rerank", summary="Order documents by their relevance to a query")
    async def rerank(request: Request, body: RerankRequest = FromBody()) -> Response:
        await service.unknown_fields.check(body, request.scope)
        model = service.check_model(body.model)
        found, tokens = await scores(service, request, body)
        order = sorted(range(len(found)), key=lambda index: -found[index])[: body.top_n]
        texts = body.texts if body.return_documents else []
        results = [
            {"index": index, "relevance_score": found[index]}
            | ({"document": {"text": texts[index]}} if texts else {})
            for index in order
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        document = {"id": f"rerank-{uuid.uuid4().hex}", "model": model, "results": results, "usage": usage}
        return JSONResponse(document, headers=warning(service, "rerank", "ranking"))

    @api.post("/api/embeddings", include_in_schema=False)
    @api.post("/api/embed", summary="Embed texts, as Ollama's API does", responses=errors)
    async def embedded(request: Request, body: EmbedRequest = FromBody()) -> Response:
        began = time.monotonic_ns()
        await service.unknown_fields.check(body, request.scope)
        service.check_model(body.model)
        older = request.url.path == "/api/embeddings"
        texts = [body.prompt] if older else [body.input] if isinstance(body.input, str) else body.input
        if not all(texts):
            raise ApiError(
                400, "input: got an empty text; expected text", param="input", code="invalid_value"
            )
        if not texts:
            return JSONResponse({"model": body.model, "embeddings": []})
        vectors, tokens = await embed(service, request, texts, body.dimensions)
        if older:
            return _pieced(service, request, {"embedding": Pieces(vectors[0].tolist())})
        took = {
            "total_duration": time.monotonic_ns() - began,
            "load_duration": 0,
            "prompt_eval_count": tokens,
        }
        written = Pieces(vector.tolist() for vector in vectors)
        return _pieced(service, request, {"model": body.model, "embeddings": written, **took})
