"""The ASGI application: its parts and its routes."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rl_mlx.llm import AsyncLLM
from rl_mlx.server import anthropic, library, ollama, openai, openai_chat, page, responses
from rl_mlx.server.endpoint import Endpoint
from rl_mlx.server.guard import Guard
from rl_mlx.server.metrics import Metrics
from rl_mlx.server.models import Load, Models
from rl_mlx.server.openapi import document
from rl_mlx.server.problems import Problem, dialect_of
from rl_mlx.server.schemas import ollama as ollama_schemas
from rl_mlx.server.schemas.anthropic import CountRequest, MessagesRequest
from rl_mlx.server.schemas.ollama import (
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    NamedRequest,
    PullRequest,
    ShowRequest,
)
from rl_mlx.server.schemas.openai import ChatRequest, CompletionRequest, EmbeddingRequest
from rl_mlx.server.schemas.responses import ResponseRequest
from rl_mlx.server.settings import ServerSettings
from rl_mlx.server.state import State
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles
from rl_mlx.waiting import Awaiting

_PACE = 0.01
"""Seconds between two pieces of a stream: more tokens than that make no smoother text."""


def load_llm(files: ModelFiles, settings: ModelSettings) -> AsyncLLM:
    """Load a model; blocks."""
    from rl_mlx.backends import open_backend  # noqa: PLC0415 - slow to import
    from rl_mlx.text.tokenizer import Tokenizer  # noqa: PLC0415

    backend = open_backend(files, settings)
    try:
        return AsyncLLM.of(backend, Tokenizer.open(files.path), Awaiting(_PACE))
    except BaseException:
        backend.close()
        raise


def build(
    settings: ServerSettings, load: Load = load_llm, template: str | None = None
) -> Starlette:
    """The application. ``template`` is a chat template for the models of ``settings.models``.

    Whoever runs it starts ``app.state.server.models`` and closes ``app.state.server``.
    """
    metrics = Metrics()
    state = State(settings, Models(settings, load, template), metrics)
    metrics.watch(lambda: state.models.loaded, lambda: state.gate.active)

    middleware = [Middleware(Guard, settings)]
    if settings.origins:
        cors: Any = CORSMiddleware
        middleware.append(
            Middleware(cors, allow_origins=settings.origins, allow_methods=["*"],
                       allow_headers=["*"], expose_headers=["x-request-id"])
        )  # fmt: skip
    app = Starlette(
        routes=routes(),
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
    )
    app.state.server = state
    return app


def routes() -> list[Route]:
    """All paths."""
    return [
        *page.routes(),
        Route("/health", _health, methods=["GET"]),
        Route("/ready", _ready, methods=["GET"]),
        Route("/metrics", _metrics, methods=["GET"]),
        Route("/openapi.json", _openapi, methods=["GET"]),
        _post("/v1/chat/completions", openai_chat.chat, ChatRequest),
        _post("/v1/responses", responses.create, ResponseRequest),
        _post("/v1/completions", openai.completions, CompletionRequest),
        _post("/v1/embeddings", openai.embeddings, EmbeddingRequest),
        _post("/v1/messages", anthropic.messages, MessagesRequest),
        _post("/v1/messages/count_tokens", anthropic.count_tokens, CountRequest),
        _post("/api/generate", ollama.generate, GenerateRequest),
        _post("/api/chat", ollama.chat, ollama_schemas.ChatRequest),
        _post("/api/embed", ollama.embed, EmbedRequest),
        _post("/api/embeddings", ollama.embeddings, EmbeddingsRequest),
        _get("/api/tags", library.tags),
        _get("/api/ps", library.ps),
        _get("/api/version", library.version),
        _post("/api/show", library.show, ShowRequest, works=False),
        _post("/api/pull", library.pull, PullRequest),
        _post("/api/delete", library.delete, NamedRequest, method="DELETE", works=False),
        _get("/v1/models", openai.models),
        _get("/v1/models/{name:path}", openai.model),
    ]


def _post(
    path: str, handler: Any, schema: Any, *, method: str = "POST", works: bool = True
) -> Route:
    return Route(path, Endpoint(path, handler, schema, works=works), methods=[method])


def _get(path: str, handler: Any) -> Route:
    return Route(path, Endpoint(path, handler), methods=["GET"])


async def _health(request: Request) -> Response:  # noqa: ARG001 - Starlette's
    """Alive: the event loop answers."""
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    """Ready: the models that were named are loaded; not while the server goes down."""
    state: State = request.app.state.server
    status = "ready" if state.models.started else "starting"
    status = "stopping" if state.gate.draining else status
    loaded = [model.files.name for model in state.models.loaded]
    body = {"status": status, "loaded": loaded}
    return JSONResponse(body, status_code=200 if status == "ready" else 503)


async def _metrics(request: Request) -> Response:
    state: State = request.app.state.server
    state.metrics.tasks.set(len(asyncio.all_tasks()))
    text = await state.in_thread(state.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _openapi(request: Request) -> Response:
    keys = bool(request.app.state.server.settings.keys)
    return JSONResponse(document(routes(), keys=keys))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, words = request.url.path, error.detail
    if error.status_code == 404:
        words = f"there is nothing at {path!r:.200}; /openapi.json lists the paths"
    elif error.status_code == 405:
        words = f"{path} takes {(error.headers or {}).get('Allow', 'another method')}"
    problem = Problem(error.status_code, words)
    body = dialect_of(path).body(problem)
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
