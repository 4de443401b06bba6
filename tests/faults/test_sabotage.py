"""Is the oracle any good? Each safeguard of the product is disabled, and the oracle must notice."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from app.database.embedded import Server
from tests.faults.oracle import WEBSOCKET, Oracle, Plan, Report
from tests.support.postgres import CARELESS, clone, private_server, template

PLAN = Plan(
    seed=1,
    seconds=0,
    nodes=1,
    clients=[("official", WEBSOCKET), ("official", WEBSOCKET)],
    settings={"PING_INTERVAL": "60s"},  # a client that reads nothing must not count as dead
)
MOST_GROWTH_MIB = 85
LONG_ROWS, LONG_ROW_BYTES = 1_000, 100_000  # 100 MB
CREATE = "INSERT INTO things (name) VALUES ($1)"
CREATE_MANY = "INSERT INTO things (name) SELECT $1 || n FROM generate_series(1, 5000) AS n"


async def a_transaction_commits_late(oracle: Oracle) -> None:
    """A transaction that began earlier commits later than another."""
    async with oracle.session() as slow, oracle.session() as quick:
        async with slow.transaction():
            await slow.execute(CREATE, "slow")
            await quick.execute(CREATE, "mark quick")
            await oracle.seen("mark quick")
        await quick.execute(CREATE, "mark last")
        await oracle.seen("mark last")


async def clients_were_away_for_long(oracle: Oracle) -> None:
    """Clients have thousands of changes to catch up on while others are written."""
    before = oracle.sessions()
    async with oracle.session() as connection:
        for front in oracle.fronts:
            front.hold()
            front.cut()
        for name in "abcd":
            await connection.execute(CREATE_MANY, name)
        for front in oracle.fronts:
            front.pass_on()
            front.cut()

        async def write() -> None:
            for number in range(100_000):
                await connection.execute(CREATE, f"mark {number}")

        writing = asyncio.create_task(write())
        await oracle.until(lambda: oracle.sessions() > before)
        marks = oracle.marks()
        await oracle.until(lambda: all(map(set.__lt__, marks, oracle.marks())))
        writing.cancel()
        await asyncio.wait([writing])


async def a_client_takes_nothing(oracle: Oracle) -> None:
    """A connected client reads nothing while much is written; another client gets it all."""
    oracle.fronts[0].hold()
    async with oracle.bounded_memory(MOST_GROWTH_MIB), oracle.session() as connection:
        await connection.execute(
            "INSERT INTO things (name, info) SELECT n::text, repeat('x', $2)"
            " FROM generate_series(1, $1) AS n",
            LONG_ROWS, LONG_ROW_BYTES,
        )  # fmt: skip
        await connection.execute(CREATE, "mark much")
        await oracle.seen("mark much", by=1)


async def the_database_was_away(oracle: Oracle) -> None:
    """The server loses its connections, and changes are written before it has new ones."""
    database = oracle.nodes[0].database
    database.hold()
    database.cut()
    async with oracle.session() as connection:
        await connection.execute(CREATE, "meanwhile")
        assert await oracle.nodes[0].ready(False)
        database.pass_on()
        database.cut()
        assert await oracle.nodes[0].ready()
        await connection.execute(CREATE, "mark after")
        await oracle.seen("mark after")


async def a_backup_was_restored(oracle: Oracle) -> None:
    """The history is another one, and the table is not what the clients think it is."""
    node = oracle.nodes[0]
    await node.stop()
    async with oracle.session() as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")  # no audit
        await connection.execute(CREATE, "from the backup")
        await connection.execute("DELETE FROM feed.change WHERE xid = pg_current_xact_id()")
        await connection.execute("UPDATE feed.state SET history = gen_random_uuid()")
    await node.start()


async def triggers_change_rows(oracle: Oracle) -> None:
    """A trigger completes rows inside the statement that inserts them."""
    async with oracle.session() as connection:
        for _ in range(20):
            await connection.execute("INSERT INTO tickets (note) VALUES ('new')")
        await connection.execute(CREATE, "mark completed")
        await oracle.seen("mark completed")


Story = Callable[[Oracle], Awaitable[None]]
STORIES: dict[str, Story] = {
    "fence": a_transaction_commits_late,
    "joining_early": clients_were_away_for_long,
    "joining_blindly": clients_were_away_for_long,
    "bound": a_client_takes_nothing,
    "catch_up": the_database_was_away,
    "epoch": a_backup_was_restored,
    "unsettled": triggers_change_rows,
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
            async with Oracle(PLAN, tmp_path, postgres, url, sabotage) as oracle:
                await oracle.until(lambda: min(oracle.sessions()) == 1)
                async with oracle.session() as connection:
                    await connection.execute(CREATE, "mark first")
                await oracle.seen("mark first")
                await story(oracle)
                return await oracle.verdict()

        yield run


@pytest.mark.parametrize("safeguard", STORIES)
async def test_without_a_safeguard_the_oracle_fails(
    tell: Callable[..., Awaitable[Report]], safeguard: str
) -> None:
    """A safeguard is disabled inside the server, and the oracle finds the consequences."""
    report = await tell(STORIES[safeguard], safeguard)
    assert report.failures() > report.total.refused, report


@pytest.mark.parametrize("story", dict.fromkeys(STORIES.values()), ids=lambda story: story.__name__)
async def test_with_all_safeguards_the_oracle_passes(
    tell: Callable[..., Awaitable[Report]], story: Story
) -> None:
    """The same happens to an unmodified server."""
    report = await tell(story)
    # `recovered: false` is right only for a client with another history's offset.
    told_to_load = len(PLAN.clients) if story is a_backup_was_restored else 0
    assert report.total.refused == told_to_load, report
    assert report.failures() == told_to_load, report
