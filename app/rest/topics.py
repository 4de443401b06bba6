"""The REST resource `/topics`: what is watched, and the rows of each topic, as a subscription to it
would load them.
"""

from dataclasses import dataclass
from urllib.parse import quote

import asyncpg
import msgspec
from starlette.responses import Response

from app.live.filter import OPERATORS, filter_of, format_key, parse_names, parse_parameter
from app.live.lists import TooSlow
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.rows import Rows
from app.live.subscription import Request
from app.live.table import Table
from app.rest.problems import Problem, Unavailable
from app.rest.requests import (
    PAGE_LIMIT,
    RestRequest,
    integer,
    json_response,
    prefix_of,
    using_the_database,
)
from app.rest.resource import resource

COLLECTION = "/topics"
ONE_TOPIC = COLLECTION + "/{topic}"
OPTIONS = ("columns", "limit", "after")
STATUSES = {RefusalCode.UNKNOWN_TOPIC: 404, RefusalCode.NO_RIGHT: 403}
# Servers and proxies usually accept URLs of 8 kB.
LONGEST_AFTER_CHARS = 6_000
# What a URL in a Link header may contain: not `>`, which would end it, nor what no URL contains.
IN_LINK = "%!$&'()*+,;=:@/?-._~"


class TopicColumn(msgspec.Struct):
    """A column of a topic's table, with the operators that filters on it may use."""

    name: str
    type: str
    operators: list[str]


class ListedTopic(msgspec.Struct):
    """A topic: the key and the columns of its table."""

    topic: str
    key: list[str]
    columns: list[TopicColumn]


@dataclass(frozen=True, slots=True)
class Query:
    """The query string of a list. `kept`: the parts that the next page needs, as they were sent."""

    comparisons: list[tuple[str, str]]
    options: dict[str, str]
    kept: list[str]

    @classmethod
    def read(cls, text: str) -> "Query":
        """Read a query string. Raises SubscriptionRefused."""
        query = cls([], {}, [])
        for part in [part for part in text.split("&") if part]:
            name, value = parse_parameter(part)
            if name not in OPTIONS:
                query.comparisons.append((name, value))
            elif name in query.options:
                raise SubscriptionRefused(RefusalCode.BAD_OPTION, f"Give {name} only once.", name)
            else:
                query.options[name] = value
            if name != "after":
                query.kept.append(part)
        return query

    def request(self, topic: str) -> Request:
        """Return the request for a topic's rows. Raises SubscriptionRefused."""
        columns = self.options.get("columns")
        names = parse_names(columns) if columns else None
        return Request(topic, filter_of(self.comparisons), names)


async def list_topics(request: RestRequest) -> Response:
    """GET what is watched."""
    with using_the_database(request):
        tables = await request.state.lists.topics()
    return json_response(msgspec.json.encode([described(table) for table in tables]))


async def list_rows(request: RestRequest) -> Response:
    """GET the rows of a topic that match a filter, ordered by key: all, or at most `limit` with
    keys above `after`.
    """
    text = request.scope["query_string"].decode("utf-8", "surrogateescape")
    try:
        query = Query.read(text)
        limit = integer(request, "limit", 1, PAGE_LIMIT)
        asked = query.request(request.path_params["topic"])
        with using_the_database(request):
            rows = await request.state.lists.rows(asked, limit, query.options.get("after"))
    except SubscriptionRefused as refused:
        if refused.code is RefusalCode.UNREADABLE:
            raise Unavailable(refused.detail, refused.code) from refused
        status = STATUSES.get(refused.code, 422)
        raise Problem(status, refused.detail, field=refused.field, code=refused.code) from refused
    except TooSlow as error:
        raise Unavailable(str(error)) from error
    except asyncpg.ProgramLimitExceededError as error:
        raise Problem(422, "The list is too long for one response: add a limit.") from error
    return json_response(
        b"".join((b"[", b",".join(rows.chunks), b"]")), headers=headers(request, query, rows)
    )


def headers(request: RestRequest, query: Query, rows: Rows) -> dict[str, str]:
    """Return the headers of a list: its offset, and a link to the next page if there is one.

    Raises Problem if that link would be too long.
    """
    if rows.more_after is None:
        return {"Feed-Offset": rows.offset}
    after = f"after={quote(format_key(rows.more_after), safe='')}"
    kept = [quote(part.encode("utf-8", "surrogateescape"), IN_LINK) for part in query.kept]
    address = prefix_of(request) + ONE_TOPIC.format_map(request.path_params)
    if len(after) > LONGEST_AFTER_CHARS:
        raise Problem(
            422,
            "The key of the last row is too long for the address of the next page: ask for another"
            " limit, so that the page ends with another row.",
            field="limit",
            code=RefusalCode.TOO_LARGE,
        )
    return {
        "Feed-Offset": rows.offset,
        "Link": f'<{address}?{"&".join([*kept, after])}>; rel="next"',
    }


def described(table: Table) -> ListedTopic:
    """Return what clients may know about a topic."""
    columns = [
        TopicColumn(
            column.name,
            column.type,
            [operator for operator in OPERATORS if operator in column.kind.operators],
        )
        for column in table.columns
    ]
    return ListedTopic(table.topic, list(table.key), columns)


routes = [resource(COLLECTION, get=list_topics), resource(ONE_TOPIC, get=list_rows)]
