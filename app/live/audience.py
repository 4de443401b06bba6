"""Who gets what: the live subscribers, in groups that get the same messages, and the index that
finds the groups a change concerns.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from app.feed.offset import Offset
from app.live.buffer import EncodedPage
from app.live.condition import Unjudgeable
from app.live.events import TopicChanges
from app.live.kinds import Value
from app.live.subscriber import Encoder, Subscriber, SubscriptionEncoder, Transport
from app.live.subscription import Subscription
from app.live.table import Table


class Group:
    """Live subscribers with the same subscription in the same namespace.

    `told`: the offset of the last message they were all sent; None if the feed never reaches that
    one. Members are keyed by transport: reaching the transport through the subscriber would cost
    cache misses, a few percent of what the kernel takes to send.
    """

    __slots__ = ("encode", "members", "subscription", "told")

    def __init__(self, subscription: Subscription, encode: SubscriptionEncoder) -> None:
        self.subscription = subscription
        self.encode = encode
        self.members: dict[Transport, Subscriber] = {}
        self.told: Offset | None = None


class ValueIndex:
    """The groups whose filters ask for certain values of one column of a table; possibly for none
    (`in.()`).
    """

    def __init__(self, table: Table, column: str) -> None:
        self._table = table
        self._column = column
        self._all: dict[Group, None] = {}
        self._groups: dict[Value, dict[Group, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, group: Group, values: Iterable[Value]) -> None:
        self._all[group] = None
        for value in values:
            self._groups.setdefault(value, {})[group] = None

    def discard(self, group: Group, values: Iterable[Value]) -> None:
        del self._all[group]
        for value in values:
            groups = self._groups[value]
            del groups[group]
            if not groups:
                del self._groups[value]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._all)

    def concerned(self, changes: TopicChanges) -> dict[Group, list[int]]:
        """Return the numbers of the changes that each group must look at. Raises Unjudgeable."""
        found: dict[Group, list[int]] = {}
        for number, values in enumerate(changes.values(self._table, self._column)):
            for group in {group for value in values for group in self._groups.get(value, ())}:
                found.setdefault(group, []).append(number)
        return found


class TopicIndex:
    """The groups of one topic: indexed by the values that their filters ask for, or scanned."""

    def __init__(self) -> None:
        self._scanned: dict[Group, None] = {}
        self._indexes: dict[tuple[int, str], ValueIndex] = {}

    def __bool__(self) -> bool:
        return bool(self._scanned or self._indexes)

    def __iter__(self) -> Iterator[Group]:
        yield from self._scanned
        for index in self._indexes.values():
            yield from index

    def add(self, group: Group) -> None:
        """Start looking for changes that concern a group."""
        table, equality = group.subscription.table, group.subscription.condition.equality
        if equality is None:
            self._scanned[group] = None
            return
        column, values = equality
        place = (id(table), column)
        if place not in self._indexes:
            self._indexes[place] = ValueIndex(table, column)
        self._indexes[place].add(group, values)

    def discard(self, group: Group) -> None:
        """Stop looking for changes that concern a group, which must be in here."""
        table, equality = group.subscription.table, group.subscription.condition.equality
        if equality is None:
            del self._scanned[group]
            return
        column, values = equality
        place = (id(table), column)
        self._indexes[place].discard(group, values)
        if not self._indexes[place]:
            del self._indexes[place]

    def concerned(self, changes: TopicChanges) -> Iterator[tuple[Group, Iterable[int]]]:
        """Yield the groups that changes may concern, each with the numbers of these changes."""
        everything = range(len(changes))
        if not changes.is_ordinary:
            yield from ((group, everything) for group in self)
            return
        yield from ((group, everything) for group in self._scanned)
        for index in self._indexes.values():
            try:
                yield from index.concerned(changes).items()
            except Unjudgeable:  # each group finds out for itself
                yield from ((group, everything) for group in index)


@dataclass(slots=True)
class Sent:
    """The result of sending a page: the groups it went to, the subscribers that were too slow for
    it, and those that have to load their rows again. The latter two must not stay live.
    """

    groups: list[Group] = field(default_factory=list)
    slow: list[Subscriber] = field(default_factory=list)
    reloading: list[Subscriber] = field(default_factory=list)


class Audience:
    """The live subscribers: sends every page to those it concerns."""

    def __init__(self) -> None:
        self._whole: dict[Encoder, dict[Transport, Subscriber]] = {}
        self._groups: dict[tuple[Subscription, SubscriptionEncoder], Group] = {}
        self._topics: dict[str, TopicIndex] = {}

    def __len__(self) -> int:
        groups = sum(len(group.members) for group in self._groups.values())
        return groups + sum(map(len, self._whole.values()))

    def __iter__(self) -> Iterator[Subscriber]:
        for members in self._whole.values():
            yield from members.values()
        for group in self._groups.values():
            yield from group.members.values()

    @property
    def groups(self) -> Iterable[Group]:
        """The groups of subscriptions."""
        return self._groups.values()

    def add(self, subscriber: Subscriber) -> Group | None:
        """Send every page to a subscriber from now on. Return the group that begins with it."""
        if subscriber.subscription is None:
            self._whole.setdefault(subscriber.encode, {})[subscriber.transport] = subscriber
            return None
        place = (subscriber.subscription, subscriber.encode)
        group = self._groups.get(place)
        begins = group is None
        if group is None:
            group = self._groups[place] = Group(*place)
            topic = subscriber.subscription.table.topic
            self._topics.setdefault(topic, TopicIndex()).add(group)
        group.members[subscriber.transport] = subscriber
        return group if begins else None

    def discard(self, subscriber: Subscriber) -> Group | None:
        """Stop sending to a subscriber; no error if it is not in here. Return the group that ends
        with it.
        """
        if subscriber.subscription is None:
            members = self._whole.get(subscriber.encode)
            if members is not None:
                members.pop(subscriber.transport, None)
                if not members:
                    del self._whole[subscriber.encode]
            return None
        group = self._groups.get((subscriber.subscription, subscriber.encode))
        if group is None or group.members.get(subscriber.transport) is not subscriber:
            return None
        del group.members[subscriber.transport]
        if group.members:
            return None
        del self._groups[group.subscription, group.encode]
        topic = group.subscription.table.topic
        self._topics[topic].discard(group)
        if not self._topics[topic]:
            del self._topics[topic]
        return group

    def send(self, page: EncodedPage, limit_bytes: int) -> Sent:
        """Send a page to those it concerns, but not to subscribers with more than `limit_bytes`
        unsent.
        """
        sent = Sent()
        for encode, members in self._whole.items():
            message = page.message(encode)
            for transport in members:
                if not transport.try_write(message, limit_bytes):
                    sent.slow.append(members[transport])
        if self._topics:
            self._send_events(page, limit_bytes, sent)
        return sent

    def _send_events(self, page: EncodedPage, limit_bytes: int, sent: Sent) -> None:
        events = page.events()
        for topic, changes in events.topics.items():
            index = self._topics.get(topic)
            if index is None:
                continue
            for group, numbers in index.concerned(changes):
                found = changes.events(group.subscription, numbers)
                if found is None:
                    sent.reloading.extend(group.members.values())
                elif found:
                    message = group.encode.events(found, events)
                    group.told = events.until(found)
                    sent.groups.append(group)
                    for transport in group.members:
                        if not transport.try_write(message, limit_bytes):
                            sent.slow.append(group.members[transport])
