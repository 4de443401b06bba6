"""What the live feed knows of a subscriber: how to write to it, and why it is closed."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

from app.feed.health import Outage
from app.feed.log import Page
from app.feed.offset import Epoch
from app.live.events import Event, PageEvents
from app.live.refusal import SubscriptionRefused
from app.live.subscription import Request, Subscription

Message: TypeAlias = Any
"""What one kind of transport writes."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """Makes messages: of a page, and of an outage (None: changes arrive).

    Subscribers with the same encoder share the messages.
    """

    page: Callable[[Page, Epoch], Message]
    state: Callable[[Outage | None], Message]


class SubscriptionEncoder(Protocol):
    """Makes the messages of subscriptions. Those with equal encoders, which can be keys of a
    dictionary, share the messages.
    """

    def events(self, events: Sequence[Event], page: PageEvents) -> Message:
        """Encode events of a page."""

    def rows(self, rows: bytes) -> Message:
        """Encode part of a snapshot: rows as JSON in UTF-8, joined by commas."""

    def loaded(self, offset: str) -> Message:
        """Encode that the snapshot is complete."""

    def quiet(self, offset: str) -> Message:
        """Encode that nothing has happened up to an offset."""

    def state(self, outage: Outage | None) -> Message:
        """Encode whether changes arrive."""


UNLIMITED = 2**63
"""No limit."""


class CloseReason(StrEnum):
    """Why a connection was closed: the same member in the log, in metrics and in tests."""

    CLIENT_CLOSED = "the client closed it"
    CONNECTION_LOST = "the connection was lost"
    HEARTBEAT_MISSED = "no heartbeat was answered in time"
    NO_CONNECT = "no CONNECT came in time"
    PROTOCOL_ERROR = "the client broke the protocol"
    TOO_MANY_MESSAGES = "the client sent too many messages"
    POLLED_TWICE = "a poll came twice"
    STALLED = "the client reads nothing"
    HISTORY_LOST = "the log no longer holds what the client missed"
    NEW_HISTORY = "the log began another history"
    DATABASE_AWAY = "the database is away"
    INTERNAL_ERROR = "an internal error"
    SERVER_STOPS = "the server stops"


class Transport(Protocol):
    """A way to a subscriber. Only `drained` waits."""

    def try_write(self, message: Message, limit_bytes: int) -> bool:
        """Write unless more than `limit_bytes` are unsent; return whether the subscriber kept up.

        Once closed, nothing is written.
        """

    def unsent_bytes(self) -> int:
        """Return how many bytes have been written but not sent."""

    def progress(self) -> int:
        """Return a number that grows whenever the client reads, whatever is written meanwhile."""

    async def drained(self) -> None:
        """Wait until little is unsent or the transport is closed. Waiting tasks take turns: one
        that has written goes to the end of the queue.
        """

    def close(self, reason: CloseReason) -> None:
        """Disconnect. The owner of the transport then calls `Broadcast.leave`."""


class Greeting(Protocol):
    """Greets a subscriber over its transport, whose type it knows. All methods return at once."""

    def hold(self, transport: Any) -> None:
        """Accept the subscriber before it is known where it continues."""

    def welcome(
        self, transport: Any, recovered: bool, offset: str, key: Sequence[str] | None = None
    ) -> None:
        """Tell the subscriber its offset, and whether it continues where it was or must load again.

        `key`: the key columns of the table it asks for. Called again when a live subscriber must
        load again.
        """

    def refuse(self, transport: Any, refused: SubscriptionRefused) -> None:
        """Tell the subscriber that it gets nothing, or nothing more. The owner of the transport
        forgets it and calls `Broadcast.leave`.
        """


class Subscriber:
    """One client in one namespace. `task`: the one that judges its offset or replays to it, if any.

    `request`: what it asks for, None for all changes of all topics; then there is no `subscription`
    either, and `encode` is an Encoder. `told`: the outage it was last told about; None if there was
    none, or it was told that it is over.
    """

    __slots__ = ("encode", "greeting", "request", "subscription", "task", "told", "transport")

    def __init__(
        self, transport: Transport, encode: Any, greeting: Greeting, request: Request | None = None
    ) -> None:
        self.transport = transport
        self.encode = encode
        self.greeting = greeting
        self.request = request
        self.subscription: Subscription | None = None
        self.task: asyncio.Task[None] | None = None
        self.told: Outage | None = None
