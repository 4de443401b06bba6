"""Watches and unwatches tables, and lists the topics, for the command."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from app.database.connections import UNAVAILABLE, Connection, Refusal, connect, reason
from app.database.locking import lock_table

# The table that a name means under the role's own search path.
RESOLVE = """
SELECT pg_class.oid, relname, pg_class.oid::regclass::text AS shown,
       relkind = 'r' AND pg_has_role(relowner, 'USAGE') AS may_be_locked
FROM pg_class WHERE pg_class.oid = $1::text::regclass
"""
WATCH = "SELECT feed.watch($1::oid::regclass, $2, $3)"
UNWATCH = "SELECT feed.unwatch($1::oid::regclass)"
TOPIC_OF = "SELECT topic FROM feed.topic WHERE relation = $1::oid"
LIST = """
SELECT topic, coalesce(pg_class.oid::regclass::text, '(dropped)') AS relation, key, destroy_with,
       coalesce(feed.problem_of(relation), problem) AS problem
FROM feed.topic LEFT JOIN pg_class ON pg_class.oid = relation
ORDER BY topic
"""


@dataclass(frozen=True, slots=True)
class Topic:
    """A watched table. `problem`: why not all of its changes are captured, None if they are."""

    name: str
    table: str
    key: tuple[str, ...]
    destroy_with: str | None
    problem: str | None


async def watch(
    url: str, table: str, topic: str | None, destroy_with: str | None
) -> tuple[Topic, str | None]:
    """Watch a table, named as in SQL, under a topic (None: the one it has, else its own name).

    Returns the watched table, and the topic it had before, if any. Raises Refusal.
    """
    async with _connected(url) as connection:
        found = await _resolve(connection, table)
        before: str | None = await connection.fetchval(TOPIC_OF, found["oid"])
        chosen = topic if topic is not None else before or found["relname"]
        try:
            async with _locked(connection, found):
                await connection.execute(WATCH, found["oid"], chosen, destroy_with)
        except asyncpg.InvalidParameterValueError as error:
            hint = " Name one with --topic." if "topic" in str(error) and topic is None else ""
            raise Refusal(f"{error}{hint}") from error
        topics = await _list(connection)
        return next(each for each in topics if each.name == chosen), before


async def unwatch(url: str, table: str) -> str:
    """Stop watching a table; return the topic it had. Raises Refusal."""
    async with _connected(url) as connection:
        found = await _resolve(connection, table)
        topic: str | None = await connection.fetchval(TOPIC_OF, found["oid"])
        if topic is None:
            raise Refusal(f"{found['shown']} is not watched.")
        async with _locked(connection, found):
            await connection.execute(UNWATCH, found["oid"])
        return topic


async def list_topics(url: str) -> list[Topic]:
    """Return all topics, by name. Raises Refusal."""
    async with _connected(url) as connection:
        return await _list(connection)


async def _list(connection: Connection) -> list[Topic]:
    return [
        Topic(row["topic"], row["relation"], tuple(row["key"] or ()), row["destroy_with"],
              row["problem"])
        for row in await connection.fetch(LIST)
    ]  # fmt: skip


async def _resolve(connection: Connection, table: str) -> asyncpg.Record:
    try:
        found = await connection.fetchrow(RESOLVE, table)
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        found = None
    except asyncpg.PostgresError as error:
        raise Refusal(f"{table!r} is not the name of a table: {error}.") from error
    if found is None:
        raise Refusal(
            f"There is no table {table}: name it as in SQL, with its schema if that is not on"
            " the search path."
        )
    return found


@asynccontextmanager
async def _locked(connection: Connection, found: asyncpg.Record) -> AsyncIterator[None]:
    """Open a transaction with the lock that changing a table's triggers takes, if the role may."""
    async with connection.transaction():
        if found["may_be_locked"]:
            await lock_table(connection, found["shown"])
        yield


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Connection]:
    try:
        connection = await connect(url)
        try:
            yield connection
        finally:
            connection.terminate()
    except UNAVAILABLE as error:
        raise Refusal(f"The database cannot be reached: {reason(error)}.") from error
    except asyncpg.PostgresError as error:  # including the sentences of feed.watch
        raise Refusal(f"{str(error).rstrip('.')}.") from error
