"""The description of the server in OpenAPI's form, made of the readers of requests, so that it says what is accepted."""

from __future__ import annotations

from typing import Any

from patchkit.serving.protocol import CHAT, COMPLETION

_NUMBERS = {"type": "integer", "minimum": 0}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"type": "string"},
        "created": _NUMBERS,
        "model": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "object", "required": ["index", "finish_reason"]}},
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
            "properties": {name: _NUMBERS for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
        },
    },
}
# One event of a stream.
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk of the answer as JSON, an error as JSON, or at the end [DONE]."}},
}
_REASONS = {
    "400": "A field that is not served, or a value that is not.",
    "401": "The API key is wrong or missing.",
    "404": "There is no such model.",
    "413": "The body is larger than 4 MiB.",
    "415": "The body is not application/json.",
    "429": "The queue is full.",
    "500": "The model has met an error in this request.",
    "503": "The server shuts down, or its engine does not run.",
}


def _json(schema: Any, about: str) -> dict[str, Any]:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _error(status: str) -> dict[str, Any]:
    return _json({"$ref": "#/components/schemas/Error"}, _REASONS[status])


def _generating(name: str, about: str) -> dict[str, Any]:
    answer = _json({"$ref": "#/components/schemas/Answer"}, "The answer; with stream: true, chunks of it as server-sent events.")
    answer["content"]["text/event-stream"] = {"schema": _EVENT}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
    errors = {status: _error(status) for status in _REASONS}
    return {"post": {"summary": about, "operationId": f"create{name}", "requestBody": body, "responses": {"200": answer, **errors}}}


def _getting(about: str, kind: str = "application/json", errors: tuple[str, ...] = (), parameters: Any = None) -> dict[str, Any]:
    content = {kind: {"schema": {"type": "object"} if kind == "application/json" else {"type": "string"}}}
    responses = {"200": {"description": about, "content": content}} | {status: _error(status) for status in errors}
    return {"get": {"summary": about, "responses": responses} | ({"parameters": parameters} if parameters else {})}


def description(model: str) -> dict[str, Any]:
    """Return the description as a JSON object.

    Args:
        model: name of the model that is served.
    """
    by_name = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    not_ok = {"503": _json({"type": "object"}, "It is not.")}
    health, ready = _getting("Whether the engine's thread runs."), _getting("Whether requests are taken.")
    health["get"]["responses"] |= not_ok
    ready["get"]["responses"] |= not_ok
    return {
        "openapi": "3.1.0",
        "info": {"title": "patchkit serve", "version": "1", "description": f"OpenAI-compatible server of {model}."},
        "paths": {
            "/v1/chat/completions": _generating("Chat", "Answer the messages of a chat."),
            "/v1/completions": _generating("Completion", "Continue texts."),
            "/v1/models": _getting("The model that is served.", errors=("401",)),
            "/v1/models/{model}": _getting("The model that is served.", errors=("401", "404"), parameters=by_name),
            "/v1/patchkit/report": _getting("What the model's patches have done.", errors=("401",)),
            "/health": health,
            "/ready": ready,
            "/metrics": _getting("Figures for Prometheus.", "text/plain"),
            "/openapi.json": _getting("This description."),
            "/": _getting("A page to chat with the model.", "text/html"),
        },
        "components": {
            "schemas": {"Chat": CHAT.schema, "Completion": COMPLETION.schema, "Answer": _ANSWER, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
