"""What a page of changes means to subscriptions: which of its changes are events for them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from app.feed.log import TOO_LARGE, Change, Page
from app.feed.offset import Epoch, Offset
from app.live.condition import RowValues, Unjudgeable
from app.live.kinds import Value
from app.live.subscription import Subscription
from app.live.table import Table

# A page keeps the events of subscriptions up to this multiple of its own size. The overhead is what
# an event takes in addition to the texts made for it.
SHARE_KEPT = 4
EVENT_OVERHEAD_BYTES = 200

Pair = tuple[RowValues | None, RowValues | None]


class Event(NamedTuple):
    """One change as a subscription sees it: `place` in the page, and the first two arguments of the
    event as JSON texts, None where it has none.
    """

    operation: str
    place: int
    body: str | None = None
    old: str | None = None


class TopicChanges:
    """The changes of one topic in a page, with what filters have read of their rows."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.places: list[int] = []
        self.must_load = False
        self._emptied: list[int] = []
        self._pairs: dict[int, list[Pair]] = {}
        self._indexes: dict[tuple[int, str], dict[Value, list[int]]] = {}

    def __len__(self) -> int:
        return len(self.changes)

    def add(self, place: int, change: Change) -> None:
        """Add the next change, which is at `place` in the page."""
        if change.op == "truncate":
            self._emptied.append(len(self.changes))
        elif change.op == "reload" or (change.op == "update" and change.old is None):
            self.must_load = True  # an update that an older version logged has no old row
        self.changes.append(change)
        self.places.append(place)

    @property
    def is_ordinary(self) -> bool:
        """Whether all changes are creates, updates and destroys that can be judged."""
        return not (self._emptied or self.must_load)

    def rows(self, number: int, table: Table) -> Pair:
        """Return the old and the new row of a change, read as rows of a table."""
        change = self.changes[number]
        return (
            _values(change.old, table, change.old_is_too_large),
            _values(change.new, table, change.new_is_too_large),
        )

    def pairs(self, table: Table) -> list[Pair]:
        """Return the rows of every change; the values read from them are kept."""
        found = self._pairs.get(id(table))
        if found is None:
            found = [self.rows(number, table) for number in range(len(self.changes))]
            self._pairs[id(table)] = found
        return found

    def values(self, table: Table, column: str) -> Iterator[set[Value]]:
        """For each change, yield the values of a column before and after. Raises Unjudgeable."""
        for pair in self.pairs(table):
            yield {row[column] for row in pair if row is not None}

    def _index(self, table: Table, column: str) -> dict[Value, list[int]]:
        """Return the changes that concern rows with each value of a column. Raises Unjudgeable."""
        index = self._indexes.get((id(table), column))
        if index is None:
            index = {}
            for number, values in enumerate(self.values(table, column)):
                for value in values:
                    index.setdefault(value, []).append(number)
            self._indexes[id(table), column] = index
        return index

    def concerning(self, subscription: Subscription) -> Iterable[int]:
        """Return the numbers of the changes that may concern a subscription. Raises Unjudgeable."""
        if subscription.condition.equality is None or len(self.changes) == 1:
            return range(len(self.changes))
        column, values = subscription.condition.equality
        index = self._index(subscription.table, column)
        numbers = {number for value in values for number in index.get(value, ())}
        return sorted(numbers.union(self._emptied))

    def events(
        self, subscription: Subscription, numbers: Iterable[int] | None = None
    ) -> list[Event] | None:
        """Return the events of some changes (None: of all); or None if what the subscription holds
        cannot be derived from them, so that it has to be loaded again.
        """
        if self.must_load:
            return None
        try:
            if numbers is None:
                numbers = self.concerning(subscription)
            return list(self._events(subscription, numbers))
        except Unjudgeable:
            return None

    def _events(self, subscription: Subscription, numbers: Iterable[int]) -> Iterator[Event]:
        """Judge changes. Filters without an equality run this loop for every change."""
        matches = subscription.condition.matches
        pairs = self.pairs(subscription.table)
        for number in numbers:
            old, new = pairs[number]
            was_in = old is not None and matches(old)
            if new is not None and matches(new):
                event = self._present(subscription, number, was_in)
                if event is not None:
                    yield event
            elif was_in:
                yield self._gone(subscription, number)
            elif old is None and new is None:
                yield Event("truncate", self.places[number])

    def _gone(self, subscription: Subscription, number: int) -> Event:
        """Return the event of a row that matched before and no longer does."""
        change = self.changes[number]
        assert change.old is not None
        before = None
        if subscription.old:
            before = subscription.shown(change.old, change.old_is_too_large)
        return Event("destroy", self.places[number], subscription.key_of(change.old), before)

    def _present(self, subscription: Subscription, number: int, was_in: bool) -> Event | None:
        """Return the event of a row that matches now; None if nothing selected has changed."""
        change, place = self.changes[number], self.places[number]
        assert change.new is not None
        after = subscription.shown(change.new, change.new_is_too_large)
        if not was_in:
            return Event("create", place, after)
        if subscription.columns is None and not subscription.old:
            return Event("update", place, after)
        assert change.old is not None
        before = subscription.shown(change.old, change.old_is_too_large)
        # What is left out of a row that is too large may have changed.
        is_part = change.new_is_too_large and after.endswith(TOO_LARGE)
        if before == after and not is_part:
            return None
        return Event("update", place, after, before if subscription.old else None)


def _values(row: str | None, table: Table, is_outline: bool) -> RowValues | None:
    return None if row is None else RowValues(row, table, is_outline)


class PageEvents:
    """A page of changes, by topic. `size`: what the page takes, in bytes."""

    def __init__(self, page: Page, epoch: Epoch, size: int) -> None:
        self.page = page
        self._epoch = epoch
        self._found: dict[Subscription, list[Event] | None] = {}
        self._room_bytes = self._most_bytes = SHARE_KEPT * size

    @cached_property
    def topics(self) -> dict[str, TopicChanges]:
        """The changes of each topic."""
        topics: dict[str, TopicChanges] = {}
        for place, change in enumerate(self.page.changes):
            changes = topics.get(change.topic)
            if changes is None:
                changes = topics[change.topic] = TopicChanges()
            changes.add(place, change)
        return topics

    def of(self, subscription: Subscription) -> list[Event] | None:
        """Return the events for a subscription; None if it has to be loaded again."""
        changes = self.topics.get(subscription.table.topic)
        if changes is None:
            return []
        if subscription not in self._found:
            events = changes.events(subscription)
            size = size_of(events or (), subscription)
            if size > self._room_bytes:
                self._found.clear()
                self._room_bytes = self._most_bytes
            self._found[subscription] = events
            self._room_bytes -= size
        return self._found[subscription]

    @cached_property
    def offset_at(self) -> Callable[[int], str]:
        """Formats the offset after the change at a place of the page."""
        return offsets(self.page, self._epoch)

    def until(self, events: Sequence[Event]) -> Offset | None:
        """Return the offset of clients that were sent these events if it is the end of the page and
        of a batch, else None: the feed never reaches an offset within a batch.
        """
        is_last = bool(events) and events[-1].place == len(self.page.changes) - 1
        return self.page.until if is_last and self.page.until.until is None else None


def size_of(events: Sequence[Event], subscription: Subscription) -> int:
    """Return roughly what the events of a subscription take, in bytes, without the page's rows."""
    size = EVENT_OVERHEAD_BYTES * (1 + len(events))
    if subscription.columns is not None:
        size += sum(len(event.body or "") + len(event.old or "") for event in events)
    return size


def offsets(page: Page, epoch: Epoch) -> Callable[[int], str]:
    """Return a function that formats the offset after the change at a place of a page."""
    until = page.until
    write_id = epoch.writer(page.since.position, until.until or until.position)
    ids: Sequence[int] = [change.id for change in page.changes]
    last = len(ids) - 1

    def offset_at(place: int) -> str:
        if place == last and until.until is None:
            return epoch.format(until)
        return write_id(ids[place])

    return offset_at
