"""The platform's OpenAPI file, as far as a test may ask it: its place is in MACHINES_OPENAPI."""

import functools
import json
import os
import re

# Read once: the file may be named relative to where the tests began.
PLACE = os.path.abspath(os.environ["MACHINES_OPENAPI"]) if os.environ.get("MACHINES_OPENAPI") else None
MISSING = "MACHINES_OPENAPI does not say where the platform's OpenAPI file is"

# What the docs have and the file has not, on every operation (platform's table of codes; 409, 412 and 429 as observed),
# and what the emulator says of itself: 405 of an HTTP server, 501 for what it cannot do.
MORE_STATUSES = (400, 401, 404, 405, 408, 409, 412, 422, 429, 501)
LEASE = "/apps/{app_name}/machines/{machine_id}/lease"


def there():
    """Whether the file is there."""
    return PLACE is not None


@functools.cache
def openapi():
    """The file, with what is documented elsewhere added; each addition says where."""
    with open(PLACE, encoding="utf-8") as file:
        document = json.load(file)
    schemas = document["components"]["schemas"]
    # Its own description says that answers use booleans for "off" and "stop".
    autostop = schemas["fly.MachineService"]["properties"]["autostop"]
    schemas["fly.MachineService"]["properties"]["autostop"] = {
        "anyOf": [{"type": "boolean"}, {name: autostop[name] for name in ("type", "enum")}],
    }
    schemas["main.statusCode"]["enum"].append("name_taken")  # fly-go, 2026-08
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status in MORE_STATUSES:
                operation["responses"].setdefault(str(status), {"description": "", "content": error})
                # An error may come on any of them, also where only one other media type is named (tokens, exec).
                operation["responses"][str(status)].setdefault("content", error).setdefault(
                    "application/json", error["application/json"]
                )
        if path == LEASE:
            # Leases come in an envelope, and so do their errors (docs and fly-go).
            operations["post"]["responses"]["409"] = {
                "description": "",
                "content": {
                    "application/json": {
                        "schema": {
                            "type": "object",
                            "properties": {name: {"type": "string"} for name in ("status", "message", "code", "error")},
                        }
                    }
                },
            }
    return document


@functools.cache
def templates():
    """A pattern for each path."""
    return [(re.compile("/v1" + re.sub(r"\{\w+\}", "[^/]+", path)), path) for path in openapi()["paths"]]


@functools.cache
def validator(path, method, status):
    """For the JSON body of this answer; None if none is documented; KeyError if the answer is not."""
    import jsonschema

    answer = openapi()["paths"][path][method]["responses"][str(status)]
    content = answer.get("content", {}).get("application/json")
    if content is None:
        return None
    return jsonschema.Draft202012Validator({**content["schema"], "components": openapi()["components"]})


def check(method, target, reply):
    """That *reply* is one that the file, with the additions above, has for this request."""
    path = target.partition("?")[0]
    template = next((name for pattern, name in templates() if pattern.fullmatch(path)), None)
    if template is None or method.lower() not in openapi()["paths"][template]:
        assert reply.status in (401, 404, 405, 429, 500, 502)
        return
    if reply.status in (500, 502):
        return  # only faults answer so, and not always in JSON
    try:
        body = validator(template, method.lower(), reply.status)
    except KeyError:
        raise AssertionError(f"{method} {template}: an answer {reply.status} is not documented") from None
    if body is not None:
        body.validate(json.loads(reply.body))
    if reply.status == 204:
        assert reply.body == b""
