"""Is the oracle any good for subscriptions? Each safeguard is disabled, and it must notice."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.database.embedded import Server
from tests.faults.filters import Comparison
from tests.faults.oracle import WEBSOCKET, Oracle, Plan, Report
from tests.faults.subscriptions import Asked
from tests.support.postgres import CARELESS, clone, private_server, template

PRUNED_TIMEOUT_S = 60
KEPT_CHANGES = 400
LARGE_ROWS, LARGE_ROW_CHARS = 200, 10_000  # many messages
CREATE = "INSERT INTO things (name, info) VALUES ($1, $2)"
ITEMS = "INSERT INTO items SELECT n, 0 FROM generate_series($1::int, $1 + 99) AS n"
# Of those whose changes are kept, while nothing before them is.
OLDEST_ITEM = """
    SELECT min((new ->> 'id')::bigint) FROM feed.change
    WHERE topic = 'item' AND NOT EXISTS (SELECT FROM feed.change WHERE topic <> 'item')
"""
PEOPLE = "INSERT INTO people (name, age) SELECT 'Ada', n FROM generate_series(1, 10) AS n"


def younger(age: int) -> Asked:
    return Asked("person", (Comparison("age", "lt", (str(age),)),), old=True)


async def loaded(oracle: Oracle, count: int) -> None:
    """Wait until each subscription has been loaded that many times."""
    receivers = [
        receiver for subscriber in oracle.subscribers for receiver in subscriber.receivers.values()
    ]
    await oracle.until(lambda: all(each.findings.loads >= count for each in receivers))


async def rows_move(oracle: Oracle) -> None:
    """Rows cease to match a filter, and begin to."""
    async with oracle.session() as connection:
        await connection.execute(PEOPLE)
        await connection.execute("UPDATE people SET age = age + 3")
        await connection.execute("UPDATE people SET age = age - 1")


async def a_client_wants_something_else(oracle: Oracle) -> None:
    """A client changes its filter while it is disconnected."""
    async with oracle.session() as connection:
        await connection.execute(PEOPLE)
        before = oracle.sessions()
        oracle.fronts[0].cut()
        await oracle.until(lambda: oracle.sessions() > before)
        await connection.execute("UPDATE people SET age = age + 3")


async def a_snapshot_is_cut(oracle: Oracle) -> None:
    """A client loads many rows, and is cut off when the first of them arrive."""
    async with oracle.session() as connection:
        await connection.execute(
            "INSERT INTO things (name, info) SELECT n::text, repeat('x', $2)"
            " FROM generate_series(1, $1) AS n",
            LARGE_ROWS, LARGE_ROW_CHARS,
        )  # fmt: skip
    before = oracle.sessions()
    oracle.fronts[0].cut()  # it asks for something else then, and so has to load
    await oracle.until(lambda: oracle.sessions()[0] >= before[0] + 2)


async def nothing_happens_for_long(oracle: Oracle) -> None:
    """Nothing concerns a connected client until the log no longer holds what came after its last
    event; then the server is killed, and with it what it had in memory.
    """
    async with oracle.session() as connection:
        await connection.execute(CREATE, "a", "mine")
        await oracle.until(lambda: oracle.events() > 0)
        await oracle.check()  # before it is pruned
        first = 1
        async with asyncio.timeout(PRUNED_TIMEOUT_S):
            while (await connection.fetchval(OLDEST_ITEM) or 0) <= KEPT_CHANGES:
                await connection.execute(ITEMS, first)
                first += 100
                await asyncio.sleep(0.1)
        before = oracle.sessions()
        oracle.nodes[0].kill()
        await oracle.nodes[0].start()
        await oracle.until(lambda: oracle.sessions() > before)


@dataclass(frozen=True)
class Story:
    """What happens to a client that holds `asked` in turn."""

    tell: Callable[[Oracle], Awaitable[None]]
    asked: Sequence[Asked]
    cutting: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        return Plan(
            seed=1, seconds=0, nodes=1, clients=(), subscribers=[("official", WEBSOCKET)],
            namespaces={f"/{self.asked[0].topic}": self.asked}, switching=1, cutting=self.cutting,
            settings=self.settings,
        )  # fmt: skip


NOTHING = Asked("thing", (Comparison("id", "lt", ("0",)),))
MINE = Asked("thing", (Comparison("info", "in", ("mine", "")),))
STORIES = {
    "old_rows": Story(rows_move, [younger(5)]),
    "fingerprint": Story(a_client_wants_something_else, [younger(5), younger(9)]),
    "loading": Story(a_snapshot_is_cut, [NOTHING, Asked("thing"), Asked("thing")], True),
    "quiet": Story(nothing_happens_for_long, [MINE], settings={"FEED_MAX_CHANGES": KEPT_CHANGES}),
}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    """A server for this module only, so that no other test's transactions are open."""
    with private_server(**CARELESS) as server:
        template(server.url, "migrated")
        yield server


@pytest.fixture
def tell(postgres: Server, tmp_path: Path) -> Iterator[Callable[..., Awaitable[Report]]]:
    """Runs a story and returns the oracle's report."""
    with clone(postgres.url, "migrated") as url:

        async def run(story: Story, sabotage: str = "") -> Report:
            async with Oracle(story.plan, tmp_path, postgres, url, sabotage) as oracle:
                await loaded(oracle, 1)
                await story.tell(oracle)
                return await oracle.verdict()

        yield run


@pytest.mark.parametrize("safeguard", STORIES)
async def test_without_a_safeguard_the_oracle_fails(
    tell: Callable[..., Awaitable[Report]], safeguard: str
) -> None:
    """A safeguard is disabled inside the server, and the oracle finds the consequences."""
    report = await tell(STORIES[safeguard], safeguard)
    assert report.total.failures(), report
    assert not report.problems, report


@pytest.mark.parametrize("safeguard", STORIES)
async def test_with_all_safeguards_the_oracle_passes(
    tell: Callable[..., Awaitable[Report]], safeguard: str
) -> None:
    """The same happens to an unmodified server."""
    report = await tell(STORIES[safeguard])
    assert not report.total.failures() and not report.problems, report
