"""A queue of deadlines that share one delay, and so one timer."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

# Things due at nearly the same time are handled together, so that the process wakes up less often.
LARGEST_SLACK_S = 0.1
SLACK_SHARE = 0.05
# But no more than this many, so that nothing else waits for long.
MOST_AT_ONCE = 200


class Deadlines(Generic[T]):
    """Calls `due` with each thing `seconds` after it was added, unless it was removed meanwhile."""

    def __init__(self, seconds: float, due: Callable[[T], None]) -> None:
        self._seconds = seconds
        self._slack = min(LARGEST_SLACK_S, SLACK_SHARE * seconds)
        self._due = due
        self._loop = asyncio.get_running_loop()
        self._times: dict[T, float] = {}  # earliest first
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, thing: T) -> bool:
        return thing in self._times

    def __iter__(self) -> Iterator[T]:
        return iter(self._times)

    def add(self, thing: T) -> None:
        """Make a thing due `seconds` from now, replacing any earlier deadline."""
        self._times.pop(thing, None)
        self._times[thing] = time = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(time + self._slack, self._expire)

    def remove(self, thing: T) -> bool:
        """Cancel a deadline; return whether there was one."""
        return self._times.pop(thing, None) is not None

    def expire_all(self) -> None:
        """Make everything due now."""
        now = self._loop.time()
        self._times = dict.fromkeys(self._times, now)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(now, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time()
        expired: list[T] = []
        for thing, time in self._times.items():
            if time > now or len(expired) == MOST_AT_ONCE:
                self._timer = self._loop.call_at(max(now, time + self._slack), self._expire)
                break
            expired.append(thing)
        for thing in expired:
            if self.remove(thing):  # an earlier one may have removed it
                self._due(thing)
