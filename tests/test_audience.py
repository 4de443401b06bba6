"""The index of subscriptions: what a change costs does not depend on how many there are."""

from collections.abc import Iterable
from typing import Any

import pytest

from app.feed.log import Change, Page
from app.feed.offset import Epoch, Offset, Position
from app.live.audience import Audience
from app.live.buffer import EncodedPage
from app.live.condition import Condition, RowValues
from app.live.filter import parse_filter
from app.live.kinds import INTEGER
from app.live.subscriber import UNLIMITED, CloseReason, Subscriber
from app.live.subscription import EVERYBODY, Subscription
from app.live.table import Column, Table
from app.socketio.frames import Frames, NamespaceEncoder

EPOCH = Epoch("e", "secret")
TABLE = Table(
    "order",
    "public.orders",
    "matching",
    tuple(Column(name, "integer", INTEGER) for name in ("id", "customer_id")),
    ("id",),
    None,
)
MANY = 500
MOVED = Change(1, "order", "update", "", '{"id":1,"customer_id":8}', '{"id":1,"customer_id":7}')
CREATED = Change(2, "order", "create", "", '{"id":2,"customer_id":7}')
DESTROYED = Change(3, "order", "destroy", "", None, '{"id":1,"customer_id":8}')
TRUNCATED = Change(4, "order", "truncate", None)
WITHOUT_OLD = Change(5, "order", "update", "", '{"id":1,"customer_id":8}')


class Inbox:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def try_write(self, message: Frames, _: int) -> bool:
        self.events += [packet.partition('["order:')[2][:6] for packet in message.packets]
        return True

    def unsent_bytes(self) -> int:
        return 0

    def progress(self) -> int:
        return 0

    async def drained(self) -> None: ...
    def close(self, reason: CloseReason) -> None: ...


class Counted:
    """An audience of subscriptions to orders; it counts how often a filter is evaluated."""

    def __init__(self, filters: Iterable[str]) -> None:
        self.audience = Audience()
        self.evaluations = 0
        self.subscribers: list[Subscriber] = []
        self.inboxes = {where: Inbox() for where in filters}
        for where, inbox in self.inboxes.items():
            condition = Condition(TABLE, parse_filter(where))
            condition.matches = self.counting(condition.matches)
            subscriber = Subscriber(inbox, NamespaceEncoder("/order", False), NotGreeted())
            subscriber.subscription = Subscription(TABLE, condition, None, False, EVERYBODY)
            self.subscribers.append(subscriber)
            self.audience.add(subscriber)

    def counting(self, matches: Any) -> Any:
        def count(row: RowValues) -> bool:
            self.evaluations += 1
            return bool(matches(row))

        return count

    def send(self, *changes: Change) -> dict[str, list[str]]:
        """Send a page; return the events by filter. All others got none."""
        since, until = Offset(Position(1, frozenset())), Offset(Position(2, frozenset()))
        page = EncodedPage(Page(since, until, changes, written=0, read=0), EPOCH)
        self.reloading = self.audience.send(page, UNLIMITED).reloading
        return {where: inbox.events for where, inbox in self.inboxes.items() if inbox.events}


class NotGreeted:
    """Subscribers that are live already."""

    def hold(self, transport: Any) -> None: ...
    def welcome(self, transport: Any, recovered: bool, offset: str, key: Any = None) -> None: ...
    def refuse(self, transport: Any, refused: Any) -> None: ...


def by_customer(count: int) -> list[str]:
    """Filters that differ in the customer."""
    return [f"customer_id=eq.{number}" for number in range(count)]


@pytest.mark.parametrize("changes", [(MOVED,), (MOVED, CREATED, DESTROYED)])
def test_evaluations_do_not_grow_with_subscriptions(changes: tuple[Change, ...]) -> None:
    """A change is looked at by those who ask for the value that its row has or had."""
    few, many = Counted(by_customer(10)), Counted(by_customer(MANY))
    assert few.send(*changes) == many.send(*changes)
    assert few.evaluations == many.evaluations <= 4 * len(changes)


def test_the_right_ones_get_events() -> None:
    """An order moves from one customer to another; one is new, one is deleted."""
    counted = Counted(by_customer(MANY))
    assert counted.send(MOVED, CREATED, DESTROYED) == {
        "customer_id=eq.7": ["destro", "create"], "customer_id=eq.8": ["create", "destro"],
    }  # fmt: skip


@pytest.mark.parametrize("where", ["customer_id=in.()", "customer_id=in.()&id=gt.0"])
def test_filters_that_nothing_can_match(where: str) -> None:
    """Subscriptions to none of the values come and go beside others, and hear of a reload."""
    counted = Counted([where, "customer_id=eq.7"])
    assert list(counted.send(MOVED)) == ["customer_id=eq.7"]
    counted.send(WITHOUT_OLD)
    assert len(counted.reloading) == 2
    for subscriber in reversed(counted.subscribers):
        counted.audience.discard(subscriber)
    assert len(counted.audience) == 0 and not list(counted.audience.groups)


def test_others_are_evaluated() -> None:
    """A filter without a value to look up is evaluated for the old and the new row of a change."""
    counted = Counted([*by_customer(MANY), "id=gt.0", "id=gt.1"])
    assert counted.send(MOVED)["id=gt.0"] == ["update"]
    assert counted.evaluations == 4 + 2 * 2


def test_a_truncate_concerns_everybody() -> None:
    """Nobody's filter is asked."""
    counted = Counted(by_customer(MANY))
    assert len(counted.send(TRUNCATED)) == MANY
    assert counted.evaluations == 0


def test_an_update_without_its_old_row_concerns_everybody() -> None:
    """Whose row it was cannot be told, so everybody loads again."""
    counted = Counted(by_customer(MANY))
    assert counted.send(WITHOUT_OLD) == {}
    assert len(counted.reloading) == MANY
