"""How smoothly a page in a browser shows a table under steady writes."""

import asyncio
import random
import statistics
from dataclasses import dataclass

import asyncpg
from playwright.async_api import CDPSession, Page

OBSERVE = """
    () => {
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
    """Updates rows of `things` at random, a tenth of the time inserts one and deletes one."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]", per_second: int) -> None:
        self._connection = connection
        self._interval = 1 / per_second
        self._random = random.Random(1)
        self.ids: list[int] = []
        self.written = 0

    async def fill(self, rows: int) -> None:
        """Insert the rows to begin with."""
        found = await self._connection.fetch(
            "INSERT INTO things (name, info) SELECT 'thing ' || n, 'as it was'"
            " FROM generate_series(1, $1::int) n RETURNING id",
            rows,
        )
        self.ids = [row["id"] for row in found]

    async def run(self, seconds: float) -> None:
        """Write at the rate, one change a transaction."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        count = 0
        while (elapsed := loop.time() - begin) < seconds:
            if count * self._interval > elapsed:
                await asyncio.sleep(count * self._interval - elapsed)
            count += 1
            self.written += 1
            await self._write_one()

    async def _write_one(self) -> None:
        place = self._random.randrange(len(self.ids))
        chance = self._random.random()
        if chance < 0.05:
            self.ids.append(
                await self._connection.fetchval(
                    "INSERT INTO things (name) VALUES ($1) RETURNING id", f"new {self.written}"
                )
            )
        elif chance < 0.1:
            self.ids[place], self.ids[-1] = self.ids[-1], self.ids[place]
            await self._connection.execute("DELETE FROM things WHERE id = $1", self.ids.pop())
        else:
            await self._connection.execute(
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
