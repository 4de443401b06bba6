"""Counts what messages that have not come in full hold, so that all together hold little."""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Unfinished(Generic[T]):
    """Bytes by who has sent them. Beyond `most_bytes` the oldest give way, because an honest
    message is complete in a moment.
    """

    def __init__(self, most_bytes: int, give_way: Callable[[T], None]) -> None:
        self._most_bytes = most_bytes
        self._give_way = give_way
        self._held: dict[T, int] = {}  # the oldest first
        self._bytes = 0

    def hold(self, sender: T, more_bytes: int) -> None:
        """Count bytes of an unfinished message. Its sender may be the one to give way."""
        self._held[sender] = self._held.get(sender, 0) + more_bytes
        self._bytes += more_bytes
        while self._bytes > self._most_bytes:
            oldest = next(iter(self._held))
            self.release(oldest)
            self._give_way(oldest)

    def release(self, sender: T) -> None:
        """The message has come in full, or never will."""
        self._bytes -= self._held.pop(sender, 0)
