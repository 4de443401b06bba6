"""Compares what clients received with what the log holds. Shares no code with the product.

The truth is every committed row of `feed.change`. A batch is compared as soon as the client has all
of it and the log has been read that far, and is then dropped; of the log only numbers are kept.

Offsets are parsed here independently: `epoch.snapshot.signature` after a batch,
`epoch.snapshot.snapshot.id.signature` within one. A batch lies between two snapshots: what the
second can see and the first could not, by id.
"""

from array import array
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

Row = dict[str, Any]

# Tests wait for things with such names; the last one is written at the very end.
MARK = "mark "
THE_END = "mark the end"
# The topic that has a REST list, and contains the marks.
THING = "thing"
# What identifies a row: a table has the first of these columns, or the others.
KEY_COLUMNS = "id", "region", "number"
CLOSING = -1  # stands for the id, which an offset after a batch does not contain


class Snapshot(NamedTuple):
    """Transactions below `end` had ended, except those in `open`."""

    end: int
    open: frozenset[int]

    def sees(self, xid: int) -> bool:
        return xid < self.end and xid not in self.open


@lru_cache(64)
def snapshot(text: str) -> Snapshot:
    _, end, open_ = text.split(":")
    return Snapshot(int(end), frozenset(int(xid) for xid in open_.split(",") if xid))


def place(offset: str) -> tuple[Snapshot, Snapshot | None, int]:
    """Parse an offset: after a batch (snapshot, None, 0), or after a change within one."""
    parts = offset.split(".")
    if len(parts) == 3:
        return snapshot(parts[1]), None, 0
    return snapshot(parts[1]), snapshot(parts[2]), int(parts[3])


def identity(row: Row) -> tuple[Any, ...]:
    """Return what identifies a row of any table."""
    return tuple(map(row.get, KEY_COLUMNS))


def key(event: str, what: Any) -> int:
    """Return a number that stands for a change's content: topic, operation and body."""
    return hash((event, *what.values()) if isinstance(what, dict) else (event, what))


def logged_key(topic: str, op: str, old: Row | None, new: Row | None) -> int:
    """Return the same for a row of the log: a thing's destroy carries its name, any other the
    key.
    """
    what: Any = new
    if op == "destroy":
        assert old is not None
        what = old["name"] if topic == "thing" else {
            name: old[name] for name in KEY_COLUMNS if name in old
        }  # fmt: skip
    elif op in ("truncate", "reload"):
        what = None
    return key(f"{topic}:{op}", what)


class Log:
    """The committed changes by transaction, as far as they are final."""

    def __init__(self) -> None:
        self._changes: dict[int, array[int]] = {}  # xid -> id, key, id, key, ...
        self.known_below = 0
        self.count = 0

    def add(self, changes: Iterable[tuple[int, int, int]]) -> None:
        """Add (xid, id, key) of whole transactions; skip transactions already known."""
        new: dict[int, array[int]] = {}
        for xid, id, content in changes:
            if xid not in self._changes:
                new.setdefault(xid, array("q")).extend((id, content))
                self.count += 1
        self._changes |= new

    def knows(self, until: Snapshot) -> bool:
        return until.end <= self.known_below

    def between(self, since: Snapshot, until: Snapshot) -> list[tuple[int, int]]:
        """Return the batch between two snapshots, by id."""
        later = range(since.end, until.end)
        found: list[tuple[int, int]] = []
        for xids in (since.open, later):
            for xid in xids:
                changes = self._changes.get(xid)
                if changes and until.sees(xid):
                    found += zip(changes[::2], changes[1::2], strict=True)
        found.sort()
        return found

    def contents(self) -> set[int]:
        """Return the contents of all changes. Expensive, and needed only if something is wrong."""
        return {content for changes in self._changes.values() for content in changes[1::2]}


@dataclass
class Findings:
    """What is wrong with what one client received, and how much it received."""

    events: int = 0
    sessions: int = 0
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    phantom: int = 0  # never committed
    refused: int = 0  # `recovered: false`, although the log holds everything
    stale: int = 0  # rows that differ from their table at the end
    loads: int = 0  # snapshots that were complete
    quiet: int = 0  # offsets without an event
    unneeded: int = 0  # loads at the offset of another subscription (see except_for): no failure
    notes: list[str] = field(default_factory=list)

    def failures(self) -> int:
        """Return how many findings there are in total."""
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
    """A table built from a list and changes."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows: dict[tuple[Any, ...], Row] = {}
        self._ids: dict[str, int] = {}  # of things, by name
        self.surprises = 0
        for row in rows:
            self._put(row)

    def apply(self, op: str, what: Any) -> None:
        if op == "truncate":
            self.rows.clear()
            self._ids.clear()
        elif op == "destroy" and isinstance(what, dict):
            self.surprises += self.rows.pop(identity(what), None) is None
        elif op == "destroy":
            id = self._ids.pop(what, None)
            self.surprises += id is None or self.rows.pop(identity({"id": id}), None) is None
        else:
            before = self.rows.get(identity(what))
            self.surprises += (before is None) != (op == "create")
            if before is not None and self._ids.get(before.get("name", "")) == what.get("id", 0):
                del self._ids[before["name"]]
            self._put(what)

    def _put(self, row: Row) -> None:
        self.rows[identity(row)] = row
        if "name" in row:
            self._ids[row["name"]] = row["id"]


@dataclass
class Batch:
    """The changes a client received between two positions: their contents, and the ids in their
    offsets.
    """

    since: Snapshot
    until: Snapshot | None = None
    contents: "array[int]" = field(default_factory=lambda: array("q"))
    ids: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, content: int, offset: str) -> bool:
        """Add a change; return whether it is the last. Earlier ones say where the batch ends."""
        at, until, id = place(offset)
        self.contents.append(content)
        self.ids.append(CLOSING if until is None else id)
        self.until = at if until is None else until
        return until is None


def differing(rows: Iterable[Row], table: Iterable[Row]) -> int:
    """Return how many rows differ between the two."""
    held = {identity(row): row for row in rows}
    true = {identity(row): row for row in table}
    return sum(held.get(its) != true.get(its) for its in held.keys() | true.keys())


def compare(
    findings: Findings, where: str, log: Log,
    expected: list[tuple[int, int]], contents: "array[int]", ids: "array[int]",
) -> None:  # fmt: skip
    """Compare the contents that a client received, and the ids in their offsets, with those that
    the log says it had to.
    """
    if array("q", (content for _, content in expected)) == contents:
        for (id, _), its_id in zip(expected, ids, strict=True):
            if its_id not in (id, CLOSING):
                findings.disordered += 1
                findings.note(f"{where}: change {id} has the offset of {its_id}")
        return
    wanted = Counter(content for _, content in expected)
    had = Counter(contents)
    lost, extra = wanted - had, had - wanted
    committed = log.contents() if extra else set()
    doubled = sum(count for content, count in extra.items() if content in committed)
    findings.lost += lost.total()
    findings.doubled += doubled
    findings.phantom += extra.total() - doubled
    findings.disordered += not lost and not extra
    findings.note(
        f"{where}: {len(expected)} expected, {len(contents)} received,"
        f" {lost.total()} lost, {doubled} doubled"
    )


class Reader:
    """Processes the entries of one client (see watch.mjs).

    When a client first begins, all tables except things are empty. After a reload of a topic its
    fold is unknown. A client that subscribes to things alone gets them `only`, and `log` has
    nothing else: the last of its changes in a batch may not be the last one of the batch.
    """

    def __init__(self, name: str, log: Log, only: str | None = None) -> None:
        self.name = name
        self._only = only
        self.findings = Findings()
        self._log = log
        self._offset: str | None = None
        self._batch: Batch | None = None
        self._closed: deque[Batch] = deque()
        self._folds: dict[str, Fold] = {}
        self._unknown: set[str] = set()
        self._lists_only = self._has_list = False
        self._greeted = False
        self._told_to_reload = False
        self._state: list[Row] | None = None
        self.marks: set[str] = set()  # the marks received so far, including those in a list

    def take(self, entry: list[Any]) -> None:
        match entry:
            case ["list", offset, rows]:
                self.marks |= {row["name"] for row in rows if row["name"].startswith(MARK)}
                self._begin(offset, Fold(rows))
            case ["hello", recovered, offset, session_recovered]:
                self._greet(recovered, offset, session_recovered)
            case ["state", rows]:
                self._state = rows
            case ["quiet", offset]:
                if not self._told_to_reload:
                    self._reach(offset)
            case [event, what, offset]:
                if not self._told_to_reload:
                    self._change(event, what, offset)

    def _begin(self, offset: str, things: Fold | None) -> None:
        """Expect everything from here on."""
        self._leave_batch()
        self._lists_only = self._batch is not None  # the other tables have no list
        self._offset, self._batch = offset, Batch(place(offset)[0])
        self._has_list = things is not None
        if things is not None:
            self._folds[THING] = things
            self._unknown.discard(THING)
        else:
            self._unknown.add(THING)
        self._greeted = self._told_to_reload = False

    def _greet(self, recovered: bool, offset: str, session_recovered: bool | None) -> None:
        self.findings.sessions += 1
        if self._batch is None:  # a client without a list begins at its hello
            self._begin(offset, None)
        elif not recovered:
            self.findings.refused += 1
            self.findings.note(f"{self.name}: refused at {self._offset}")
            if not self._has_list:
                self._begin(offset, None)
            else:
                self._told_to_reload = True
        elif offset != self._offset:
            self.findings.disordered += 1
            self.findings.note(f"{self.name}: sent {self._offset}, got a hello with {offset}")
        elif self._greeted and session_recovered is False:
            self.findings.refused += 1
            self.findings.note(f"{self.name}: continues at {offset}, but socket.recovered is false")
        self._greeted = True

    def _change(self, event: str, what: Any, offset: str) -> None:
        assert self._batch is not None, "a change before hello"
        self.findings.events += 1
        topic, _, op = event.partition(":")
        if op == "reload":
            self._unknown.add(topic)
        elif self._is_known(topic):
            if topic not in self._folds:
                self._folds[topic] = Fold()
            self._folds[topic].apply(op, what)
        self._offset = offset
        if event == f"{THING}:create" and what["name"].startswith(MARK):
            self.marks.add(what["name"])
        if self._only is not None:
            self._end_earlier(offset)
        if self._batch.add(key(event, what), offset):
            self._close()

    def _end_earlier(self, offset: str) -> None:
        """Close the batch if an offset is of a later one."""
        at, until, _ = place(offset)
        assert self._batch is not None
        if self._batch.until not in (None, until or at):
            self._close()

    def _reach(self, offset: str) -> None:
        """Take an offset without a change: there was none up to there."""
        assert self._batch is not None, "an offset before hello"
        self._offset = offset
        self._end_earlier(offset)
        at, until, _ = place(offset)
        if until is None:
            self._batch.until = at
            self._close()

    def _close(self) -> None:
        assert self._batch is not None and self._batch.until is not None
        self._closed.append(self._batch)
        self._batch = Batch(self._batch.until)
        self.judge()

    def _is_known(self, topic: str) -> bool:
        """Return whether the client can know what the topic's table holds."""
        if self._only not in (None, topic):
            return False
        return topic not in self._unknown and (topic == THING or not self._lists_only)

    def judge(self) -> None:
        """Compare every batch up to which the log is known."""
        while self._closed:
            batch = self._closed[0]
            assert batch.until is not None
            if not self._log.knows(batch.until):
                break
            self._closed.popleft()
            where = f"{batch.since.end} to {batch.until.end}"
            self._compare(self._log.between(batch.since, batch.until), batch, where)

    def finish(self, now: Snapshot, tables: Mapping[str, list[Row]]) -> Findings:
        """Compare with the end of the log and with the tables, by topic."""
        self.judge()
        if self._batch is None:
            self.findings.lost += self._log.count or 1
            self.findings.note(f"{self.name}: it never got a list or a hello")
            return self.findings
        got, self._batch = self._batch, Batch(now)
        self._compare(self._log.between(got.since, now), got, "the end")
        for topic, table in tables.items():
            if self._is_known(topic):
                fold = self._folds.get(topic, Fold())
                self._compare_rows(topic, fold.surprises, fold.rows.values(), table)
        if self._state is not None:
            self._compare_rows("the page's list", 0, self._state, tables[THING])
        return self.findings

    def _compare_rows(
        self, what: str, surprises: int, rows: Iterable[Row], table: Iterable[Row]
    ) -> None:
        if stale := differing(rows, table):
            self.findings.note(f"{self.name}: {what}: {stale} rows differ from the table")
        if surprises:
            self.findings.note(f"{self.name}: {what}: {surprises} changes did not apply")
        self.findings.stale += surprises + stale

    def _leave_batch(self) -> None:
        """Compare the received part of a batch within which the client loads again."""
        batch = self._batch
        if batch is not None and batch.contents:
            assert batch.until is not None
            if self._log.knows(batch.until):
                expected = self._log.between(batch.since, batch.until)
                expected = [change for change in expected if change[0] <= batch.ids[-1]]
                where = f"before the list, {batch.since.end} to {batch.until.end}"
                self._compare(expected, batch, where)

    def _compare(self, expected: list[tuple[int, int]], got: Batch, where: str) -> None:
        compare(self.findings, f"{self.name}: {where}", self._log, expected, got.contents, got.ids)
