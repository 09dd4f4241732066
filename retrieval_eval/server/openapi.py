"""The API as an OpenAPI 3.1 document, for tools that make clients or forms of it; tests hold it to the routes."""

from typing import Any

from retrieval_eval.server.limits import Limits

Tree = dict[str, Any]


def document(limits: Limits) -> Tree:
    """The document; its bounds are the server's own."""
    page = [_query("page", _whole(limits.deepest // limits.per_page), "Which page of hits, from 1."),
            _query("per_page", _whole(limits.most_per_page), "Hits a page.")]  # fmt: skip
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    text = {"type": "string", "maxLength": limits.query_characters}
    search = [
        _query("q", text, "A sentence."),
        _query("like", {"type": "string"}, "The name of a clip of the collection."),
        _query("clip", {"type": "string"}, "A clip sent before: query.clip of that answer."),
        *page,
    ]
    binary = {"content": {"video/*": {}, "image/*": {}, "application/octet-stream": {}}, "required": True}
    return {
        "openapi": "3.1.0",
        "info": {"title": "videomamba serve", "version": "1", "description": "Clips by a sentence or by a clip."},
        "paths": {
            "/api/search": {
                "get": _says("Hits of one of q, like, clip.", _ref("Hits"), search, 400, 404, 422, 503),
                "post": _says("Hits of the clip in the body.", _ref("Hits"), page, 400, 408, 413, 415, 422, 503)
                | {"requestBody": binary},
            },
            "/api/clips/{name}": {"get": _says("What is known of a clip.", _ref("Clip"), [name], 404)},
            "/api/media/{name}": {"get": _media(name)},
            "/api/shards/{name}": {"get": _says("The clips of a shard.", {"type": "object"}, [name, *page], 404, 422)},
            "/api/health": {"get": _says("Whether it answers, and what is served.", {"type": "object"}, [])},
            "/api/openapi.json": {"get": _says("This document.", {"type": "object"}, [])},
        },
        "components": {"schemas": _schemas(), "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _schemas() -> Tree:
    clip = {
        "name": "string", "key": "string", "caption": "string", "shard": "string", "kind": "string",
        "seconds": "number", "span": "array", "time": "string", "info": "string", "media": "string",
    }  # fmt: skip
    properties: Tree = {name: {"type": kind} for name, kind in clip.items()}
    properties["seconds"]["type"] = ["number", "null"]
    properties["span"] = {"type": ["array", "null"], "items": {"type": "number"}}
    hit = {"type": "object", "properties": {"rank": {"type": "integer"}, "score": {"type": "number"}} | properties}
    numbers: Tree = {name: {"type": "integer"} for name in ("page", "per_page", "pages", "clips")}
    hits = {"query": {"type": "object"}, "hits": {"type": "array", "items": hit}} | numbers
    error = {"status": {"type": "integer"}, "code": {"type": "string"}, "reason": {"type": "string"}}
    return {
        "Clip": {"type": "object", "properties": properties},
        "Hits": {"type": "object", "properties": hits, "required": list(hits)},
        "Error": {"type": "object", "properties": {"error": {"type": "object", "properties": error}}},
    }


def _says(summary: str, schema: Tree, parameters: list[Tree], *refusals: int) -> Tree:
    answers: Tree = {"200": {"description": "OK", "content": {"application/json": {"schema": schema}}}}
    answers |= {str(status): _refusal() for status in sorted({400, *refusals})}
    return {"summary": summary, "parameters": parameters, "responses": answers}


def _media(name: Tree) -> Tree:
    header = {"name": "Range", "in": "header", "schema": {"type": "string"}, "example": "bytes=0-1023"}
    whole: Tree = {"content": {"video/*": {}, "image/*": {}}}
    return {
        "summary": "The clip itself, whole or one range of its bytes.",
        "parameters": [name, header],
        "responses": {
            "200": {"description": "The whole clip"} | whole,
            "206": {"description": "The range"} | whole,
            "304": {"description": "It is what If-None-Match names"},
            "404": _refusal(),
            "416": _refusal(),
        },
    }


def _refusal() -> Tree:
    return {"description": "Refused", "content": {"application/json": {"schema": _ref("Error")}}}


def _query(name: str, schema: Tree, description: str) -> Tree:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _whole(most: int) -> Tree:
    return {"type": "integer", "minimum": 1, "maximum": most}


def _ref(name: str) -> Tree:
    return {"$ref": f"#/components/schemas/{name}"}
