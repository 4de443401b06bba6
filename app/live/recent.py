"""Parts sent lately, by the offset they begin at: most returning clients need no query."""

from functools import cached_property

from app.feed.log import Page
from app.feed.offset import Epoch, Offset
from app.socketio import frames
from app.socketio.frames import Frames

RECENT_BYTES = 8 * 1024 * 1024
# What keeping a part takes beside its texts, and a change beside its own.
PART_BYTES = 1_500
CHANGE_BYTES = 60


class Part:
    """A page as frames."""

    def __init__(self, page: Page, epoch: Epoch) -> None:
        self.since = page.since
        self.until = page.until
        self.frames = frames.changes(page, epoch)
        self.bytes = PART_BYTES + CHANGE_BYTES * len(page.changes) + 2 * self.frames.length
        self._written, self._read = page.written, page.read

    @cached_property
    def timed_frames(self) -> Frames:
        """For clients that asked when what comes was written."""
        return frames.timing(self._written, self._read) + self.frames


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
        self._bytes += part.bytes
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
            self._bytes -= part.bytes
