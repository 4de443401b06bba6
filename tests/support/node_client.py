"""The official client in Node.js, which prints every event that it receives."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.machine import require

PROGRAM = Path(__file__).parent / "states.mjs"
LONGEST_LINE_BYTES = 16 * 1024 * 1024


@asynccontextmanager
async def node_client(url: str, *transports: str) -> AsyncIterator[list[list[Any]]]:
    """Run the client with these transports; the list grows by what it prints."""
    process = await asyncio.create_subprocess_exec(
        require("node"), str(PROGRAM), url, json.dumps(transports),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LONGEST_LINE_BYTES,
    )  # fmt: skip
    lines: list[list[Any]] = []

    async def read() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            lines.append(json.loads(line))

    reading = asyncio.create_task(read())
    try:
        yield lines
    finally:
        process.kill()
        await process.wait()
        await reading
