"""Compression: where it pays, for those who accept it, and never of a stream."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.datastructures import Headers

from app.database.connections import Connection
from app.feed.offset import Position
from app.rest.compression import SHORTEST_BYTES, Compression, accepts_gzip
from tests.support.server import RunningServer
from tests.support.sockets import App, PollingClient
from tests.support.writing import insert

GZIP = {"Accept-Encoding": "gzip, deflate, br"}
PLAIN = {"Accept-Encoding": "identity"}
CLIENT = "/socket.io-client/socket.io.esm.min.js"
FILES = ["/", "/feed.js", CLIENT, "/openapi.json"]
LONGEST_PAUSE_S = 0.15


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as opened:
        yield opened


async def fetch(
    client: httpx.AsyncClient, path: str, method: str = "GET", **headers: str
) -> tuple[httpx.Response, bytes]:
    """Send a request; return the response and its body as it was sent."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client.stream(method, path, headers=PLAIN | given) as response:
        return response, b"".join([piece async for piece in response.aiter_raw()])


@pytest.mark.parametrize("path", FILES)
async def test_assets_are_compressed(client: httpx.AsyncClient, path: str) -> None:
    """A browser loads the page and its scripts: less than half the bytes, the same content; HEAD
    describes them, and the browser's copy stays valid.
    """
    plain, whole = await fetch(client, path)
    packed, body = await fetch(client, path, **GZIP)
    assert plain.headers["Vary"] == packed.headers["Vary"] == "Accept-Encoding"
    assert "Content-Encoding" not in plain.headers
    assert packed.headers["Content-Encoding"] == "gzip"
    assert int(packed.headers["Content-Length"]) == len(body) < len(whole) / 2
    assert gzip.decompress(body) == whole
    head, nothing = await fetch(client, path, "HEAD", **GZIP)
    assert head.headers["Content-Encoding"] == "gzip" and nothing == b""
    assert head.headers.get("Content-Length", str(len(body))) == str(len(body))
    if "ETag" in plain.headers:
        assert packed.headers["ETag"] == f"W/{plain.headers['ETag']}" == head.headers["ETag"]
        for response in (plain, packed):
            for accepted in (PLAIN, GZIP):
                again, nothing = await fetch(
                    client, path, If_None_Match=response.headers["ETag"], **accepted
                )
                assert (again.status_code, nothing) == (304, b"")
                assert again.headers["Vary"] == "Accept-Encoding"


async def test_a_range_is_of_the_file_itself(client: httpx.AsyncClient) -> None:
    """A client that accepts gzip asks for a part of a file, then for the rest of a copy."""
    plain, whole = await fetch(client, CLIENT)
    part, body = await fetch(client, CLIENT, Range="bytes=100-199", **GZIP)
    assert (part.status_code, body) == (206, whole[100:200])
    assert "Content-Encoding" not in part.headers
    packed, _ = await fetch(client, CLIENT, **GZIP)
    for tag, status in ((plain.headers["ETag"], 206), (packed.headers["ETag"], 200)):
        rest, body = await fetch(client, CLIENT, Range="bytes=100-", If_Range=tag, **GZIP)
        assert rest.status_code == status
        assert body == (whole[100:] if status == 206 else whole)


def newest_seen(answer: httpx.Response) -> tuple[str, int]:
    """Return the epoch of a list's offset, and just after which transaction it is."""
    epoch, position, _ = answer.headers["Feed-Offset"].split(".")
    return epoch, Position.parse(position).xmax


async def test_lists_are_compressed_and_small_answers_are_not(
    client: httpx.AsyncClient, connection: Connection
) -> None:
    """A client lists no, few and many things, and makes a mistake."""
    empty, _ = await fetch(client, "/api/things", **GZIP)
    assert "Content-Encoding" not in empty.headers and "Vary" not in empty.headers
    await insert(connection, *(f"{number}" for number in range(1000)))
    plain, whole = await fetch(client, "/api/things")
    packed, body = await fetch(client, "/api/things", **GZIP)
    assert gzip.decompress(body) == whole and len(body) < len(whole) / 4
    # The same history and newest change; which other transactions were running may differ.
    assert newest_seen(packed) == newest_seen(plain)
    head, _ = await fetch(client, "/api/things", "HEAD", **GZIP)
    assert head.headers["Content-Length"] == str(len(body))
    wrong, text = await fetch(client, f"/api/things/{'x' * SHORTEST_BYTES}", **GZIP)
    assert wrong.status_code == 404 and text.startswith(b"{")


async def test_polling_is_never_compressed(app: App, connection: Connection) -> None:
    """A polling client that accepts gzip gets long answers as they are."""
    async with httpx.AsyncClient(base_url=app.url, headers=GZIP) as http:
        polling = PollingClient(http)
        await polling.open()
        await polling.post("40")
        await polling.poll()
        await insert(connection, *(f"{number:0100}" for number in range(100)))
        answer = await http.get(polling.address)
        assert len(answer.content) > SHORTEST_BYTES
        assert "Content-Encoding" not in answer.headers


async def test_a_long_list_does_not_hold_up_others() -> None:
    """While 10 MB are compressed for several clients, the event loop is never held up for long."""
    body = b", ".join(b"%09d" % number for number in range(1_000_000))

    async def nothing(*_: object) -> None:
        pass

    compression = Compression(nothing)
    loop = asyncio.get_running_loop()
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = loop.time()
            await asyncio.sleep(0.001)
            longest = max(longest, loop.time() - before)

    watching = asyncio.create_task(watch())
    began = time.monotonic()
    packed = await asyncio.gather(*(compression.list(body) for _ in range(4)))
    watching.cancel()
    assert {gzip.decompress(each or b"") for each in packed} == {body}
    assert longest < max(LONGEST_PAUSE_S, (time.monotonic() - began) / 4)


async def test_a_crowd_gets_lists_as_they_are() -> None:
    """More clients than are worth waiting for want a long list: most get it as it is."""

    async def nothing(*_: object) -> None:
        pass

    compression = Compression(nothing)
    packed = await asyncio.gather(*(compression.list(bytes(1_000_000)) for _ in range(20)))
    assert 1 < packed.count(None) < 20
    assert await compression.list(bytes(1_000_000)) is not None


async def test_a_file_is_compressed_once(client: httpx.AsyncClient) -> None:
    """Many clients want a file at once, by names of all kinds."""
    paths = [CLIENT, *(CLIENT.replace("client/", f"client/{n}/../", 1) for n in range(20))]
    answers = await asyncio.gather(*(fetch(client, path, **GZIP) for path in paths))
    assert len({body for _, body in answers}) == 1


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ("gzip", True),
        ("br, GZIP;q=0.5", True),
        ("*", True),
        ("gzip; q=1.0", True),
        ("", False),
        ("br", False),
        ("gzip;q=0", False),
        ("*;q=0.000", False),
        ("*, gzip;q=0.0", False),
    ],
)
def test_what_a_client_accepts(given: str, accepted: bool) -> None:
    """A client says in any way that it accepts gzip, or that it does not."""
    assert accepts_gzip(Headers({"accept-encoding": given})) is accepted
