"""What the server says of itself: `/openapi.json`, and `/docs`, a page of it that loads nothing."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse, Response

from sdfast.server.guard import OPEN
from sdfast.server.problems import Envelope
from sdfast.server.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Envelope, "description": "The request cannot be served; the message says why."},
    "5XX": {"model": Envelope, "description": "The server failed, or is busy."},
}
_SCHEMES = {"bearer": {"type": "http", "scheme": "bearer"}, "basic": {"type": "http", "scheme": "basic"}}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color-scheme: light dark; }
code { font-family: ui-monospace, monospace; }
h2 { margin-top: 3rem; }
table { border-collapse: collapse; }
td, th { border-top: 1px solid #8884; padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
"""


def add(app: FastAPI, settings: Settings) -> None:
    """Routes are described as they are when somebody first asks."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app, settings)
        return app.openapi_schema

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page(schema()), headers={"content-security-policy": _POLICY})

    app.openapi = schema  # type: ignore[method-assign]


def page(schema: Mapping[str, Any]) -> str:
    """The schema as HTML."""
    title = f"{escape(schema['info']['title'])} {escape(schema['info']['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a></p>'
        + "".join(_routes(schema))
        + "</html>"
    )


def _schema(app: FastAPI, settings: Settings) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    if settings.key is not None:
        schema["components"]["securitySchemes"] = _SCHEMES
        schema["security"] = [{name: []} for name in _SCHEMES]
        schema["paths"][OPEN]["get"]["security"] = []
    return schema


def _routes(schema: Mapping[str, Any]) -> Iterator[str]:
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('description', ''))}</p>"
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                yield f"<h3>{escape(kind)}</h3>{_fields(schema, content['schema'])}"
            for status, response in operation["responses"].items():
                yield f"<h3>{escape(status)}</h3><p>{escape(response['description'])}</p>"
                for kind, content in response.get("content", {}).items():
                    yield f"<h4>{escape(kind)}</h4>{_fields(schema, content.get('schema', {}))}"


def _fields(schema: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    """A table of an object's fields; of anything else, what is said of it."""
    shape = _resolved(schema, shape)
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(field))}</td>"
        f"<td>{escape(_said(name, field, shape.get('required', ())))}</td></tr>"
        for name, field in shape.get("properties", {}).items()
    )
    table = f"<table><tr><th>field</th><th>type</th><th></th></tr>{rows}</table>" if rows else ""
    return f"<p>{escape(shape.get('description', ''))}</p>{table}"


def _resolved(schema: Mapping[str, Any], shape: Mapping[str, Any]) -> Mapping[str, Any]:
    name = shape.get("$ref", "").rpartition("/")[2]
    return schema["components"]["schemas"][name] if name else shape


def _type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return " | ".join("null" if value is None else str(value) for value in field["enum"])
    if "anyOf" in field:
        return " | ".join(_type(kind) for kind in field["anyOf"])
    if field.get("type") == "array":
        return f"array of {_type(field.get('items', {}))}"
    return str(field.get("type") or field.get("$ref", "anything").rpartition("/")[2])


def _said(name: str, field: Mapping[str, Any], required: Any) -> str:
    told = [field.get("description", ""), "required" if name in required else ""]
    told += [f"{bound} {field[bound]}" for bound in ("minimum", "maximum") if bound in field]
    default = field.get("default")
    told.append("" if default is None else f"default {default}")
    return "; ".join(part.rstrip(".") for part in told if part)
