"""Compares what a client received in its namespaces with what it had to receive."""

from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.faults.checker import CLOSING, Findings, Row, Snapshot, compare, differing, identity
from tests.faults.expected import Expected, ExpectedLog, Place
from tests.faults.subscriptions import Asked, content, fingerprint

LOADING = "loading"


@dataclass
class Run:
    """Events whose offsets are in the same batch, or none and a quiet offset."""

    log: ExpectedLog
    since: Place
    until: Place
    contents: "array[int]" = field(default_factory=lambda: array("q"))
    ids: "array[int]" = field(default_factory=lambda: array("q"))


class Receiver:
    """Processes what a client received in one namespace (the entries of subscribe.mjs).

    `alternatives`: what it asks for there, in turn.
    """

    def __init__(self, name: str, alternatives: Sequence[Asked], expected: Expected) -> None:
        self.name = name
        self.findings = Findings()
        self._alternatives = alternatives
        self._expected = expected
        self._asking: Asked | None = None  # with the last CONNECT
        self._has_changed = False  # it has asked for something else since the last hello
        self._held: Asked | None = None  # since the last hello
        self._marked: str | None = None  # its offset when it asked for something else last
        self._offset: str | None = None
        self._at: Place | None = None  # None while it loads
        self._rows: dict[tuple[Any, ...], Row] | None = None  # None: it cannot know them
        self._loading: dict[tuple[Any, ...], Row] | None = None
        self._runs: deque[Run] = deque()
        self._continues = False  # whether nothing was loaded since the last run

    @property
    def at(self) -> Place | None:
        """How far the client is."""
        return self._at

    @property
    def is_loading(self) -> bool:
        """Whether a snapshot has begun and not ended."""
        return self._loading is not None

    def take(self, entry: list[Any]) -> None:
        """Process the next entry."""
        match entry:
            case ["ask", number]:
                self._asking = self._alternatives[number]
                if self._asking != self._held:
                    self._has_changed, self._marked = True, self._offset
            case ["hello", recovered, offset, session_recovered]:
                self._greet(recovered, offset, session_recovered)
                self._offset, self._has_changed = offset, False
            case ["rows", rows]:
                self._load(rows)
            case ["loaded", offset]:
                self._loaded(offset)
            case ["offset", offset]:
                self._quiet(offset)
            case ["event", event, what, old, offset]:
                self._change(event, what, old, offset)
            case ["refused", data]:
                self._wrong("refused", f"refused: {data}")
            case _:
                raise AssertionError(entry)

    def _wrong(self, kind: str, text: str) -> None:
        setattr(self.findings, kind, getattr(self.findings, kind) + 1)
        self.findings.note(f"{self.name}: {text}")

    # The beginning

    def _greet(self, recovered: bool, offset: str, session_recovered: bool | None) -> None:
        self.findings.sessions += 1
        if recovered:
            self._resume(offset, session_recovered)
            return
        can_continue = self._offset not in (None, LOADING)
        if can_continue and not self._has_changed and self._offset == self._marked:
            self.findings.unneeded += 1
        elif can_continue and not self._has_changed:
            self._wrong("refused", f"had to load again at {self._offset}")
        self._held, self._continues = self._asking, False
        assert self._held is not None
        self._rows = self._at = self._loading = None
        if self._held.snapshot:
            self._loading = {}
        else:
            self._at = Place.of(offset)

    def _resume(self, offset: str, session_recovered: bool | None) -> None:
        if self._asking != self._held:
            self._wrong("stale", f"continues at {offset} with the rows of another subscription")
            self._held, self._continues = self._asking, False
        if self._at is None:
            self._wrong("lost", f"continues at {offset} although its snapshot was not complete")
            self._rows, self._loading, self._at = self._loading or {}, None, Place.of(offset)
        elif offset != self._offset:
            self._wrong("disordered", f"was at {self._offset}, but continues at {offset}")
        elif session_recovered is False:
            self._wrong("refused", f"continues at {offset}, but socket.recovered is false")

    def _load(self, rows: list[Row]) -> None:
        if self._loading is None:
            self._wrong("phantom", "rows that nothing announced")
            return
        assert self._held is not None
        for row in rows:
            if identity(row) in self._loading:
                self._wrong("doubled", f"twice in a snapshot: {identity(row)}")
            self._loading[identity(row)] = row

    def _loaded(self, offset: str) -> None:
        if self._loading is None:
            self._wrong("phantom", "the end of a snapshot that nothing announced")
            return
        self._offset, self._at = offset, Place.of(offset)
        self._rows, self._loading = self._loading, None
        self.findings.loads += 1

    # Changes

    def _change(self, event: str, what: Any, old: Row | None, offset: str) -> None:
        self.findings.events += 1
        if self._at is None:
            self._wrong("phantom", f"{event} before the snapshot is complete")
            return
        before = self._apply(event, what)
        run = self._run_to(Place.of(offset))
        run.contents.append(content(event, what, old, before))
        run.ids.append(run.until.id if run.until.until else CLOSING)
        self._offset = offset

    def _run_to(self, place: Place) -> Run:
        """Return the run that an event at a place belongs to."""
        assert self._at is not None and self._held is not None
        if not (self._continues and self._runs and self._runs[-1].until.end == place.end):
            self._runs.append(Run(self._expected.logs[self._held], self._at, place))
        self._at = self._runs[-1].until = place
        self._continues = True
        return self._runs[-1]

    def _quiet(self, offset: str) -> None:
        if self._at is None:
            self._wrong("phantom", f"a quiet offset {offset} before the snapshot is complete")
            return
        self._run_to(Place.of(offset))
        self._offset = offset
        self.findings.quiet += 1

    def _apply(self, event: str, what: Any) -> int | None:
        """Apply an event to the rows; return what stands for the row before it."""
        op = event.partition(":")[2]
        rows = self._rows
        assert self._held is not None
        if op == "truncate":
            if rows is not None:
                rows.clear()
            return None
        if rows is None:
            return None
        before = rows.pop(identity(what), None)
        if (before is None) != (op == "create"):
            self._wrong("stale", f"{event} does not apply: {identity(what)}")
        if op != "destroy":
            rows[identity(what)] = what
        return fingerprint(before) if self._held.snapshot else None

    def judge(self) -> None:
        """Compare as far as the log is known."""
        while self._runs and self._runs[0].log.knows(self._runs[0].until.end):
            self._compare(self._runs.popleft())

    def _compare(self, run: Run) -> None:
        expected = run.log.after(run.since, run.until)
        where = f"{run.since.end.end} to {run.until.end.end}"
        compare(self.findings, f"{self.name}: {where}", run.log, expected, run.contents, run.ids)

    @property
    def needed(self) -> Iterator[Place]:
        """From where the log is needed."""
        if self._runs:
            yield self._runs[0].since
        elif self._at is not None:
            yield self._at

    # The end

    def has_reached(self, xid: int) -> bool:
        """Return whether the client has received everything up to a transaction that was alone."""
        return self._at is not None and self._at.position.sees(xid)

    def finish(self, now: Snapshot, rows: Mapping[Asked, Sequence[str]]) -> Findings:
        """Compare with the end of the log and with the table."""
        self.judge()
        if self._at is None or self._held is None:
            self._wrong("lost", "never got its rows")
            return self.findings
        self._compare(Run(self._expected.logs[self._held], self._at, Place(now)))
        if self._rows is not None:
            true = [self._held.seen(msgspec.json.decode(row)) for row in rows[self._held]]
            if stale := differing(self._rows.values(), true):
                self.findings.stale += stale
                self.findings.note(f"{self.name}: {stale} rows differ from {self._held}")
        return self.findings


class Subscriber:
    """Processes what one client received in all its namespaces."""

    def __init__(
        self, name: str, namespaces: Mapping[str, Sequence[Asked]], expected: Expected
    ) -> None:
        self.name = name
        self.receivers = {
            namespace: Receiver(f"{name} {namespace}", alternatives, expected)
            for namespace, alternatives in namespaces.items()
        }

    @property
    def findings(self) -> Findings:
        return sum((receiver.findings for receiver in self.receivers.values()), Findings())

    @property
    def sessions(self) -> int:
        """How often it was greeted in each namespace, at least."""
        return min(receiver.findings.sessions for receiver in self.receivers.values())

    def take(self, entry: list[Any]) -> None:
        """Process the next entry, which begins with the namespace."""
        namespace, *rest = entry
        self.receivers[namespace].take(rest)

    def judge(self) -> None:
        """Compare as far as the log is known."""
        for receiver in self.receivers.values():
            receiver.judge()

    def has_reached(self, xid: int) -> bool:
        """Return whether it has received everything up to a transaction, in all namespaces."""
        return all(receiver.has_reached(xid) for receiver in self.receivers.values())

    def finish(self, now: Snapshot, rows: Mapping[Asked, Sequence[str]]) -> Findings:
        """Compare with the end of the log and with the tables."""
        for receiver in self.receivers.values():
            receiver.finish(now, rows)
        return self.findings
