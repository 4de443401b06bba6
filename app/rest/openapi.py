"""The OpenAPI 3.1 document of the HTTP API. A test fuzzes the running server from it."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.responses import Response
from starlette.routing import Route

from app.rest.problems import PROBLEM_JSON, ProblemDetails
from app.rest.requests import JSON, PAGE_LIMIT, RestRequest, prefix_of
from app.rest.resource import resource
from app.rest.things import (
    COLLECTION,
    HIGHEST_ID,
    LOWEST_ID,
    Name,
    NewThing,
    ThingChanges,
)
from app.rest.topics import COLLECTION as TOPICS
from app.rest.topics import ONE_TOPIC, ListedTopic

Json = dict[str, Any]
Id = Annotated[int, Meta(ge=LOWEST_ID, le=HIGHEST_ID)]
Limit = Annotated[int, Meta(ge=1, le=PAGE_LIMIT)]


class Thing(msgspec.Struct):
    """A thing, as Postgres renders the row."""

    id: Id
    name: Name
    info: str
    created_at: Annotated[str, Meta(description="Date and time with zone, in ISO 8601.")]


class Health(msgspec.Struct):
    """The state of the server."""

    status: str


class About(msgspec.Struct):
    """What this server is."""

    version: str
    things: Annotated[bool, Meta(description="Whether the sample table and its REST are there.")]
    psql: Annotated[
        str | None,
        Meta(description="A command that opens psql on the database; null if none would help you."),
    ]


def body(struct: type[msgspec.Struct]) -> Json:
    """Return the content of a request or response that is one JSON object."""
    return {JSON: {"schema": reference(struct)}}


def reference(struct: type[msgspec.Struct]) -> Json:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}


def header(description: str, required: bool = True) -> Json:
    return {"description": description, "required": required, "schema": {"type": "string"}}


def parameter(where: str, name: str, type_: Any, description: str, required: bool = False) -> Json:
    return {
        "in": where,
        "name": name,
        "required": required,
        "schema": msgspec.json.schema(type_),
        "description": description,
    }


def problems(*statuses: int) -> Json:
    """Return the error responses of an operation."""
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def problem(description: str, **headers: Json) -> Json:
    content = {PROBLEM_JSON: {"schema": reference(ProblemDetails)}}
    return {"description": description, "headers": headers, "content": content}


LIST_THINGS = {
    "operationId": "listThings",
    "summary": "List things by id",
    "parameters": [
        parameter("query", "limit", Limit, "How many things to return at most. Default: all."),
        parameter("query", "after", Id, "Only things with a greater id."),
    ],
    "responses": {
        "200": {
            "description": "The things.",
            "headers": {
                "Feed-Offset": header(
                    "Where Socket.IO continues after exactly this list: `io({auth: {since: ...}})`."
                ),
                "Link": header('`<...>; rel="next"` if there are more things.', required=False),
            },
            "content": {JSON: {"schema": {"type": "array", "items": reference(Thing)}}},
        },
        **problems(403, 422, 503),
    },
}

LIST_TOPICS = {
    "operationId": "listTopics",
    "summary": "List what is watched: topics, their keys, columns and types",
    "responses": {
        "200": {
            "description": "The topics.",
            "content": {JSON: {"schema": {"type": "array", "items": reference(ListedTopic)}}},
        },
        **problems(403, 503),
    },
}

LIST_ROWS = {
    "operationId": "listRows",
    "summary": "List rows of a topic by key",
    "parameters": [
        parameter("path", "topic", str, "A topic, as `GET /topics` names it.", required=True),
        {
            "in": "query",
            "name": "filter",
            "style": "form",
            "explode": True,
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
            "description": (
                "Which rows, as in subscriptions: `status=eq.open&total=gt.100`. A column with the"
                " name of another parameter is written in quotes."
            ),
        },
        parameter("query", "columns", str, "Names of columns, separated by commas. Default: all."),
        parameter("query", "limit", Limit, "How many rows to return at most. Default: all."),
        parameter(
            "query",
            "after",
            str,
            "Only rows with a greater key: one value, or several separated by commas. `Link` says"
            " it for the next page.",
        ),
    ],
    "responses": {
        "200": {
            "description": "The rows, as Postgres renders them.",
            "headers": {
                "Feed-Offset": header(
                    "Where a subscription continues after exactly these rows: `since`."
                ),
                "Link": header('`<...>; rel="next"` if there are more rows.', required=False),
            },
            "content": {JSON: {"schema": {"type": "array", "items": {"type": "object"}}}},
        },
        **problems(403, 404, 422, 503),
    },
}

CREATE_THING = {
    "operationId": "createThing",
    "summary": "Create a thing",
    "description": "Unknown fields are rejected.",
    "requestBody": {"required": True, "content": body(NewThing)},
    "responses": {
        "201": {
            "description": "The new thing.",
            "headers": {"Location": header("The path of the new thing.")},
            "content": body(Thing),
        },
        **problems(400, 403, 409, 413, 415, 422, 503),
    },
}


def one_thing(suffix: str, name: Json) -> Json:
    """Return the operations on one thing, whose URL carries its name in one of two ways."""
    the_thing = {"description": "The thing.", "content": body(Thing)}
    return {
        "parameters": [name],
        "get": {
            "operationId": f"readThing{suffix}",
            "summary": "Get a thing",
            "responses": {"200": the_thing, **problems(403, 404, 422, 503)},
        },
        "patch": {
            "operationId": f"updateThing{suffix}",
            "summary": "Change a thing",
            "description": "Omitted fields are kept; `{}` changes nothing. Unknown fields: 422.",
            "requestBody": {"required": True, "content": body(ThingChanges)},
            "responses": {"200": the_thing, **problems(400, 403, 404, 409, 413, 415, 422, 503)},
        },
        "delete": {
            "operationId": f"deleteThing{suffix}",
            "summary": "Delete a thing",
            "responses": {"204": {"description": "Deleted."}, **problems(403, 404, 409, 422, 503)},
        },
    }


IN_PATH = parameter(
    "path", "name", Name, "The name, percent-encoded; a slash is `%2F`.", required=True
)
IN_QUERY = parameter(
    "query",
    "name",
    Name,
    "The name. Needed for `.` and `..`, which URL parsers remove from a path.",
    required=True,
)

HEALTH = {"description": "Yes.", "content": body(Health)}
HEALTHZ = {
    "operationId": "isAlive",
    "summary": "Whether the server is alive",
    "responses": {"200": HEALTH},
}
READYZ = {
    "operationId": "isReady",
    "summary": "Whether the server is listening to the database and caught up",
    "responses": {"200": HEALTH, **problems(503)},
}

ABOUT = {
    "operationId": "about",
    "summary": "What this server is",
    "responses": {"200": {"description": "This.", "content": body(About)}},
}

DOCUMENT: Json = {
    "openapi": "3.1.0",
    "info": {
        "title": "Tablecast",
        "version": "1",
        "description": "The rows of a table. Socket.IO clients receive every change at once.",
    },
    "servers": [{"url": "/"}],
    "paths": {
        COLLECTION: {"get": LIST_THINGS, "post": CREATE_THING},
        f"{COLLECTION}/{{name}}": one_thing("", IN_PATH),
        f"{COLLECTION}/": one_thing("ByQuery", IN_QUERY),
        TOPICS: {"get": LIST_TOPICS},
        ONE_TOPIC: {"get": LIST_ROWS},
        "/healthz": {"get": HEALTHZ},
        "/readyz": {"get": READYZ},
        "/about": {"get": ABOUT},
    },
    "components": {
        "schemas": msgspec.json.schema_components(
            [Thing, NewThing, ThingChanges, ListedTopic, ProblemDetails, Health, About],
            ref_template="#/components/schemas/{name}",
        )[1],
        "responses": {
            "400": problem("The body is not JSON in UTF-8."),
            "403": problem("The database does not allow this to the server's role."),
            "404": problem("There is no thing with this name, or no such topic."),
            "409": problem("The name is taken, or the database rejects the write."),
            "413": problem("The body is too large."),
            "415": problem("The Content-Type of the body is not JSON."),
            "422": problem("A value is invalid; `field` says which."),
            "503": problem(
                "The database is unavailable.",
                **{"Retry-After": header("How many seconds to wait.")},
            ),
        },
    },
}


def without_things(document: Json) -> Json:
    """Return the document of a server without the sample table (THINGS=no), and without the
    components that only the sample's paths refer to.
    """
    paths = {
        path: operations
        for path, operations in document["paths"].items()
        if not path.startswith(COLLECTION)
    }
    responses = referred_to(document["components"]["responses"], "responses", paths)
    schemas = referred_to(document["components"]["schemas"], "schemas", [paths, responses])
    schemas |= referred_to(document["components"]["schemas"], "schemas", schemas)
    components = {"schemas": schemas, "responses": responses}
    return {**document, "paths": paths, "components": components}


def referred_to(components: Json, kind: str, within: object) -> Json:
    """Return the components of one kind that `within` refers to."""
    text = msgspec.json.encode(within).decode()
    return {
        name: component
        for name, component in components.items()
        if f'"#/components/{kind}/{name}"' in text
    }


def route(things: bool) -> Route:
    """Return the route of the document, with or without the sample table."""
    document = DOCUMENT if things else without_things(DOCUMENT)

    async def openapi(request: RestRequest) -> Response:
        """GET the OpenAPI document."""
        described = document
        if prefix := prefix_of(request):
            described = {**document, "servers": [{"url": prefix}]}
        return Response(
            msgspec.json.format(msgspec.json.encode(described), indent=2), media_type=JSON
        )

    return resource("/openapi.json", get=openapi)
