"""Parts sent lately, by the offset they begin at: most returning clients need no query."""

from functools import cached_property

from app.feed.log import Page
from app.feed.offset import Epoch, Offset
from app.sockets import frames
from app.sockets.frames import Frames

RECENT_BYTES = 8 * 1024 * 1024
# What a change costs beside its text: the objects, and the frame around it.
OVERHEAD_BYTES = 300


class Part:
    """A page, and its frames once somebody wants them."""

    def __init__(self, page: Page, epoch: Epoch) -> None:
        self.since = page.since
        self.until = page.until
        self.bytes = sum(OVERHEAD_BYTES + len(change.body or "") for change in page.changes)
        self._page = page
        self._epoch = epoch

    @cached_property
    def frames(self) -> Frames:
        return frames.changes(self._page, self._epoch)

    @cached_property
    def timed_frames(self) -> Frames:
        """For clients that asked when what comes was written."""
        return frames.timing(self._page) + self.frames


class Recent:
    """Parts by where they begin; the oldest go when there are too many."""

    def __init__(self) -> None:
        self._parts: dict[Offset, Part] = {}
        self._bytes = 0

    def add(self, part: Part) -> None:
        if part.since == part.until:
            return
        self._remove(part.since)
        self._parts[part.since] = part
        self._bytes += part.bytes + OVERHEAD_BYTES
        while self._bytes > RECENT_BYTES and len(self._parts) > 1:
            self._remove(next(iter(self._parts)))

    def get(self, offset: Offset) -> Part | None:
        """The part that begins at an offset."""
        return self._parts.get(offset)

    def run(self, offset: Offset, most_bytes: int) -> list[Part]:
        """Parts that follow each other from an offset on, of so many bytes together at most
        (the first one whatever its size).
        """
        found: list[Part] = []
        total = 0
        while (part := self.get(offset)) is not None:
            total += part.bytes
            if found and total > most_bytes:
                break
            found.append(part)
            offset = part.until
        return found

    def clear(self) -> None:
        self._parts.clear()
        self._bytes = 0

    def _remove(self, offset: Offset) -> None:
        part = self._parts.pop(offset, None)
        if part is not None:
            self._bytes -= part.bytes + OVERHEAD_BYTES
