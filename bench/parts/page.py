"""The page with many rows in headless Chromium, under steady writes: how smoothly it shows them."""

import shutil

from playwright.async_api import async_playwright, expect

from bench.lab import Figure, Lab
from bench.servers import running
from bench.smoothness import Smoothness, Writer, measure

ROWS = 5_000
CHANGES_PER_SECOND = 500
SECONDS, WARM_UP_S = 8.0, 2.0
LEAST_WRITTEN = 0.95 * CHANGES_PER_SECOND
ROUNDS = 3
LOAD_MS = 30_000
MOST_FRAME_MS, MOST_TASK_MS, MOST_BUSY = 50, 100, 0.5

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


async def run(lab: Lab) -> list[Figure]:
    """Frames, the longest task and how busy the page is; of several rounds the least busy one."""
    rounds = [await measure_once(lab) for _ in range(ROUNDS)]
    loaded = [found for found in rounds if found.changes_per_second > LEAST_WRITTEN]
    if not loaded:
        raise RuntimeError(f"Postgres did not write {CHANGES_PER_SECOND} changes a second")
    best = min(loaded, key=lambda found: found.busy)
    note = f"page: {best.changes_per_second:.0f} changes/s, {best.frames_per_second:.0f} frames/s"
    what = f"{ROWS:,} rows, {CHANGES_PER_SECOND} changes/s"
    return [
        figure(f"{what}: 95th percentile between frames", "ms", best.frame_ms, MOST_FRAME_MS, note),
        figure(f"{what}: longest task", "ms", best.longest_task_ms, MOST_TASK_MS, note),
        figure(f"{what}: main thread busy", "%", best.busy * 100, MOST_BUSY * 100, note),
    ]


def figure(what: str, unit: str, value: float, most: float, note: str) -> Figure:
    """A figure of ours alone, with a target."""
    return Figure(
        "page", what, unit, {"ours": value}, f"≤ {most:g} {unit}", value <= most, note=note
    )


async def measure_once(lab: Lab) -> Smoothness:
    """Measure on a fresh database and in a fresh browser."""
    [ours] = [peer for peer in lab.peers if peer.name == "ours"]
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise RuntimeError(f"there is no {' and no '.join(BROWSERS)}")
    async with (
        lab.postgres.clone("ours", "stage_page") as database,
        lab.postgres.connect(database) as first,
        lab.postgres.connect(database) as second,
        lab.postgres.connect(database) as third,
        running(ours, lab.postgres, database) as server,
        async_playwright() as playwright,
    ):
        writer = Writer(CHANGES_PER_SECOND, first, second, third)
        await writer.fill(ROWS)
        browser = await playwright.chromium.launch(executable_path=path, args=OPTIONS)
        page = await browser.new_page(viewport={"width": 1280, "height": 800})
        await page.goto(f"http://127.0.0.1:{server.port}")
        await expect(page.locator(".thing")).to_have_count(ROWS, timeout=LOAD_MS)
        found = await measure(page, writer, SECONDS, WARM_UP_S)
        await browser.close()
    return found
