"""Sends an offset to subscribers that receive nothing, before the log loses what follows their old
one.
"""

from app.deadlines import Deadlines
from app.feed.feed import Feed
from app.live.audience import Group
from app.live.subscriber import UNLIMITED


class QuietOffsets:
    """Sends `feed:offset` to groups of live subscribers that were sent nothing for `seconds`, or
    while `changes` changes were read.
    """

    def __init__(self, feed: Feed, seconds: float, changes: int) -> None:
        self._feed = feed
        self._due: Deadlines[Group] = Deadlines(seconds, self._tell)
        self._most_changes = changes
        self._changes = 0

    def begin(self, group: Group) -> None:
        """Start or restart the wait of a group: it is new, or was just sent something."""
        self._due.add(group)

    def end(self, group: Group) -> None:
        """Forget a group: it has no members any more."""
        self._due.remove(group)

    def count(self, changes: int) -> None:
        """Count changes that were read."""
        self._changes += changes
        if self._changes >= self._most_changes:
            self._changes = 0
            self._due.expire_all()

    def _tell(self, group: Group) -> None:
        """Send a group its offset, unless it has it."""
        epoch, reached = self._feed.epoch, self._feed.reached
        assert epoch is not None and reached is not None
        if group.told != reached:
            group.told = reached
            message = group.encode.quiet(epoch.format(reached))
            for transport in group.members:
                transport.try_write(message, UNLIMITED)
        self._due.add(group)
