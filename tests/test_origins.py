"""Pages of other origins, and pages behind proxies, at the running server: headers and refusals."""

import logging
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.support.sockets import PATH, QUERY, serving_here

LISTED = "https://Listed.example:443"
PAGE = "https://listed.example"
OTHER = "https://other.example"
POLL = f"{PATH}{QUERY}polling"
ALLOW = "Access-Control-Allow-Origin"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
# Answers of every kind: lists, things that are there and not, bad requests, files, sessions.
REQUESTS = [
    ("GET", "/api/things"), ("GET", "/api/things/none"), ("POST", "/api/things"),
    ("PUT", "/api/things"), ("GET", "/api/things?limit=x"), ("GET", "/nowhere"), ("GET", "/"),
    ("GET", "/readyz"), ("GET", POLL), ("GET", f"{POLL}&sid=none"), ("POST", POLL),
    ("GET", f"{PATH}?EIO=3&transport=polling"), ("GET", f"{PATH}?EIO=4"),
    ("GET", f"{PATH}socket.io.js"),
]  # fmt: skip


async def test_every_answer_has_one_cors_header(database_url: str, plain: bool) -> None:
    """A page of a listed origin may read whatever the server answers it; one of another origin may
    not, and no cache confuses the two.
    """
    async with (
        serving_here(database_url, plain=plain, allowed_origins=(LISTED,)) as app,
        httpx.AsyncClient(base_url=app.url) as http,
    ):
        for method, path in REQUESTS:
            answer = await http.request(method, path, headers={"Origin": PAGE})
            assert answer.headers.get_list(ALLOW) == [PAGE], path
            assert "Feed-Offset" in answer.headers["Access-Control-Expose-Headers"]
            for headers in ({"Origin": PAGE}, {"Origin": OTHER}, {}):
                answer = await http.request(method, path, headers=headers)
                assert "Origin" in answer.headers["Vary"], path
                assert (ALLOW in answer.headers) is (headers == {"Origin": PAGE}), path
        for path in ("/api/things", POLL, "/nowhere"):
            answer = await http.options(path, headers={"Origin": PAGE} | PREFLIGHT)
            assert answer.status_code == 204 and answer.headers.get_list(ALLOW) == [PAGE]
            assert "PATCH" in answer.headers["Access-Control-Allow-Methods"]
            answer = await http.options(path, headers={"Origin": OTHER} | PREFLIGHT)
            assert ALLOW not in answer.headers
            foreign = {"Origin": PAGE, "Host": "evil.example"} | PREFLIGHT
            answer = await http.options(path, headers=foreign)
            assert answer.status_code == 421 and answer.headers.get_list(ALLOW) == [PAGE]


async def test_any_origin_may_be_allowed(database_url: str) -> None:
    """With ALLOWED_ORIGINS=* any page may read and connect, even one whose origin is `null`."""
    async with (
        serving_here(database_url, allowed_origins=("*",)) as app,
        httpx.AsyncClient(base_url=app.url) as http,
    ):
        for method, path in REQUESTS:
            for origin in (OTHER, "null", app.url):
                answer = await http.request(method, path, headers={"Origin": origin})
                assert answer.headers.get_list(ALLOW) == ["*"], path
                assert answer.status_code != 403


@pytest.mark.parametrize("listed", [(), (LISTED,)], ids=["none listed", "one listed"])
async def test_the_servers_own_page_always_works(
    database_url: str, listed: tuple[str, ...], plain: bool
) -> None:
    """The server's own page connects by both transports, with or without ALLOWED_ORIGINS; the pages
    of another origin and of none (`null`) are refused, and are told why.
    """
    async with (
        serving_here(database_url, plain=plain, allowed_origins=listed) as app,
        httpx.AsyncClient(base_url=app.url) as http,
    ):
        own = {"Origin": app.url}
        assert (await http.get(POLL, headers=own)).status_code == 200
        assert await upgrade(http, own) == 101
        for origin in (OTHER, "null"):
            answer = await http.get(POLL, headers={"Origin": origin})
            assert answer.status_code == 403 and answer.json()["code"] == 4
            message = answer.json()["message"]
            assert f"a page of {origin}," in message and app.url in message
            assert await upgrade(http, {"Origin": origin}) == 403


def no_errors(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether we logged no error. (uvicorn's own WebSockets complain of every refusal.)"""
    return not [
        record
        for record in caplog.records
        if record.levelno >= logging.ERROR and record.name.startswith("tablecast")
    ]


async def upgrade(http: httpx.AsyncClient, headers: dict[str, str]) -> int:
    """Ask for a WebSocket; return the status of the answer."""
    address = str(http.base_url).replace("http", "ws", 1).rstrip("/") + PATH + QUERY + "websocket"
    try:
        async with connect(address, additional_headers=headers, proxy=None):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


@pytest.mark.parametrize(
    "said",
    [
        {"X-Forwarded-Proto": "https", "Host": "public.example"},
        {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "public.example"},
        {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "public.example",
         "X-Forwarded-Port": "443", "X-Forwarded-For": "192.0.2.1"},
        {"Forwarded": 'for=192.0.2.1;proto=https;host="public.example", for=10.0.0.1'},
    ],
    ids=["proto", "proto and host", "port", "Forwarded"],
)  # fmt: skip
async def test_a_page_behind_a_proxy_that_ends_tls(
    database_url: str, said: dict[str, str], plain: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy on this machine says for what address it stands: its page connects by both
    transports. From an address that is not trusted the same is refused, and the log says so once.
    """
    headers = said | {"Origin": "https://Public.example"}
    nobody: dict[str, Any] = {"trusted_proxies": ()}
    for settings, status in (({}, 200), (nobody, 403)):
        async with (
            serving_here(
                database_url, plain=plain, allowed_hosts=("public.example",), **settings
            ) as app,
            httpx.AsyncClient(base_url=app.url) as http,
        ):
            for _ in range(3):
                assert (await http.get(POLL, headers=headers)).status_code == status
            if "Host" not in said:  # the library sends a Host of its own
                assert await upgrade(http, headers) == (101 if status == 200 else 403)
    assert no_errors(caplog)
    reported = [record for record in caplog.records if "TRUSTED_PROXIES" in record.message]
    assert len(reported) == 1


async def test_normal_refusals_are_no_errors_in_the_log(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Old clients, clients of a node that has gone, and foreign pages knock: no line says ERROR."""
    caplog.set_level(logging.INFO)
    async with (
        serving_here(database_url) as app,
        httpx.AsyncClient(base_url=app.url) as http,
    ):
        for path in (f"{PATH}?EIO=3&transport=polling", f"{POLL}&sid=gone", POLL):
            answer = await http.get(path, headers={"Origin": OTHER} if path == POLL else {})
            assert answer.status_code in (400, 403) and answer.json().keys() == {"code", "message"}
        assert await upgrade(http, {"Origin": OTHER}) == 403
    assert no_errors(caplog)
