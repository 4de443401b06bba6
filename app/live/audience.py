"""The live subscribers, and the loop that sends each page to them."""

from collections.abc import Iterator

from app.live.buffer import EncodedPage
from app.live.subscriber import Encoder, Subscriber, Transport


class Audience:
    """Sends every page to every subscriber in it.

    Subscribers are keyed by transport: reaching the transport through the subscriber would cost
    cache misses, a few percent of what the kernel takes to send.
    """

    def __init__(self) -> None:
        self._members: dict[Encoder, dict[Transport, Subscriber]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._members.values()))

    def __iter__(self) -> Iterator[Subscriber]:
        for members in self._members.values():
            yield from members.values()

    def add(self, subscriber: Subscriber) -> None:
        """From now on the subscriber gets every page."""
        self._members.setdefault(subscriber.encode, {})[subscriber.transport] = subscriber

    def discard(self, subscriber: Subscriber) -> None:
        """Stop sending to a subscriber; no error if it was not in here."""
        members = self._members.get(subscriber.encode)
        if members is not None:
            members.pop(subscriber.transport, None)
            if not members:
                del self._members[subscriber.encode]

    def send(self, page: EncodedPage, limit_bytes: int) -> list[Subscriber]:
        """Send a page, but not to subscribers with more than `limit_bytes` unsent: those are taken
        out and returned.
        """
        slow = []
        for encode, members in self._members.items():
            message = page.message(encode)
            for transport in members:
                if not transport.try_write(message, limit_bytes):
                    slow.append(members[transport])
        for subscriber in slow:
            self.discard(subscriber)
        return slow
