"""Compares what clients got with what the log holds. Shares no code with the product.

The truth is every committed row of `feed.change`, read once at rest. An offset is read here by
itself: `epoch.snapshot.signature` behind a batch, `epoch.snapshot.snapshot.id.signature` within
one. Between two snapshots lies a batch: what the first could not see and the second can, by id.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

Row = dict[str, Any]

# Things of such names are waited for; the last one is written when all is over.
MARK = "mark "
THE_END = "mark the end"


class Snapshot(NamedTuple):
    """Transactions below `end` had ended, but for those `open`."""

    end: int
    open: frozenset[int]

    def sees(self, xid: int) -> bool:
        return xid < self.end and xid not in self.open


@lru_cache(64)
def snapshot(text: str) -> Snapshot:
    _, end, open_ = text.split(":")
    return Snapshot(int(end), frozenset(int(xid) for xid in open_.split(",") if xid))


def place(offset: str) -> tuple[Snapshot, Snapshot | None, int]:
    """What an offset says: behind a batch (snapshot, None, 0), or behind a change within one."""
    parts = offset.split(".")
    if len(parts) == 3:
        return snapshot(parts[1]), None, 0
    return snapshot(parts[1]), snapshot(parts[2]), int(parts[3])


def key(op: str, what: Any) -> int:
    """A number that stands for a change's content."""
    if isinstance(what, dict):
        return hash((op, what["id"], what["name"], what["info"], what["created_at"]))
    return hash((op, what))


class Log:
    """The committed changes by transaction, as far as they are known for certain."""

    def __init__(self) -> None:
        self._changes: dict[int, list[tuple[int, int]]] = {}  # xid -> (id, key)
        self.known_below = 0
        self.count = 0

    def add(self, changes: Iterable[tuple[int, int, str, Row | None]]) -> None:
        """Take (xid, id, operation, row) of whole transactions; those already there are passed."""
        new: dict[int, list[tuple[int, int]]] = {}
        for xid, id, op, row in changes:
            if xid not in self._changes:
                what = row["name"] if op == "destroy" and row else row
                new.setdefault(xid, []).append((id, key(op, what)))
                self.count += 1
        self._changes |= new

    def knows(self, until: Snapshot) -> bool:
        return until.end <= self.known_below

    def between(self, since: Snapshot, until: Snapshot) -> list[tuple[int, int]]:
        """The batch between two snapshots, by id."""
        later = range(since.end, until.end)
        found: list[tuple[int, int]] = []
        for xids in (since.open, later):
            for xid in xids:
                changes = self._changes.get(xid)
                if changes and until.sees(xid):
                    found += changes
        found.sort()
        return found

    def contents(self) -> set[int]:
        """What the changes say, all of them. Costly, and needed only when something is wrong."""
        return {content for changes in self._changes.values() for _, content in changes}


@dataclass
class Findings:
    """What is wrong with what one client got, and how much it got."""

    events: int = 0
    sessions: int = 0
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    phantom: int = 0  # never committed
    refused: int = 0  # told to load anew, though the log holds everything
    stale: int = 0  # rows that differ from the table at the end
    notes: list[str] = field(default_factory=list)

    def red(self) -> int:
        """How much is wrong, all together."""
        return self.lost + self.doubled + self.disordered + self.phantom + self.refused + self.stale

    def note(self, text: str) -> None:
        if len(self.notes) < 20:
            self.notes.append(text)

    def __add__(self, other: "Findings") -> "Findings":
        numbers = {
            name: getattr(self, name) + getattr(other, name)
            for name in self.__dict__
            if name != "notes"
        }
        return Findings(**numbers, notes=self.notes + other.notes)

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {number}" for name, number in self.__dict__.items() if name != "notes"
        )


class Fold:
    """A table made of a list and of changes."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows: dict[int, Row] = {}
        self._ids: dict[str, int] = {}
        self.surprises = 0
        for row in rows:
            self._put(row)

    def apply(self, op: str, what: Any) -> None:
        if op == "truncate":
            self.rows.clear()
            self._ids.clear()
        elif op == "destroy":
            id = self._ids.pop(what, None)
            self.surprises += id is None or self.rows.pop(id, None) is None
        else:
            before = self.rows.get(what["id"])
            self.surprises += (before is None) != (op == "create")
            if before is not None and self._ids.get(before["name"]) == what["id"]:
                del self._ids[before["name"]]
            self._put(what)

    def _put(self, row: Row) -> None:
        self.rows[row["id"]] = row
        self._ids[row["name"]] = row["id"]


def differing(rows: Iterable[Row], table: Iterable[Row]) -> int:
    """How many rows are not the same in both."""
    held = {row["id"]: row for row in rows}
    true = {row["id"]: row for row in table}
    return sum(held.get(id) != true.get(id) for id in held.keys() | true.keys())


class Reader:
    """Goes through the entries of one client (watch.mjs says what they are)."""

    def __init__(self, name: str, log: Log) -> None:
        self.name = name
        self.findings = Findings()
        self._log = log
        self._offset: str | None = None
        self._position: Snapshot | None = None
        self._fold: Fold | None = None
        self._batch: list[tuple[int, str]] = []  # key, offset
        self._closed: list[tuple[Snapshot, Snapshot, list[tuple[int, str]]]] = []
        self._greeted = False
        self._told_to_reload = False
        self._state: list[Row] | None = None
        self.marks: set[str] = set()  # the marks that came, or were in a list

    def take(self, entry: list[Any]) -> None:
        match entry:
            case ["list", offset, rows]:
                self.marks |= {row["name"] for row in rows if row["name"].startswith(MARK)}
                self._begin(offset, Fold(rows))
            case ["hello", recovered, offset, session_recovered]:
                self._greet(recovered, offset, session_recovered)
            case ["state", rows]:
                self._state = rows
            case [op, what, offset]:
                if not self._told_to_reload:
                    self._change(op, what, offset)

    def _begin(self, offset: str, fold: Fold | None) -> None:
        """From here on everything is expected."""
        self._leave_batch()
        self._offset, self._fold = offset, fold
        self._position = place(offset)[0]
        self._greeted = self._told_to_reload = False

    def _greet(self, recovered: bool, offset: str, session_recovered: bool | None) -> None:
        self.findings.sessions += 1
        if self._position is None:  # a client without a list begins where it was greeted
            self._begin(offset, None)
        elif not recovered:
            self.findings.refused += 1
            self.findings.note(f"{self.name}: refused at {self._offset}")
            if self._fold is None:
                self._begin(offset, None)
            else:
                self._told_to_reload = True
        elif offset != self._offset:
            self.findings.disordered += 1
            self.findings.note(f"{self.name}: came with {self._offset}, greeted with {offset}")
        elif self._greeted and session_recovered is False:
            self.findings.refused += 1
            self.findings.note(f"{self.name}: continues at {offset}, but socket.recovered is false")
        self._greeted = True

    def _change(self, op: str, what: Any, offset: str) -> None:
        assert self._position is not None, "a change before hello"
        self.findings.events += 1
        if self._fold is not None:
            self._fold.apply(op, what)
        self._offset = offset
        if op == "create" and what["name"].startswith(MARK):
            self.marks.add(what["name"])
        since, until, _ = place(offset)
        self._batch.append((key(op, what), offset))
        if until is None:
            self._closed.append((self._position, since, self._batch))
            self._position, self._batch = since, []

    def judge(self) -> None:
        """Compare every batch that the log is known for."""
        while self._closed and self._log.knows(self._closed[0][1]):
            since, until, got = self._closed.pop(0)
            self._compare(self._log.between(since, until), got, f"{since.end} to {until.end}")

    def finish(self, now: Snapshot, table: list[Row]) -> Findings:
        """Compare with the end of the log and with the table."""
        self.judge()
        if self._position is None:
            self.findings.lost += self._log.count or 1
            self.findings.note(f"{self.name}: it never got a list or a greeting")
            return self.findings
        got, self._batch = self._batch, []
        self._compare(self._log.between(self._position, now), got, "the end")
        if self._fold is not None:
            self.findings.stale += self._fold.surprises + differing(self._fold.rows.values(), table)
        if self._state is not None:
            self.findings.stale += differing(self._state, table)
        return self.findings

    def _leave_batch(self) -> None:
        """A client that loads anew within a batch was entitled to what it had got of it."""
        if self._batch:
            since, until, id = place(self._batch[-1][1])
            assert self._position is not None and until is not None
            if self._log.knows(until):
                expected = [
                    change for change in self._log.between(self._position, until) if change[0] <= id
                ]
                self._compare(expected, self._batch, f"before the list, {since.end} to {until.end}")
            self._batch = []

    def _compare(
        self, expected: list[tuple[int, int]], got: list[tuple[int, str]], where: str
    ) -> None:
        if [content for _, content in expected] == [content for content, _ in got]:
            for (id, _), (_, offset) in zip(expected, got, strict=True):
                if offset.count(".") == 4 and place(offset)[2] != id:
                    self.findings.disordered += 1
                    self.findings.note(f"{self.name}: {where}: change {id} has the offset {offset}")
            return
        wanted = Counter(content for _, content in expected)
        had = Counter(content for content, _ in got)
        lost, extra = wanted - had, had - wanted
        committed = self._log.contents() if extra else set()
        doubled = sum(count for content, count in extra.items() if content in committed)
        self.findings.lost += lost.total()
        self.findings.doubled += doubled
        self.findings.phantom += extra.total() - doubled
        self.findings.disordered += not lost and not extra
        self.findings.note(
            f"{self.name}: {where}: {len(expected)} expected, {len(got)} came,"
            f" {lost.total()} lost, {doubled} doubled"
        )
