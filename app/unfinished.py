"""A limit on the memory that all incomplete messages take together."""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Unfinished(Generic[T]):
    """Counts bytes by sender. When they exceed `most_bytes` in total, `give_way` is called with the
    oldest sender: an honest one completes its message in a moment.
    """

    def __init__(self, most_bytes: int, give_way: Callable[[T], None]) -> None:
        self._most_bytes = most_bytes
        self._give_way = give_way
        self._held: dict[T, int] = {}  # oldest first
        self._bytes = 0

    def hold(self, sender: T, more_bytes: int) -> None:
        """Count more bytes of an incomplete message. Its own sender may have to give way."""
        self._held[sender] = self._held.get(sender, 0) + more_bytes
        self._bytes += more_bytes
        while self._bytes > self._most_bytes:
            oldest = next(iter(self._held))
            self.release(oldest)
            self._give_way(oldest)

    def release(self, sender: T) -> None:
        """Stop counting a sender: the message is complete, or the connection is closed."""
        self._bytes -= self._held.pop(sender, 0)
