"""python-socketio used plainly: one notification per row, emitted to all clients.

Environment: PORT, PGHOST, PGDATABASE, PGUSER.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import socketio
import uvicorn
from starlette.applications import Starlette

EVENTS = {"INSERT": "thing:create", "UPDATE": "thing:update", "DELETE": "thing:destroy"}

sio = socketio.AsyncServer(async_mode="asgi", transports=["websocket"])


async def emit(payloads: asyncio.Queue[str]) -> None:
    """Emit each notified row to all clients, in order."""
    while True:
        change = json.loads(await payloads.get())
        await sio.emit(EVENTS[change["op"]], change["row"])


@asynccontextmanager
async def listen(_app: Starlette) -> AsyncIterator[None]:
    """Listen to the row trigger while the application runs."""
    payloads: asyncio.Queue[str] = asyncio.Queue()

    def on_notification(_connection: Any, _pid: int, _channel: str, payload: object) -> None:
        payloads.put_nowait(str(payload))

    listener = await asyncpg.connect()
    emitter = asyncio.create_task(emit(payloads))
    try:
        await listener.add_listener("things", on_notification)
        yield
    finally:
        emitter.cancel()
        await listener.close()


if __name__ == "__main__":
    uvicorn.run(
        socketio.ASGIApp(sio, Starlette(lifespan=listen)),
        port=int(os.environ["PORT"]),
        log_level="warning",
        loop="uvloop",
        http="httptools",
        # Engine.IO has its own heartbeat, and the Node.js peer does not compress either.
        ws_ping_interval=None,
        ws_per_message_deflate=False,
        backlog=4096,
    )
