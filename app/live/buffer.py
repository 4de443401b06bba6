"""Messages that many subscribers share, and the replay buffer: the pages sent last, by the offset
they begin at.
"""

from typing import Any

from app.feed.health import Outage
from app.feed.log import Page
from app.feed.offset import Epoch, Offset
from app.live.events import PageEvents
from app.live.subscriber import Encoder, Message, SubscriptionEncoder

BUFFER_BYTES = 12 * 1024 * 1024
# What a page takes in addition to its changes, and a change in addition to its row, which is kept
# as it was read and in two encodings.
PAGE_OVERHEAD_BYTES = 1_500
CHANGE_OVERHEAD_BYTES = 500
COPIES = 3


class EncodedPage:
    """A page, and what each encoder made of it: once, however many subscribers share it."""

    __slots__ = ("_epoch", "_messages", "_page", "bytes", "since", "until")

    def __init__(self, page: Page, epoch: Epoch) -> None:
        self.since = page.since
        self.until = page.until
        self.bytes = PAGE_OVERHEAD_BYTES + sum(
            CHANGE_OVERHEAD_BYTES + COPIES * len(change.body or "") + len(change.old or "")
            for change in page.changes
        )
        self._page, self._epoch = page, epoch
        self._messages: dict[Encoder, Message] = {}

    def message(self, encode: Encoder) -> Message:
        """Return the page as this encoder writes it."""
        message = self._messages.get(encode)
        if message is None:
            message = self._messages[encode] = encode.page(self._page, self._epoch)
        return message

    def events(self) -> PageEvents:
        """Return what the page means to subscriptions. It is not kept: it may take more memory than
        the page.
        """
        return PageEvents(self._page, self._epoch, self.bytes)


class EncodedState:
    """Whether changes arrive, and what each encoder made of it."""

    __slots__ = ("_messages", "outage")

    def __init__(self, outage: Outage | None) -> None:
        self.outage = outage
        self._messages: dict[Any, Message] = {}

    def message(self, encode: Encoder | SubscriptionEncoder) -> Message:
        """Return the state as this encoder writes it."""
        message = self._messages.get(encode)
        if message is None:
            message = self._messages[encode] = encode.state(self.outage)
        return message


class ReplayBuffer:
    """The latest pages: most returning clients find here what they missed."""

    def __init__(self) -> None:
        self._pages: dict[Offset, EncodedPage] = {}
        self._bytes = 0

    def __contains__(self, offset: Offset) -> bool:
        return offset in self._pages

    def add(self, page: EncodedPage) -> None:
        """Keep a page. An empty one leads from an offset to itself and is not kept."""
        if page.since == page.until:
            return
        self._remove(page.since)
        self._pages[page.since] = page
        self._bytes += page.bytes
        while self._bytes > BUFFER_BYTES and len(self._pages) > 1:
            self._remove(next(iter(self._pages)))

    def run(self, offset: Offset, limit_bytes: int) -> list[EncodedPage]:
        """Return consecutive pages from an offset on, up to `limit_bytes` together; the first one
        whatever its size.
        """
        found: list[EncodedPage] = []
        total = 0
        while (page := self._pages.get(offset)) is not None:
            total += page.bytes
            if found and total > limit_bytes:
                break
            found.append(page)
            offset = page.until
        return found

    def clear(self) -> None:
        """Forget every page."""
        self._pages.clear()
        self._bytes = 0

    def _remove(self, offset: Offset) -> None:
        page = self._pages.pop(offset, None)
        if page is not None:
            self._bytes -= page.bytes
