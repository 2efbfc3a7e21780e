"""/openapi.json says what the server does: its paths, and which bodies it accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import NAME, client
from starlette.testclient import TestClient

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def served() -> Iterator[TestClient]:
    with client() as each:
        yield each


def test_every_path_is_there_and_no_other(served: TestClient) -> None:
    described = served.get("/openapi.json").json()
    routes = {route.path.replace(":path", ""): route.methods - {"HEAD"} for route in served.app.routes}  # type: ignore[attr-defined]
    assert {path: {method.upper() for method in methods} for path, methods in described["paths"].items()} == routes
    for path in routes:
        if routes[path] == {"GET"}:
            response = served.get(path.replace("{model}", NAME))
            content = described["paths"][path]["get"]["responses"]["200"]["content"]
            assert response.status_code == 200 and response.headers["content-type"].split(";")[0] in content


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value fits a JSON schema, as far as those of the description go."""
    if "anyOf" in schema and not any(accepts(each, value) for each in schema["anyOf"]):
        return False
    if "enum" in schema and not any(type(each) is type(value) and each == value for each in schema["enum"]):
        return False
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int, "number": (int, float)}
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, kinds[kind]) or (kind in ("integer", "number") and isinstance(value, bool))):
        return False
    if isinstance(value, dict) and kind == "object":
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        if any(name not in value for name in schema.get("required", [])) or (rest is False and set(value) - set(known)):
            return False
        if "propertyNames" in schema and not all(re.search(schema["propertyNames"]["pattern"], name) for name in value):
            return False
        return all(accepts(known.get(name, rest if isinstance(rest, dict) else {}), each) for name, each in value.items())
    if isinstance(value, list) and kind == "array":
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 30)
        return fits and all(accepts(schema["items"], each) for each in value)
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0) and re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return True


HI = [{"role": "user", "content": "hi"}]
BODIES: list[tuple[str, dict[str, Any], bool]] = [
    ("Chat", {"messages": HI}, True),
    ("Chat", {"messages": HI, "stop": None, "seed": 3, "logit_bias": {"7": -1.5}, "user": "me"}, True),
    ("Chat", {"messages": HI, "n": 0}, False),
    ("Chat", {"messages": [], "n": 1}, False),
    ("Chat", {"messages": HI, "logit_bias": {"x": 1}}, False),
    ("Chat", {"messages": HI, "response_format": {"type": "regex", "regex": "a+"}}, True),
    ("Chat", {"messages": HI, "response_format": {"type": "regex"}}, False),
    ("Chat", {"messages": [{"role": "nobody", "content": "hi"}]}, False),
    ("Chat", {"messages": HI, "store": True}, False),
    ("Chat", {"messages": HI, "modalities": ["text"]}, True),
    ("Completion", {"prompt": "x", "stop": ["a", "b"]}, True),
    ("Completion", {"prompt": [[1, 2], [3]]}, True),
    ("Completion", {"prompt": ["a", [3]]}, True),
    ("Completion", {"prompt": "x", "suffix": "y"}, False),
    ("Completion", {"prompt": 3}, False),
    ("Completion", {}, False),
]


@pytest.mark.parametrize(("name", "body", "fits"), BODIES, ids=lambda value: json.dumps(value)[:50])
def test_the_schema_accepts_what_the_server_does(served: TestClient, name: str, body: dict[str, Any], fits: bool) -> None:
    schema = served.get("/openapi.json").json()["components"]["schemas"][name]
    assert accepts(schema, body) == fits
    path = "/v1/chat/completions" if name == "Chat" else "/v1/completions"
    assert served.post(path, json={"max_tokens": 1, **body}).status_code == (200 if fits else 400)


def test_the_dashboard_shows_figures_that_exist(served: TestClient) -> None:
    text = (ROOT / "examples" / "grafana.json").read_text(encoding="utf-8")
    board = json.loads(text)
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    named = {name for query in queries for name in re.findall(r"patchkit_\w+", query)}
    served.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    exist = set(re.findall(r"^(patchkit_\w+)", served.get("/metrics").text, re.MULTILINE))
    assert len(queries) >= 10 and named - exist == set()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
