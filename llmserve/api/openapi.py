"""GET /openapi.json and /docs: this API described by the very parsers that check its requests."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from llmserve import __version__
from llmserve.api import JSON, fields, urls
from llmserve.api.answers import ANSWERS, CHUNKS, ERROR, NOT_READY, STRING
from llmserve.api.completions import CompletionRequest
from llmserve.api.context import Context, Request
from llmserve.api.embeddings import EmbeddingsRequest
from llmserve.api.fields import Field, Parser, Struct
from llmserve.api.parameters import INT32_MAX
from llmserve.api.responses import Response, json_response
from llmserve.api.schema import ChatRequest
from llmserve.api.tokens import DetokenizeRequest, TokenizeRequest

_BODIES: Mapping[str, type[Struct]] = {
    urls.CHAT: ChatRequest,
    urls.COMPLETIONS: CompletionRequest,
    urls.EMBEDDINGS: EmbeddingsRequest,
    urls.TOKENIZE: TokenizeRequest,
    urls.DETOKENIZE: DetokenizeRequest,
    urls.APPLY_TEMPLATE: ChatRequest,
}

_OUTCOMES = ("400", "401", "403", "404", "405", "413", "500", "503", "504")


def serve(ctx: Context, request: Request) -> Response:
    """This API, as an OpenAPI document."""
    return json_response(_document(ctx))


def docs(ctx: Context, request: Request) -> Response:
    """This API, for people."""
    page = _page(_document(ctx)).encode()
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    headers = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Length", str(len(page))),
        ("Content-Security-Policy", policy),
    ]
    return Response([page], 200, headers)


def _document(ctx: Context) -> dict[str, JSON]:
    names = tuple(name for spec in ctx.registry.specs for name in spec.names)
    return document(names, keys=bool(ctx.config.server.api_keys))


@cache
def document(names: tuple[str, ...], *, keys: bool = False) -> dict[str, JSON]:
    """OpenAPI 3.2, of a server whose models have these names, and which asks for keys or does not."""
    structs: dict[str, JSON] = {}
    paths: dict[str, dict[str, JSON]] = {}
    for path, method, endpoint in _operations():
        paths.setdefault(path, {})[method.lower()] = _operation(path, endpoint, structs)
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "LLM Inference Server",
            "version": __version__,
            "description": "OpenAI's API, served by llmserve. Fields that are not described are accepted, and named in X-LLMServe-Ignored.",
        },
        "paths": paths,
        "components": {
            "schemas": {name: _with_models(struct, names) for name, struct in structs.items()} | {"Error": ERROR},
            "parameters": {"name": {"name": "name", "in": "path", "required": True, "schema": _one_of(names)}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if keys else [],
    }


def _one_of(names: tuple[str, ...]) -> dict[str, JSON]:
    return {"type": "string", "enum": list(names)}


def _with_models(struct: dict[str, JSON], names: tuple[str, ...]) -> dict[str, JSON]:
    """A body that names a model names one of this server's."""
    if "model" not in struct["properties"]:
        return struct
    return struct | {"properties": struct["properties"] | {"model": _one_of(names)}}


def _operations() -> Iterator[tuple[str, str, str]]:
    """Path, method and endpoint of everything that is served."""
    for rule in urls.URLS.iter_rules():
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            yield rule.rule.replace("<path:name>", "{name}"), method, rule.endpoint


def _operation(path: str, endpoint: str, structs: dict[str, JSON]) -> dict[str, JSON]:
    operation: dict[str, JSON] = {"summary": _summary(endpoint), "responses": _responses(endpoint)}
    if path in urls.OPEN_PATHS:
        operation["security"] = []
    if "{name}" in path:
        operation["parameters"] = [{"$ref": "#/components/parameters/name"}]
    if endpoint == urls.ACT:
        action = {"type": "string", "enum": ["load", "unload", "reload"]}
        operation["parameters"].append({"name": "action", "in": "query", "required": True, "schema": action})
    if endpoint in _BODIES:
        content = {"application/json": {"schema": schema_of(_BODIES[endpoint], structs)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _summary(endpoint: str) -> str:
    return (urls.handler(endpoint).__doc__ or "").strip().partition("\n")[0]


def _responses(endpoint: str) -> dict[str, JSON]:
    kind = "text/html" if endpoint == urls.DOCS else "application/json"
    content: dict[str, JSON] = {kind: {"schema": ANSWERS[endpoint]}}
    if endpoint in CHUNKS:
        content["text/event-stream"] = {"itemSchema": _event(CHUNKS[endpoint])}
    error = {
        "description": "What is wrong.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    responses = {"200": {"description": "The answer.", "content": content}} | dict.fromkeys(_OUTCOMES, error)
    if endpoint == urls.READYZ:
        responses["503"] = {"description": "Not ready.", "content": {"application/json": {"schema": NOT_READY}}}
    return responses


def _event(chunk: JSON) -> JSON:
    """One event of a stream: JSON, and at the end what says that it is the end."""
    carried = {
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [chunk, {"$ref": "#/components/schemas/Error"}]},
    }
    data = {"anyOf": [{"const": "[DONE]"}, STRING | carried]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def schema_of(parser: Parser, structs: dict[str, JSON]) -> dict[str, JSON]:
    """The JSON schema of what a parser takes. The structs that it refers to are added to `structs`."""
    if isinstance(parser, type) and issubclass(parser, Struct):
        if parser.__name__ not in structs:
            structs[parser.__name__] = {}  # it may refer to itself
            structs[parser.__name__] = _struct(parser, structs)
        return {"$ref": f"#/components/schemas/{parser.__name__}"}
    return _SCHEMAS[type(parser)](parser, structs)


def _string(parser: fields.String) -> dict[str, JSON]:
    pattern = {} if parser.pattern is None else {"pattern": f"^{parser.pattern}$"}
    return {"type": "string"} | _bounds(minLength=parser.min_length or None, maxLength=parser.max_length) | pattern


def _array(item: Parser, least: int, most: int | None, structs: dict[str, JSON]) -> dict[str, JSON]:
    return {"type": "array", "items": schema_of(item, structs)} | _bounds(minItems=least or None, maxItems=most)


def _strings(parser: fields.Strings, structs: dict[str, JSON]) -> dict[str, JSON]:
    key, value = schema_of(parser.key, structs), schema_of(parser.value, structs)
    return {"type": "object", "maxProperties": parser.max_properties, "propertyNames": key, "additionalProperties": value}


def _unsupported(parser: fields.Unsupported, structs: dict[str, JSON]) -> dict[str, JSON]:
    return {"enum": list(parser.harmless)} if parser.harmless else {"type": "null"}


def _tagged(parser: fields.Tagged, structs: dict[str, JSON]) -> dict[str, JSON]:
    kinds = {kind: each for kind, each in parser.kinds.items() if not isinstance(each, fields.Unsupported)}
    tags = {kind: {"properties": {parser.tag: {"const": kind}}, "required": [parser.tag]} for kind in kinds}
    return {"oneOf": [{"allOf": [schema_of(each, structs), tags[kind]]} for kind, each in kinds.items()]}


def _prompt_forms(parser: fields.PromptForms, structs: dict[str, JSON]) -> dict[str, JSON]:
    text = _string(fields.String(parser.min_length))
    ids = _array(fields.Integer(0, parser.max_id), 1, None, structs)
    several = [{"type": "array", "items": item, "minItems": 1, "maxItems": parser.max_prompts} for item in (text, ids)]
    return {"anyOf": [text, ids, *several]}


def _biases(parser: fields.Biases, structs: dict[str, JSON]) -> dict[str, JSON]:
    bias = {"type": "number", "minimum": -parser.bound, "maximum": parser.bound}
    return {
        "type": "object",
        "maxProperties": parser.max_properties,
        "propertyNames": {"pattern": f"^{fields.TOKEN_ID}$"},
        "additionalProperties": bias,
    }


_SCHEMAS: Mapping[type, Callable[[Any, dict[str, JSON]], dict[str, JSON]]] = {
    fields.String: lambda each, _: _string(each),
    fields.Integer: lambda each, _: {"type": "integer", "minimum": each.minimum, "maximum": each.maximum},
    fields.Number: lambda each, _: {"type": "number", "minimum": each.minimum, "maximum": each.maximum},
    fields.Boolean: lambda each, _: {"type": "boolean"},
    fields.OneOf: lambda each, _: {"type": "string", "enum": list(each.values)},
    fields.Array: lambda each, structs: _array(each.item, each.min_length, each.max_length, structs),
    fields.Object: lambda each, _: {"type": "object"},
    fields.Strings: _strings,
    fields.Nullable: lambda each, structs: _or_null(schema_of(each.parser, structs)),
    fields.Either: lambda each, structs: {"anyOf": [schema_of(each.first, structs), schema_of(each.second, structs)]},
    fields.Unsupported: _unsupported,
    fields.Tagged: _tagged,
    fields.PromptForms: _prompt_forms,
    fields.Biases: _biases,
}


def _struct(struct: type[Struct], structs: dict[str, JSON]) -> dict[str, JSON]:
    return {
        "type": "object",
        "description": (struct.__doc__ or "").strip(),
        "properties": {name: _member(field, structs) for name, field in struct.declared.items()},
        "required": [name for name, field in struct.declared.items() if field.default is ...],
    }


def _member(field: Field, structs: dict[str, JSON]) -> dict[str, JSON]:
    """A member that may be left out may be null as well."""
    schema = schema_of(field.parser, structs)
    if field.default is ...:
        return schema
    schema = _or_null(schema)
    if field.passive:
        schema = schema | {"description": "Checked, and changes nothing."}
    return schema if field.default in (None, ()) else schema | {"default": field.default}


def _or_null(schema: dict[str, JSON]) -> dict[str, JSON]:
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return schema | {"type": [schema["type"], "null"]} if schema["type"] != "null" else schema
    return {"anyOf": [schema, {"type": "null"}]}


def _bounds(**bounds: int | None) -> dict[str, JSON]:
    return {name: bound for name, bound in bounds.items() if bound is not None}


# The page.

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2.5rem 0 0; font-size: 1.1rem; font-family: ui-monospace, monospace; }
h2 b { display: inline-block; min-width: 3.5rem; } p { margin: .3rem 0 .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } td, th { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0;
border-top: 1px solid var(--line); } td:first-child { white-space: nowrap; } td:last-child { white-space: nowrap; padding-right: 0; }
td.passive { opacity: .6; } code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; } details { margin: .3rem 0; }
@media (max-width: 40rem) { tr, td { display: block; } tr:first-child { display: none; } tr { border-top: 1px solid var(--line); padding: .3rem 0; }
td { border: 0; padding: 0; } td:empty { display: none; } td:first-child { font-weight: bold; } }
"""


def _page(described: dict[str, Any]) -> str:
    operations = [(path, *each) for path, methods in described["paths"].items() for each in methods.items()]
    operations.sort(key=lambda each: (not each[0].startswith("/v1"), "requestBody" not in each[2]))
    structs = described["components"]["schemas"]
    sections = [_section(method.upper(), path, operation, structs) for path, method, operation in operations]
    info = described["info"]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(info['title'])}</title><style>{_STYLE}</style></head><body><h1>{html.escape(info['title'])}</h1>"
        f'<p>{html.escape(info["description"])} As a document for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{''.join(sections)}</body></html>"
    )


def _section(method: str, path: str, operation: dict[str, Any], structs: dict[str, Any]) -> str:
    heading = f"<h2><b>{method}</b> {html.escape(path)}</h2><p>{html.escape(operation['summary'])}</p>"
    if "requestBody" not in operation:
        return heading
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    required = structs[name]["required"]
    members = sorted(structs[name]["properties"].items(), key=lambda member: _rank(member[0], member[1], required))
    rows = [_row(member, schema, required, structs) for member, schema in members]
    return f"{heading}<details><summary>Body</summary><table><tr><th>name<th>what it takes<th>default</tr>{''.join(rows)}</table></details>"


def _row(name: str, schema: dict[str, Any], required: list[str], structs: dict[str, Any]) -> str:
    passive = "description" in schema
    note = "required" if name in required else "changes nothing" if passive else html.escape(_default(schema))
    style = ' class="passive"' if passive else ""
    cells = (f"<code>{html.escape(text)}</code>" for text in (name, _in_words(schema, structs)))
    return f"<tr>{''.join(f'<td{style}>{cell}</td>' for cell in (*cells, note))}</tr>"


def _rank(name: str, schema: dict[str, Any], required: list[str]) -> int:
    """What must be there comes first, what does nothing last."""
    return 0 if name in required else 2 if "description" in schema or schema.get("type") == "null" else 1


def _default(schema: dict[str, Any]) -> str:
    return str(schema["default"]).lower() if isinstance(schema.get("default"), bool) else str(schema.get("default", ""))


def _in_words(schema: dict[str, Any], structs: dict[str, Any]) -> str:
    """A schema in one line."""
    for combination in ("anyOf", "oneOf"):
        if combination in schema:
            return " | ".join(
                dict.fromkeys(_in_words(each, structs) for each in schema[combination] if each != {"type": "null"})
            )
    if "allOf" in schema:
        tag, const = next(iter(schema["allOf"][1]["properties"].items()))
        return f"{{{tag}: {const['const']}, …}}"
    if "enum" in schema:
        return " | ".join(map(repr, schema["enum"])) or "nothing"
    if "$ref" in schema:
        return f"{{{', '.join(structs[schema['$ref'].rpartition('/')[2]]['properties'])}}}"
    kind = schema.get("type", "anything")
    kind = next((each for each in kind if each != "null"), "null") if isinstance(kind, list) else kind
    if kind == "array":
        return f"[{_in_words(schema['items'], structs)}]"
    return "not supported" if kind == "null" else kind + _range_in_words(schema.get("minimum"), schema.get("maximum"))


def _range_in_words(least: float | None, most: float | None) -> str:
    """Bounds that are only those of the machine's integers are left out."""
    if least is None or most is None or least < -INT32_MAX:
        return ""
    return f" ≥ {least}" if most >= INT32_MAX else f" {least} … {most}"
