"""The OpenAPI document. Our own code reads the bodies, so FastAPI does not know of them by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_REFERENCE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
}


def accepts(*models: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is one of these."""
    schemas = [model.model_json_schema(ref_template=_REFERENCE) for model in models]
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}},
        },
        "responses": {
            str(status): {"description": text, "content": {"application/json": {"schema": _ERROR}}}
            for status, text in (
                (413, "The body is too long."),
                (422, "The request is at fault."),
                (424, "The engine refuses the request."),
                (500, "The answer could not be completed."),
                (503, "The server is full, or stops."),
            )
        },
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The document, with the definitions of nested models where its references look for them."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas: dict[str, Any] = {}
        _collect(schema["paths"], schemas)
        schema.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        app.openapi_schema = schema
    return app.openapi_schema


def _collect(value: Any, schemas: dict[str, Any]) -> None:
    if isinstance(value, dict):
        definitions = value.pop("$defs", {})
        schemas.update(definitions)
        for item in (*value.values(), *definitions.values()):
            _collect(item, schemas)
    elif isinstance(value, list):
        for item in value:
            _collect(item, schemas)
