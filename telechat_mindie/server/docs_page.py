"""GET /docs: the OpenAPI document as a page of plain HTML, which needs no script and nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Response

from telechat_mindie.units import INT32_MAX

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Content-Security-Policy: text and its style."""

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin: 1.6em 0 .3em; font-size: 1.1rem }
details { border-top: 1px solid #8884 }
summary { padding: .35rem 0; cursor: pointer }
b { display: inline-block; min-width: 3.2rem }
table { border-collapse: collapse; margin: 0 0 .8rem 1rem }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
td:first-child, code, b { font-family: ui-monospace, monospace; font-size: .92em }
p { margin: .3rem 0 .3rem 1rem }
"""


def docs_routes(document: Callable[[], dict[str, Any]]) -> APIRouter:
    """The page of what `document` gives."""
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def docs() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(render(document()), media_type="text/html; charset=utf-8", headers=headers)

    return router


def render(document: dict[str, Any]) -> str:
    """The page: routes by group, with the fields of their bodies."""
    info, schemas = document["info"], document.get("components", {}).get("schemas", {})
    groups: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            lines = groups.setdefault(route.get("tags", ["other"])[0], [])
            lines.append("".join(_route(method.upper(), path, route, schemas)))
    sections = "".join(f"<h2>{escape(group)}</h2>\n{''.join(lines)}" for group, lines in groups.items())
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{title}</h1>\n<p>{escape(info.get('description', ''))} The same for programs: "
        f'<a href="openapi.json">openapi.json</a>.</p>\n{sections}</body></html>\n'
    )


def _route(method: str, path: str, route: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    yield f"<details><summary><b>{method}</b> <code>{escape(path)}</code></summary>\n"
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    bodies = [] if body is None else body.get("anyOf", [body])
    if not bodies:
        yield "<p>No body.</p>\n"
    for schema in bodies:
        yield from _fields(schema, schemas, set())
    yield "</details>\n"


def _fields(schema: dict[str, Any], schemas: dict[str, Any], seen: set[str]) -> Iterator[str]:
    """A table of an object's fields, and one for each kind of object in them."""
    nested: list[str] = []
    yield f"<p>{escape(schema.get('description') or schema.get('title', 'Body'))}</p>\n<table>\n"
    for name, field in schema.get("properties", {}).items():
        kinds = list(dict.fromkeys(_kinds(field, nested)))
        words = [*kinds, "required"] if name in schema.get("required", ()) else kinds
        if isinstance(field.get("default"), str | int | float):
            words.append(f"default {field['default']}")
        note = escape(field.get("description", ""))
        yield f"<tr><td>{escape(name)}</td><td>{escape(', '.join(words))}</td><td>{note}</td></tr>\n"
    yield "</table>\n"
    for name in nested:
        if name not in seen and name in schemas:
            seen.add(name)
            yield from _fields({"description": name, **schemas[name]}, schemas, seen)


def _kinds(field: dict[str, Any], nested: list[str]) -> Iterator[str]:
    """What a field may be, in words; names of objects go to `nested` as well."""
    for choice in field.get("anyOf", field.get("oneOf", [field])):
        if "$ref" in choice:
            nested.append(choice["$ref"].rpartition("/")[2])
            yield nested[-1]
        elif choice.get("type") == "array":
            items = " or ".join(_kinds(choice.get("items", {}), nested)) or "anything"
            yield f"list of {items}"
        elif "enum" in choice:
            yield " or ".join(map(str, choice["enum"]))
        elif "const" in choice:
            yield str(choice["const"])
        elif choice.get("type") not in (None, "null"):
            yield choice["type"] + _range(choice)


def _range(schema: dict[str, Any]) -> str:
    """` above 0 to 1`; an end that is only the type's own is left out."""
    text = ""
    for key, word in (
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "below"),
    ):
        if key in schema and abs(schema[key]) < INT32_MAX:
            text += f" {word} {schema[key]:.10g}"
    return text
