"""Watches a server with Python clients and writes down everything they receive, like watch.mjs.

Argument: a JSON array of {url, transports, file}. Stops when standard input ends.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.support.python_client import Thing, Things


class Watcher(Things):
    """Writes down every event before applying it."""

    def __init__(self, url: str, transports: list[str], file: str) -> None:
        super().__init__(url, transports)
        self._file = Path(file).open("a", encoding="utf-8")  # noqa: SIM115  # until the end

    def on_list(self, things: list[Thing], offset: str) -> None:
        self._write("list", offset, things)
        super().on_list(things, offset)

    def on_event(self, event: str, *arguments: Any) -> None:
        *what, offset = arguments
        if event == "feed:state":
            pass
        elif event == "feed:hello" and "topic" in what[0]:
            self._write(f"{what[0]['topic']}:reload", None, offset)
        elif event == "feed:hello":
            self._write("hello", what[0]["recovered"], offset, None)
        else:
            self._write(event, what[0] if what else None, offset)
        super().on_event(event, *arguments)

    def stop(self) -> None:
        self._write("state", list(self.items.values()))

    def _write(self, *entry: Any) -> None:
        text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
        self._file.write(f"{text}\n")
        self._file.flush()


async def main() -> None:
    watchers = [
        Watcher(client["url"], client["transports"], client["file"])
        for client in json.loads(sys.argv[1])
    ]
    following = [asyncio.create_task(watcher.follow()) for watcher in watchers]
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait([ended, *following], return_when=asyncio.FIRST_COMPLETED)
    for task in following:
        task.cancel()
    failures = await asyncio.gather(*following, return_exceptions=True)
    for watcher in watchers:
        watcher.stop()
    for failure in failures:
        if isinstance(failure, Exception):
            raise failure


if __name__ == "__main__":
    asyncio.run(main())
