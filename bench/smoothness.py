"""How smoothly a page in a browser shows a table under steady writes."""

import asyncio
import random
import statistics
from dataclasses import dataclass
from typing import TypeAlias

import asyncpg
from playwright.async_api import CDPSession, Page

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

OBSERVE = """
    () => {
      if (window.frames_) return;
      window.frames_ = [];
      window.tasks_ = [];
      new PerformanceObserver((list) => {
        for (const entry of list.getEntries()) window.tasks_.push(entry.duration);
      }).observe({ type: 'longtask' });
      let last = performance.now();
      const tick = (now) => {
        window.frames_.push(now - last);
        last = now;
        requestAnimationFrame(tick);
      };
      requestAnimationFrame(tick);
    }
"""
FORGET = "() => { window.frames_.length = 0; window.tasks_.length = 0; }"


@dataclass(frozen=True)
class Smoothness:
    """Milliseconds between frames (95th percentile) and of the longest task; the share of time
    that the main thread was busy; changes a second that were written.
    """

    frame_ms: float
    frames_per_second: float
    longest_task_ms: float
    busy: float
    changes_per_second: float


class Writer:
    """Updates rows of `things` at random, a tenth of the time inserts one and deletes one.

    Several connections write at the same time, where one would not be fast enough.
    """

    def __init__(self, per_second: int, *connections: Connection) -> None:
        self._connections = connections
        self._interval = len(connections) / per_second
        self._random = random.Random(1)
        self.ids: list[int] = []
        self.written = 0

    async def fill(self, rows: int) -> None:
        """Insert the rows to begin with."""
        found = await self._connections[0].fetch(
            "INSERT INTO things (name, info) SELECT 'thing ' || n, 'as it was'"
            " FROM generate_series(1, $1::int) n RETURNING id",
            rows,
        )
        self.ids = [row["id"] for row in found]

    async def run(self, seconds: float) -> None:
        """Write at the rate, one change a transaction."""
        await asyncio.gather(*(self._run(each, seconds) for each in self._connections))

    async def _run(self, connection: Connection, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        count = 0
        while (elapsed := loop.time() - begin) < seconds:
            if count * self._interval > elapsed:
                await asyncio.sleep(count * self._interval - elapsed)
            count += 1
            self.written += 1
            await self._write_one(connection)

    async def _write_one(self, connection: Connection) -> None:
        place = self._random.randrange(len(self.ids))
        chance = self._random.random()
        if chance < 0.05:
            self.ids.append(
                await connection.fetchval(
                    "INSERT INTO things (name) VALUES ($1) RETURNING id", f"new {self.written}"
                )
            )
        elif chance < 0.1:
            self.ids[place], self.ids[-1] = self.ids[-1], self.ids[place]
            await connection.execute("DELETE FROM things WHERE id = $1", self.ids.pop())
        else:
            await connection.execute(
                "UPDATE things SET info = $2 WHERE id = $1",
                self.ids[place],
                f"changed {self.written}",
            )


async def measure(page: Page, writer: Writer, seconds: float, warm_up: float) -> Smoothness:
    """Write, and after the warm-up observe the page for some seconds."""
    protocol = await page.context.new_cdp_session(page)
    await protocol.send("Performance.enable", {"timeDomain": "timeTicks"})
    await page.evaluate(OBSERVE)
    await writer.run(warm_up)
    await page.evaluate(FORGET)
    before, written = await times(protocol), writer.written
    await writer.run(seconds)
    after = await times(protocol)
    frames, tasks = await page.evaluate("[window.frames_, window.tasks_]")
    elapsed = after["Timestamp"] - before["Timestamp"]
    return Smoothness(
        frame_ms=statistics.quantiles(frames, n=20)[-1],
        frames_per_second=len(frames) / elapsed,
        longest_task_ms=max(tasks, default=0.0),
        busy=(after["TaskDuration"] - before["TaskDuration"]) / elapsed,
        changes_per_second=(writer.written - written) / elapsed,
    )


async def times(protocol: CDPSession) -> dict[str, float]:
    """The renderer's own account of its main thread, in seconds."""
    answer = await protocol.send("Performance.getMetrics")
    return {metric["name"]: metric["value"] for metric in answer["metrics"]}
