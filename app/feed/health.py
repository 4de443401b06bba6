"""Decides whether changes arrive, given what happened and when.

Times are seconds on one monotonic clock, unless stated otherwise. Nothing here waits.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

# A connection that is lost and replaced within this time is not worth mentioning.
GRACE_S = 0.5
# A feed reads at least once every LOOK_S (pacing.py): 1 second. With the time the news takes to
# reach a client, an outage is known within two seconds.
SILENT_S = 1.75
# The database answers, but the end of the log has not been reached for this long.
BEHIND_S = 5.0

SILENT = "The database cannot be reached: it does not answer."
BEHIND = "The log has not been read to its end for some seconds."
DEAF = "Changes arrive late: notifications do not reach the server's connection to the database."


@dataclass(frozen=True, slots=True)
class Outage:
    """Changes do not arrive: the rows are as of `since`, in milliseconds since 1970 by the
    database's clock. `reason` is a sentence for anybody to read.
    """

    since: int
    reason: str

    @property
    def is_absence(self) -> bool:
        """Whether the database cannot be read."""
        return self.reason not in (BEHIND, DEAF)

    @property
    def since_text(self) -> str:
        """`since` in ISO 8601."""
        time = datetime.fromtimestamp(self.since / 1000, UTC)
        return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class FeedHealth:
    """Decides when trouble becomes an outage. An outage ends only when the log has been read to its
    end.

    `as_of`: when it had last been read to its end, in milliseconds since 1970.
    """

    def __init__(self, now: float, as_of: int) -> None:
        self.outage: Outage | None = None
        self.as_of = as_of
        self._failure: str | None = None
        self._failed_at = now
        self._answered_at = self._completed_at = now

    def failed(self, reason: str, now: float) -> None:
        """Note that the database cannot be used; `reason` is a sentence."""
        if self._failure is None:
            self._failed_at = now
        self._failure = reason

    def answered(self, now: float) -> None:
        """Note that a read was answered."""
        self._answered_at = now

    def paused(self, seconds: float) -> None:
        """Note that this process was stalled for a while, and could not receive any answer."""
        self._answered_at += seconds
        self._completed_at += seconds

    def completed(self, now: float, as_of: int, flaw: str | None = None) -> None:
        """Note that the log was read to its end. `flaw`: what is wrong nevertheless."""
        self._answered_at = self._completed_at = now
        self.as_of = as_of
        if flaw is not None:
            self.failed(flaw, now)
        else:
            self._failure = self.outage = None

    def judge(self, now: float) -> Outage | None:
        """Return the outage there is now, if any."""
        reason = next((reason for reason, begins in self._reasons() if begins <= now), None)
        if reason is not None and (self.outage is None or self.outage.reason != reason):
            self.outage = Outage(self.as_of, reason)
        return self.outage

    def until_next(self, now: float) -> float:
        """Return how long it takes until `judge` may return something else, if no failure is noted.

        At most SILENT_S: an answer in the meantime may end a reason, and none can begin again
        sooner than that after it.
        """
        return min([SILENT_S, *(begins - now for _, begins in self._reasons() if begins > now)])

    def _reasons(self) -> list[tuple[str, float]]:
        """Return the reasons for an outage, and from when on each holds; the most precise first."""
        found = [
            (SILENT, self._answered_at + SILENT_S),
            (BEHIND, self._completed_at + BEHIND_S),
        ]
        if self._failure is not None:
            found.insert(0, (self._failure, self._failed_at + GRACE_S))
        return found
