"""The ASGI application: `app`."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from patchkit.api import report
from patchkit.handle import ATTRIBUTE
from patchkit.measure.jsonable import jsonable
from patchkit.serving.access import check_key
from patchkit.serving.api_error import ApiError
from patchkit.serving.endpoints import Endpoints
from patchkit.serving.engine import Engine
from patchkit.serving.event_stream import ClientGone
from patchkit.serving.metrics import CONTENT_TYPE, Metrics
from patchkit.serving.openapi import description
from patchkit.serving.patching import base_of
from patchkit.serving.prepare import Preparer

_logger = logging.getLogger("patchkit")


def app(
    model: Any,
    tokenizer: Any,
    *,
    name: str = "patchkit",
    max_rows: int = 8,
    max_queue: int = 64,
    max_tokens: int = 4096,
    prefill: int = 512,
    threads: int | None = None,
    api_key: str | None = None,
) -> Starlette:
    """Make an OpenAI-compatible server of a loaded model, patched or not, as an ASGI application.

        uvicorn.run(patchkit.serving.app(model, tokenizer, name="my-model"))

    The model belongs to the application from its start to its end (ASGI's lifespan). A model without `speculative` is patched with
    ``speculative(k=0)`` for that time, so that requests share rounds; its other patches are applied again.

    Args:
        model: a causal language model that patchkit can patch with `speculative`.
        tokenizer: the model's; chats need a chat template.
        name: by which requests call the model.
        max_rows: texts that are generated at the same time.
        max_queue: texts that may wait beside those; a request for more gets 429.
        max_tokens: most new tokens of a text.
        prefill: most tokens of waiting prompts that are fed between two rounds; see `Scheduler`.
        threads: with which the model computes on a CPU; None for torch's number, or one less where a start that times both says that this
            leaves more tokens per second.
        api_key: that requests to /v1 have to send; None for no key.

    Returns:
        The application; ``application.state.engine`` is its engine.

    Raises:
        ValueError: a number out of range, or a key that no client could send.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: give at least 1")
    if api_key is not None and (not api_key or api_key != api_key.strip()):
        raise ValueError("api_key is empty, or has blanks around it: give a key, or None for none")
    model = base_of(model)
    metrics = Metrics(_spec_of(model))
    engine = Engine(model, metrics, max_rows, max_queue, prefill, threads)
    endpoints = Endpoints(engine, Preparer(model, tokenizer, name, max_tokens), tokenizer)
    created = int(time.time())
    listed = {"id": name, "object": "model", "created": created, "owned_by": "patchkit"}

    async def models(request: Request) -> Response:
        wanted = request.path_params.get("model")
        if wanted is None:
            return JSONResponse({"object": "list", "data": [listed]})
        if wanted != name:
            raise ApiError(404, f"there is no model {wanted[:100]!r} here: give {name!r}", "model", "model_not_found")
        return JSONResponse(listed)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"} if engine.alive else {"status": "dead"}, 200 if engine.alive else 503)

    async def ready(request: Request) -> Response:
        is_ready = engine.alive and not engine.draining
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    async def figures(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def page(request: Request) -> Response:
        return HTMLResponse((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    async def openapi(request: Request) -> Response:
        return JSONResponse(description(name))

    async def patches(request: Request) -> Response:
        reports = report(model).to_dict()["patches"] if ATTRIBUTE in vars(model) else []
        rows = {"running": engine.running, "waiting": engine.waiting, "max": max_rows}
        body = {"model": name, "chat": bool(tokenizer.chat_template), "patches": reports, "rows": rows}
        return JSONResponse(jsonable(body))

    def keyed(endpoint: Any) -> Any:
        async def checked(request: Request) -> Response:
            check_key(request, api_key)
            response: Response = await endpoint(request)
            return response

        return checked

    @contextlib.asynccontextmanager
    async def lifespan(application: Starlette) -> AsyncIterator[None]:
        await run_in_threadpool(engine.start)
        try:
            yield
        finally:
            await run_in_threadpool(engine.close)

    routes = [
        Route("/v1/chat/completions", keyed(endpoints.chat), methods=["POST"]),
        Route("/v1/completions", keyed(endpoints.completions), methods=["POST"]),
        Route("/v1/models", keyed(models)),
        Route("/v1/models/{model:path}", keyed(models)),
        Route("/v1/patchkit/report", keyed(patches)),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", figures),
        Route("/openapi.json", openapi),
        Route("/", page),
    ]

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        metrics.refused.labels(status=error.status).inc()
        return error_response(error)

    async def not_here(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"), error.headers)

    async def failed(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "the server has met an error, which is in its log", code="internal_error"))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # which nobody reads

    handlers: dict[Any, Any] = {ApiError: refused, HTTPException: not_here, ClientGone: gone, Exception: failed}
    application = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    application.state.engine = engine
    return application


# The page may talk to this server only, and holds all that it needs.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
}


def error_response(error: ApiError, headers: Any = None) -> Response:
    """Return an error as a response."""
    more = dict(headers or {})
    if error.retry_after is not None:
        more["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, more)


def _spec_of(model: Any) -> str:
    handle = vars(model).get(ATTRIBUTE)
    return "none" if handle is None else " + ".join(record.patch.spec for record in handle.records if record.patch is not None)
