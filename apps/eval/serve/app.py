"""The routes, and every error in one shape. Not for what happens behind a route."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from apps.eval.serve.completions import Completions
from apps.eval.serve.errors import ApiError
from apps.eval.serve.guard import Guard, Limits
from apps.eval.serve.service import RESTING, Service


def build_app(service: Service, limits: Limits) -> Guard:
    """The ASGI application of one service."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": service.health}, status_code=200 if service.health == RESTING else 503)

    async def models(request: Request) -> Response:
        served = service.served
        model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "fathom"}
        return JSONResponse({"object": "list", "data": [model | {"max_model_len": served.max_tokens}]})

    async def metrics(request: Request) -> Response:
        answers = {str(status): count for status, count in sorted(guard.statuses.items())}
        return JSONResponse(service.metrics() | {"answers": answers})

    routes = [
        Route("/v1/completions", Completions(service), methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers = {ApiError: _refused, HTTPException: _not_routed, Exception: _our_mistake}
    guard = Guard(Starlette(routes=routes, exception_handlers=handlers), limits)
    return guard


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "registered for it"
    return error.response()


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return ApiError(error.status_code, code, message, headers=error.headers).response()


async def _our_mistake(request: Request, error: Exception) -> Response:
    """The traceback goes to the server's log, not to the client."""
    return ApiError(500, "internal_error", "the server made a mistake; its log has the details").response()
