"""Raw Socket.IO clients that see every frame, and the application served within the test."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, cast

import httpx
import uvicorn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from app import serving
from app.application import State, create_app
from app.settings import Settings

FRAME_TIMEOUT_S = 10.0
PATH = "/socket.io-client/"
QUERY = "?EIO=4&transport="
Event = list[Any]


class RawClient:
    """A Socket.IO client on a WebSocket. It answers pings unless told not to."""

    def __init__(self, websocket: ClientConnection, opening: dict[str, Any]) -> None:
        self.websocket = websocket
        self.opening = opening
        self.pid = ""
        self.recovered: bool | None = None
        self.offset = ""
        self.events: list[Event] = []
        self.states: list[dict[str, Any]] = []  # of `feed:state`

    async def send(self, frame: str | bytes) -> None:
        """Send a frame; nothing once the server has closed."""
        with suppress(ConnectionClosed):
            await self.websocket.send(frame)

    async def frame(self, timeout: float = FRAME_TIMEOUT_S) -> str:
        """The next frame that is no ping. Raises TimeoutError, or ConnectionClosed."""
        async with asyncio.timeout(timeout):
            while True:
                frame = await self.websocket.recv()
                assert isinstance(frame, str)
                if frame != "2":
                    return frame
                await self.send("3")

    async def ping(self, timeout: float = FRAME_TIMEOUT_S) -> None:
        """Answer the server's next ping, which must come before anything else."""
        async with asyncio.timeout(timeout):
            assert await self.websocket.recv() == "2"
            await self.send("3")

    async def event(self, timeout: float = FRAME_TIMEOUT_S) -> Event:
        """The next event but `feed:state`; moves the offset if it carries one."""
        while (event := await self.any_event(timeout))[0] == "feed:state":
            pass
        return event

    async def state(self, timeout: float = FRAME_TIMEOUT_S) -> dict[str, Any]:
        """The next event, which must be `feed:state`."""
        event = await self.any_event(timeout)
        assert event[0] == "feed:state", event
        return self.states[-1]

    async def any_event(self, timeout: float = FRAME_TIMEOUT_S) -> Event:
        """The next event; moves the offset if it carries one."""
        frame = await self.frame(timeout)
        assert frame.startswith("42"), frame
        event: Event = json.loads(frame[2:])
        if event[0] == "feed:state":
            self.states.append(event[1])
        elif isinstance(event[-1], str) and len(event) > 1:
            self.offset = event[-1]
        return event

    async def take(self, count: int) -> list[Event]:
        """The next `count` events."""
        taken = [await self.event() for _ in range(count)]
        self.events += taken
        return taken

    async def join(self, auth: dict[str, Any] | None = None) -> "RawClient":
        """Send CONNECT; take its answer and hello."""
        await self.send("40" + (json.dumps(auth) if auth is not None else ""))
        answer = await self.frame()
        assert answer.startswith("40{"), answer
        self.pid = json.loads(answer[2:])["pid"]
        name, hello, self.offset = await self.event()
        assert name == "feed:hello"
        self.recovered = hello["recovered"]
        return self

    async def closed(self, timeout: float = FRAME_TIMEOUT_S) -> list[str]:
        """Wait until the server closes; the frames that came before."""
        frames: list[str] = []
        try:
            while True:
                frames.append(await self.frame(timeout))
        except ConnectionClosed:
            return frames

    async def silent(self, seconds: float = 0.3) -> bool:
        """Whether nothing comes for a while."""
        try:
            await self.frame(seconds)
        except TimeoutError:
            return True
        return False


@asynccontextmanager
async def opened(url: str, path: str = PATH, **options: Any) -> AsyncIterator[RawClient]:
    """A client with an open session that has not sent CONNECT."""
    address = url.replace("http", "ws", 1) + path + QUERY + "websocket"
    options = {"proxy": None, "max_size": None, "max_queue": None, "close_timeout": 0.5} | options
    async with connect(address, **options) as websocket:
        opening = await websocket.recv()
        assert isinstance(opening, str) and opening[0] == "0"
        yield RawClient(websocket, json.loads(opening[1:]))
        websocket.transport.abort()  # whatever the server thinks of it


@asynccontextmanager
async def joined(
    url: str, auth: dict[str, Any] | None = None, path: str = PATH, **options: Any
) -> AsyncIterator[RawClient]:
    """A client that has joined."""
    async with opened(url, path, **options) as client:
        yield await client.join(auth)


async def until_ready(url: str) -> None:
    """Wait until a server follows the log."""
    async with httpx.AsyncClient(base_url=url) as http, asyncio.timeout(20):
        while (await http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.02)


class PollingClient:
    """A Socket.IO client by HTTP long polling."""

    def __init__(self, http: httpx.AsyncClient, path: str = PATH) -> None:
        self.http = http
        self.sid = ""
        self._path = path

    @property
    def address(self) -> str:
        """Path and query of the session."""
        return f"{self._path}{QUERY}polling" + (f"&sid={self.sid}" if self.sid else "")

    async def open(self) -> dict[str, Any]:
        """Open the session."""
        answer = await self.http.get(self.address)
        opening: dict[str, Any] = json.loads(answer.text[1:])
        self.sid = opening["sid"]
        return opening

    async def post(self, body: str | bytes) -> httpx.Response:
        """Send packets."""
        return await self.http.post(self.address, content=body)

    async def poll(self) -> list[str]:
        """The packets of the next answer, without pings, which are answered."""
        packets = (await self.http.get(self.address)).text.split("\x1e")
        if "2" in packets:
            await self.post("3")
        return [packet for packet in packets if packet != "2"]

    async def subscribe(self, topic: str, count: int) -> None:
        """Ask for a topic in `count` namespaces, by one request; poll until all rows are here."""
        connects = [f"40/{topic}/{number}," for number in range(count)]
        assert (await self.post("\x1e".join(connects))).status_code == 200
        loaded = 0
        while loaded < count:
            loaded += sum('["feed:loaded"' in packet for packet in await self.poll())


@asynccontextmanager
async def polling_client(url: str) -> AsyncIterator[PollingClient]:
    """Yield a client by long polling with an open session."""
    async with httpx.AsyncClient(base_url=url) as http:
        client = PollingClient(http)
        await client.open()
        yield client


async def waiting_poll(polling: PollingClient) -> "asyncio.Task[httpx.Response]":
    """Start a poll; return when it waits in the server."""
    sent = asyncio.Event()

    async def trace(event: str, _: dict[str, Any]) -> None:
        if event == "http11.send_request_body.complete":
            sent.set()

    poll = asyncio.create_task(polling.http.get(polling.address, extensions={"trace": trace}))
    await sent.wait()
    stranger = PollingClient(polling.http)
    stranger.sid = "nobody"
    for _ in range(2):  # the server reads these after the poll, and answers at once
        assert (await polling.http.get(stranger.address)).status_code == 400
    assert not poll.done()
    return poll


def created(packet: str) -> str:
    """The name of the thing that an event says was created."""
    assert packet.startswith('42["thing:create",'), packet
    name: str = json.loads(packet[2:])[1]["name"]
    return name


class Quiet:
    """uvicorn.Server within a test: signals stay the test's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class OurServer(Quiet, serving.HttpServer):
    pass


class AnyServer(Quiet, uvicorn.Server):
    pass


class App:
    """The application while it is served within the test, to look inside."""

    def __init__(self, state: State, url: str) -> None:
        self.url = url
        self.feed = state["feed"]
        self.inspection = state["inspection"]
        self.replay = state["replay"]
        self.snapshots = state["snapshots"]
        self.broadcast = state["broadcast"]
        self.socketio = state["socketio"]

    @property
    def empty(self) -> bool:
        """Whether nothing is left of any client."""
        names = [task.get_name() for task in asyncio.all_tasks()]
        return not (
            self.broadcast.stats().subscribers
            or self.broadcast.stats().live
            or self.socketio.stats().sessions
            or self.replay.stats().reading
            or any(name.startswith(("catch-up", "replay")) for name in names)
        )


@asynccontextmanager
async def serving_here(
    database_url: str, plain: bool = False, ready: bool = True, **settings: Any
) -> AsyncIterator[App]:
    """Serve the application in this event loop; `plain` as any ASGI server would. Wait until it
    follows the log, unless `ready` is false.
    """
    chosen = Settings(database_url=database_url, port=0, **settings)
    app = create_app(chosen)
    listening = serving.listen("127.0.0.1", 0)
    server: uvicorn.Server
    if plain:
        server = AnyServer(
            uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, proxy_headers=False)
        )
    else:
        server = OurServer(serving.configure(app, chosen), lambda: None)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        async with asyncio.timeout(20):
            while not server.started or (ready and server.lifespan.state["feed"].trouble()):
                assert not task.done()
                await asyncio.sleep(0.01)
        host, port = listening.getsockname()
        yield App(cast(State, server.lifespan.state), f"http://{host}:{port}")
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 20)
        listening.close()
