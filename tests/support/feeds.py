"""A feed without sockets: what it publishes is recorded and checked."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from app.feed.feed import Feed
from app.feed.health import Outage
from app.feed.log import Page
from app.feed.offset import Epoch, Offset

WAIT_S = 20.0


async def eventually(true: Callable[[], object], seconds: float = WAIT_S) -> None:
    """Wait until something holds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


class Recorder:
    """A publisher that records what it receives; each page must continue the last one."""

    def __init__(self, keep: bool = True) -> None:
        self.histories: list[Epoch] = []
        self.pages: list[Page] = []
        self.states: list[Outage | None] = []
        self.published = 0  # changes
        self.out_of_order = 0
        self._keep = keep
        self._end: Offset | None = None
        self._last_id = 0

    def started(self, epoch: Epoch, end: Offset) -> None:
        self.histories.append(epoch)
        self._end = end

    def publish(self, page: Page) -> None:
        assert page.since == self._end, "a page does not begin where the last one ended"
        self._last_id = 0 if page.since.until is None else self._last_id
        for change in page.changes:
            self.out_of_order += change.id <= self._last_id
            self._last_id = change.id
        self._end = page.until
        self.published += len(page.changes)
        if self._keep:
            self.pages.append(page)

    def state_changed(self, outage: Outage | None) -> None:
        self.states.append(outage)

    @property
    def bodies(self) -> list[str | None]:
        """The bodies the events would carry."""
        return [change.body for page in self.pages for change in page.changes]

    @property
    def ids(self) -> list[int]:
        """The ids of the changes, in the order they were published."""
        return [change.id for page in self.pages for change in page.changes]

    async def until(self, changes: int) -> None:
        """Wait until this many changes have been published."""
        await eventually(lambda: self.published >= changes)


@asynccontextmanager
async def following(url: str, keep: bool = True) -> AsyncIterator[tuple[Feed, Recorder]]:
    """A feed that has begun to follow the log of a database."""
    recorder = Recorder(keep)
    feed = Feed(url)
    task = asyncio.create_task(feed.run(recorder), name="feed")
    try:
        await eventually(lambda: feed.trouble() is None and recorder.histories)
        yield feed, recorder
    finally:
        ended_by_itself = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert not ended_by_itself, task
