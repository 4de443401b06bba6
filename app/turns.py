"""Spreads work that comes in bulk over several turns of the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable


class Turns:
    """Spends about `seconds` of each turn of the loop on work, so that nothing else waits for long.

    Work is done in the order in which it arrived.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Callable[[], None]] = deque()
        self._ends: float | None = None  # when the current turn's time is up; None between turns

    def do(self, work: Callable[[], None]) -> bool:
        """Do `work` now if this turn has time for it, else in a later turn; return whether it has
        been done.
        """
        if self._ends is None:
            self._begin()
        if self._waiting or self._is_over():
            self._waiting.append(work)
            return False
        work()
        return True

    async def done(self, work: Callable[[], None]) -> None:
        """Wait until `work` has been done. Raises whatever it raises."""
        result: asyncio.Future[None] = self._loop.create_future()
        if not self.do(lambda: settle(result, work)):
            await asyncio.shield(result)
        result.result()

    def _begin(self) -> None:
        self._ends = self._loop.time() + self._seconds
        self._loop.call_soon(self._next)

    def _is_over(self) -> bool:
        return self._ends is not None and self._loop.time() >= self._ends

    def _next(self) -> None:
        self._ends = None
        if self._waiting:
            self._begin()
            self._waiting.popleft()()
        while self._waiting and not self._is_over():
            self._waiting.popleft()()


def settle(result: asyncio.Future[None], work: Callable[[], None]) -> None:
    """Do `work`; whatever it raises becomes the result's exception."""
    try:
        work()
    except Exception as error:
        result.set_exception(error)
    else:
        result.set_result(None)
