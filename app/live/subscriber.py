"""What the live feed knows of a subscriber: how to write to it, and why it is closed."""

import asyncio
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

from app.feed.log import Page
from app.feed.offset import Epoch

Message: TypeAlias = Any
"""A page as one kind of transport writes it."""

Encoder: TypeAlias = Callable[[Page, Epoch], Message]
"""Makes a message of a page. Subscribers with the same encoder share the message."""


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

        Once closed, nothing is written and the result is True.
        """

    def unsent_bytes(self) -> int:
        """How much has been written that the client has not read."""

    async def drained(self) -> None:
        """Wait until little is unsent, or until the transport is closed."""

    def close(self, reason: CloseReason) -> None:
        """Disconnect. The owner of the transport then calls `Broadcast.leave`."""


class Subscriber:
    """One client's subscription. `task` judges its offset or replays to it, while one does."""

    __slots__ = ("encode", "task", "transport")

    def __init__(self, transport: Transport, encode: Encoder) -> None:
        self.transport = transport
        self.encode = encode
        self.task: asyncio.Task[None] | None = None


Welcome: TypeAlias = Callable[[Transport, bool, str], None]
"""Called once: the transport to greet by, whether the client continues where it was, its offset."""
