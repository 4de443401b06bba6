"""Work that several tasks wait for is done once."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class SharedWork(Generic[V]):
    """Work under way, and how many wait for it."""

    __slots__ = ("task", "waiting")

    def __init__(self, task: asyncio.Task[V]) -> None:
        self.task = task
        self.waiting = 0


class Sharing(Generic[K, V]):
    """Work under way, by key. It is cancelled once nobody waits for it any more."""

    def __init__(self) -> None:
        self._works: dict[K, SharedWork[V]] = {}

    def __len__(self) -> int:
        return len(self._works)

    def keys(self) -> Iterable[K]:
        """Return the keys of the work under way."""
        return list(self._works)

    def forget(self, key: K) -> None:
        """Let later callers begin work of their own; no error if none is under way."""
        self._works.pop(key, None)

    async def get(self, key: K, work: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """Wait for the result of the work under way for `key`, or begin it."""
        shared = self._works.get(key)
        if shared is None:
            shared = self._works[key] = SharedWork(asyncio.create_task(work()))
        shared.waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if not shared.waiting or shared.task.done():
                if self._works.get(key) is shared:
                    del self._works[key]
                shared.task.cancel()
