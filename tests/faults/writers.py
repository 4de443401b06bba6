"""Writers of every kind: SQL in transactions of every shape, and REST."""

import asyncio
import contextlib
import random
import string
import time
from collections.abc import Awaitable, Callable
from urllib.parse import quote

import aiohttp
import asyncpg

from app.database.connections import Connection

ROLLED_BACK = 0.3
MOST_ROWS = 2_000
BURST_S = 5.0
STATEMENT_TIMEOUT_S = 20
ODD = [
    "plain",
    "a/b?c#d",
    "quo\"te'",
    "\\back",
    "line\nbreak",
    "tab\t\x01",
    "emoji 🟣",
    "ü",
    "</script>",
    "%41",
]
# What asyncpg raises if it is disconnected, refused by a constraint, or in a deadlock.
EXPECTED = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
# A row must look the same whatever session wrote it.
SESSIONS = [
    {},
    {"TimeZone": "Asia/Tokyo", "DateStyle": "German"},
    {"IntervalStyle": "iso_8601", "search_path": "pg_catalog"},
    {"default_transaction_isolation": "repeatable read"},
    {"default_transaction_isolation": "serializable"},
]


class Pace:
    """Lets `rate` changes a second through, for all writers together."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.written = 0
        self._allowed = 0.0
        self._at = time.monotonic()

    async def wait(self) -> None:
        while True:
            now = time.monotonic()
            self._allowed = min(
                self._allowed + (now - self._at) * self.rate, self.written + BURST_S * self.rate
            )
            self._at = now
            if self.written < self._allowed:
                return
            await asyncio.sleep(0.01)


class Rollback(Exception):
    """The writer has changed its mind."""


class SqlWriter:
    """Runs one session after another, and in each one transaction after another."""

    def __init__(self, number: int, url: str, chance: random.Random, pace: Pace) -> None:
        self.number = number
        self._url = url
        self._chance = chance
        self._pace = pace
        self._counter = 0

    async def run(self) -> None:
        """Write until cancelled; start again with what faults interrupt."""
        while True:
            with contextlib.suppress(*EXPECTED):
                await self._session()
            await asyncio.sleep(0.1)

    async def _session(self) -> None:
        settings = self._chance.choice(SESSIONS) | {"lock_timeout": "1s"}
        connection = await asyncpg.connect(
            self._url, timeout=5, command_timeout=STATEMENT_TIMEOUT_S, server_settings=settings
        )
        try:
            for _ in range(200):
                await self._pace.wait()
                await self._transaction(connection)
        finally:
            connection.terminate()

    async def _transaction(self, connection: Connection) -> None:
        rolled_back = self._chance.random() < ROLLED_BACK
        written = 0
        with contextlib.suppress(
            Rollback,
            asyncpg.IntegrityConstraintViolationError,
            asyncpg.TransactionRollbackError,
            asyncpg.LockNotAvailableError,
        ):
            async with connection.transaction():
                for _ in range(self._chance.choice([1, 1, 1, 2, 3, 5])):
                    if self._chance.random() < 0.2:
                        with contextlib.suppress(
                            Rollback, asyncpg.IntegrityConstraintViolationError
                        ):
                            async with connection.transaction():  # a savepoint
                                written += await self._statement(connection)
                                if self._chance.random() < 0.5:
                                    raise Rollback
                    else:
                        written += await self._statement(connection)
                if rolled_back:
                    raise Rollback
            self._pace.written += written

    async def _statement(self, connection: Connection) -> int:
        kinds: list[tuple[int, Callable[[Connection], Awaitable[int]]]] = [
            (30, self._insert), (20, self._update), (8, self._rename), (12, self._delete),
            (8, self._insert_many), (8, self._update_many), (3, self._update_nothing),
            (3, self._change_key), (4, self._upsert), (3, self._delete_many), (3, self._again),
            (2, self._swap_names), (2, self._copy), (1, self._truncate_or_thin),
        ]  # fmt: skip
        kind = self._chance.choices([k for _, k in kinds], [weight for weight, _ in kinds])[0]
        return await kind(connection)

    async def _do(self, connection: Connection, statement: str, *arguments: object) -> int:
        """Run a statement; return how many rows it changed."""
        return changed(await connection.execute(statement, *arguments))

    def _name(self) -> str:
        self._counter += 1
        return f"{self._chance.choice(ODD)} {self.number}.{self._counter}.{time.monotonic_ns()}"

    def _info(self) -> str:
        length = 5_000 if self._chance.random() < 0.002 else self._chance.randrange(30)
        noise = "".join(self._chance.choices(string.ascii_letters, k=length))
        return f"{self._chance.choice(ODD)} {noise}"

    async def _insert(self, connection: Connection) -> int:
        return await self._do(
            connection,
            "INSERT INTO public.things (name, info) VALUES ($1, $2)",
            self._name(),
            self._info(),
        )

    async def _insert_many(self, connection: Connection) -> int:
        return await self._do(
            connection,
            "INSERT INTO public.things (name, info)"
            " SELECT $1::text || n, $2 FROM generate_series(1, $3) AS n",
            self._name(), self._info(), self._chance.randint(2, 100),
        )  # fmt: skip

    async def _copy(self, connection: Connection) -> int:
        rows = [(self._name(), self._info()) for _ in range(self._chance.randint(1, 30))]
        done = await connection.copy_records_to_table(
            "things", schema_name="public", columns=["name", "info"], records=rows
        )
        return changed(done)

    async def _upsert(self, connection: Connection) -> int:
        return await self._do(
            connection,
            "INSERT INTO public.things (name, info) SELECT name, $1::text FROM public.things"
            " WHERE id % 97 = $2 UNION VALUES ($3, $1)"
            " ON CONFLICT (name) DO UPDATE SET info = excluded.info",
            self._info(), self._chance.randrange(97), self._name(),
        )  # fmt: skip

    async def _update(self, connection: Connection) -> int:
        return await self._do(
            connection,
            "UPDATE public.things SET info = $1 WHERE id = (SELECT id FROM public.things"
            " WHERE id >= $2::float * (SELECT max(id) FROM public.things) ORDER BY id LIMIT 1)",
            self._info(), self._chance.random(),
        )  # fmt: skip

    async def _update_many(self, connection: Connection) -> int:
        return await self._do(
            connection,
            "UPDATE public.things SET info = $1::text || id WHERE id % 37 = $2",
            self._info(), self._chance.randrange(37),
        )  # fmt: skip

    async def _update_nothing(self, connection: Connection) -> int:
        await connection.execute("UPDATE public.things SET info = info WHERE id % 11 = 3")
        return 0

    async def _rename(self, connection: Connection) -> int:
        return await self._do(
            connection,
            "UPDATE public.things SET name = left(name, 30) || $1::text WHERE id % 199 = $2",
            self._name(), self._chance.randrange(199),
        )  # fmt: skip

    async def _swap_names(self, connection: Connection) -> int:
        """Swap the names of two rows within one transaction."""
        found = await connection.fetch(
            "SELECT id, name FROM public.things WHERE id % 53 = $1 ORDER BY id LIMIT 2 FOR UPDATE",
            self._chance.randrange(53),
        )
        if len(found) < 2:
            return 0
        rename = "UPDATE public.things SET name = $2 WHERE id = $1"
        (one, its_name), (other, other_name) = found
        await connection.execute(rename, one, self._name())
        await connection.execute(rename, other, its_name)
        await connection.execute(rename, one, other_name)
        return 3

    async def _change_key(self, connection: Connection) -> int:
        return await self._do(
            connection,
            "UPDATE public.things SET id = DEFAULT, info = $1 WHERE id % 211 = $2",
            self._info(), self._chance.randrange(211),
        )  # fmt: skip

    async def _again(self, connection: Connection) -> int:
        """Delete rows and insert others with the same names."""
        gone = await connection.fetch(
            "DELETE FROM public.things WHERE id % 101 = $1 RETURNING name",
            self._chance.randrange(101),
        )
        names = [row["name"] for row in gone]
        return await self._do(
            connection,
            "INSERT INTO public.things (name, info) SELECT unnest($1::text[]), $2",
            names,
            self._info(),
        )

    async def _delete(self, connection: Connection) -> int:
        return await self._do(
            connection,
            "DELETE FROM public.things WHERE id = (SELECT id FROM public.things"
            " WHERE id >= $1::float * (SELECT max(id) FROM public.things) ORDER BY id LIMIT 1)",
            self._chance.random(),
        )

    async def _delete_many(self, connection: Connection) -> int:
        return await self._do(
            connection, "DELETE FROM public.things WHERE id % 19 = $1", self._chance.randrange(19)
        )

    async def _truncate_or_thin(self, connection: Connection) -> int:
        if self._chance.random() < 0.2:
            # TRUNCATE waits for the slow writers, and everybody else then waits for it.
            await connection.execute("SET LOCAL lock_timeout = '100ms'")
            return await self._do(connection, "TRUNCATE public.things")
        return await self._do(
            connection,
            "DELETE FROM public.things WHERE id < (SELECT id FROM public.things"
            " ORDER BY id DESC OFFSET $1 LIMIT 1)",
            MOST_ROWS,
        )


def changed(done: str) -> int:
    """Return how many rows a statement changed, from its status; a truncate is one change."""
    count = done.split()[-1]
    return int(count) if count.isdecimal() else 1


class SlowWriter(SqlWriter):
    """Leaves transactions open for a while, so that they commit out of order."""

    async def _transaction(self, connection: Connection) -> None:
        with contextlib.suppress(Rollback, asyncpg.TransactionRollbackError):
            async with connection.transaction():
                for _ in range(3):
                    await self._insert(connection)
                    await asyncio.sleep(self._chance.uniform(0.05, 1.5))
                if self._chance.random() < ROLLED_BACK:
                    raise Rollback
            self._pace.written += 3
        await asyncio.sleep(self._chance.uniform(0, 3))


class RestWriter:
    """Writes through the API of random nodes."""

    def __init__(self, urls: list[str], chance: random.Random, pace: Pace) -> None:
        self._urls = urls
        self._chance = chance
        self._pace = pace

    async def run(self) -> None:
        """Write until cancelled."""
        timeout = aiohttp.ClientTimeout(STATEMENT_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            names: list[str] = []
            while True:
                await self._pace.wait()
                with contextlib.suppress(OSError, aiohttp.ClientError):
                    await self._request(http, names)
                await asyncio.sleep(0.02)

    async def _request(self, http: aiohttp.ClientSession, names: list[str]) -> None:
        things = f"{self._chance.choice(self._urls)}/api/things"
        name = f"{self._chance.choice(ODD)} rest {time.monotonic_ns()}"
        kind = self._chance.random()
        if kind < 0.5 or not names:
            request = http.post(things, json={"name": name, "info": "by REST"})
            names.append(name)
        elif kind < 0.8:
            old = names.pop(self._chance.randrange(len(names)))
            changes = {"info": f"patched to {name}"} | ({"name": name} if kind < 0.65 else {})
            request = http.patch(f"{things}/{quote(old, safe='')}", json=changes)
            names.append(changes.get("name", old))
        else:
            old = names.pop(self._chance.randrange(len(names)))
            request = http.delete(f"{things}/{quote(old, safe='')}")
        async with request as answer:
            await answer.read()
            self._pace.written += answer.status < 300
