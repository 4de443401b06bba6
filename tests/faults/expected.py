"""What every subscription must receive: Postgres itself evaluates the filters over the log."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import asyncpg

from app.database.connections import Connection
from tests.faults.checker import Log, Snapshot, place
from tests.faults.subscriptions import TABLES, Asked, Logged

READ_ROWS = 2_000  # at once
# How many reads of the log a subscription that begins may lie behind.
READS_KEPT = 12
REUSED = 20_000  # transaction ids that are read again

# The old and the new row as rows of the table, and of both which filters they match.
MATCHING = """
SELECT xid::text::bigint, change.id, op, old::text, new::text,
       CASE WHEN old IS NULL THEN '{{}}' ELSE ARRAY[{of_old}]::boolean[] END AS was_in,
       CASE WHEN new IS NULL THEN '{{}}' ELSE ARRAY[{of_new}]::boolean[] END AS is_in
FROM feed.change,
     json_populate_record(NULL::public.{table}, old) AS o,
     json_populate_record(NULL::public.{table}, new) AS n
WHERE xid >= $1::bigint::text::xid8 AND xid < $2::bigint::text::xid8 AND topic = '{topic}'
ORDER BY xid, change.id
"""
ROWS = "SELECT row_to_json(x)::text FROM public.{table} AS x WHERE {condition}"


class Place(NamedTuple):
    """How far a client is: `id`s of the batch up to `until`, if there is one, beyond `position`."""

    position: Snapshot
    until: Snapshot | None = None
    id: int = 0

    @classmethod
    def of(cls, offset: str) -> "Place":
        return cls(*place(offset))

    @property
    def end(self) -> Snapshot:
        """The end of the batch that it is in or after."""
        return self.until or self.position

    def covers(self, xid: int, id: int) -> bool:
        if self.position.sees(xid):
            return True
        return self.until is not None and self.until.sees(xid) and id <= self.id


class ExpectedLog(Log):
    """The events of one subscription."""

    def after(self, since: Place, until: Place) -> list[tuple[int, int]]:
        """Return the ids and contents of what comes between two places: first what was between
        `since` and the batch that `until` is in, then that batch, each by id.
        """
        found = []
        for xids in (since.position.open, range(since.position.end, until.end.end)):
            for xid in xids:
                changes = self._changes.get(xid)
                for id, content in zip(changes[::2], changes[1::2], strict=True) if changes else ():
                    if until.covers(xid, id) and not since.covers(xid, id):
                        found.append((not until.position.sees(xid), id, content))
        found.sort()
        return [(id, content) for _, id, content in found]

    def forget_below(self, xid: int) -> None:
        """Drop the changes of earlier transactions."""
        for known in [known for known in self._changes if known < xid]:
            del self._changes[known]


class Expected:
    """The logs of all subscriptions of a run."""

    def __init__(self, asked: Iterable[Asked]) -> None:
        self.logs = {each: ExpectedLog() for each in asked}
        self._topics: dict[str, list[Asked]] = {}
        for each in self.logs:
            self._topics.setdefault(each.topic, []).append(each)
        self._read: deque[int] = deque(maxlen=READS_KEPT)
        self._forgotten = 0

    async def read(self, connection: Connection, since: int, below: int) -> None:
        """Read the changes of transactions from `since` on, and below another, which is final."""
        for topic, asked in self._topics.items():
            query = MATCHING.format(
                table=TABLES[topic], topic=topic,
                of_old=", ".join(each.sql("o") for each in asked),
                of_new=", ".join(each.sql("n") for each in asked),
            )  # fmt: skip
            cursor = await connection.cursor(query, max(since, self._forgotten), below)
            pending: list[asyncpg.Record] = []
            while rows := await cursor.fetch(READ_ROWS):
                pending += rows
                whole = len(pending)
                while whole and pending[whole - 1][0] == pending[-1][0]:
                    whole -= 1  # the last transaction may go on
                self._add(asked, pending[:whole])
                pending = pending[whole:]
            self._add(asked, pending)
        for log in self.logs.values():
            log.known_below = below
        self._read.append(below)

    def _add(self, asked: list[Asked], rows: Iterable[asyncpg.Record]) -> None:
        found: dict[Asked, list[tuple[int, int, int]]] = {}
        for xid, id, op, old, new, was_in, is_in in rows:
            change = Logged(op, old, new)
            for number, each in enumerate(asked):
                content = change.content_for(
                    each, bool(was_in and was_in[number]), bool(is_in and is_in[number])
                )
                if content is not None:
                    found.setdefault(each, []).append((xid, id, content))
        for each, changes in found.items():
            self.logs[each].add(changes)

    def forget(self, places: Iterable[Place]) -> None:
        """Forget what none of the clients at these places, nor one that loads now, needs."""
        if len(self._read) < READS_KEPT:
            return
        needed = [self._read[0] - REUSED]
        needed += [min(at.position.open, default=at.position.end) for at in places]
        self._forgotten = max(self._forgotten, min(needed))
        for log in self.logs.values():
            log.forget_below(self._forgotten)

    async def rows(self, connection: Connection) -> dict[Asked, list[str]]:
        """Read the rows that each subscription must hold now."""
        found = {}
        for asked in self.logs:
            query = ROWS.format(table=TABLES[asked.topic], condition=asked.sql("x"))
            found[asked] = [row[0] for row in await connection.fetch(query)]
        return found
