"""Wake, read, publish: every committed change exactly once and in order, whatever happens."""

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import psutil
import pytest

from app.database.connections import Connection, connect
from app.database.embedded import Server
from app.feed import feed as feed_module
from app.feed import pacing
from app.feed.listener import BUSY_BELLS, CHANNEL, LOCKS, SLEEPING, Listener
from app.feed.log import Page, prune
from tests.support.feeds import eventually, following
from tests.support.proxy import proxied
from tests.support.writing import insert

LOCK_HELD = """
    SELECT EXISTS (
        SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND objid = $2
        AND mode = 'ExclusiveLock' AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
"""


async def until_asleep(connection: Connection) -> None:
    """Wait until the feed is asleep."""
    async with asyncio.timeout(10):
        while not await connection.fetchval(LOCK_HELD, LOCKS, SLEEPING):
            await asyncio.sleep(0.01)


async def logged(connection: Connection) -> list[int]:
    """The ids of all committed changes, in log order."""
    return [row[0] for row in await connection.fetch("SELECT id FROM feed.change ORDER BY id")]


@pytest.fixture
def no_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps feeds from looking by themselves, so that only the bell can wake them."""
    monkeypatch.setattr(pacing, "LOOK_S", 3600.0)


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[Connection]:
    """A second connection to the test's database."""
    opened = await connect(database_url)
    yield opened
    opened.terminate()


async def test_changes_are_published_as_they_come(
    connection: Connection, database_url: str
) -> None:
    """Changes are published in the order they are written, and none from before the start."""
    await insert(connection, "before")
    async with following(database_url) as (_, recorder):
        await insert(connection, "a", "b")
        await connection.execute("UPDATE things SET name = 'c' WHERE name = 'a'")
        await connection.execute("DELETE FROM things WHERE name = 'b'")
        await connection.execute("TRUNCATE things")
        await recorder.until(5)
        changes = [change for page in recorder.pages for change in page.changes]
        assert [change.op for change in changes] == [
            "create", "create", "update", "destroy", "truncate",
        ]  # fmt: skip
        assert json.loads(changes[2].body or "")["name"] == "c"
        assert changes[3].body == '"b"' and changes[4].body is None


@pytest.mark.usefixtures("no_looking")
async def test_a_sleeping_feed_is_woken_by_the_first_commit(
    connection: Connection, database_url: str
) -> None:
    """A sleeping feed that never looks by itself publishes each single commit."""
    async with following(database_url) as (_, recorder):
        for number in range(5):
            await until_asleep(connection)
            await insert(connection, f"{number}")
            await recorder.until(number + 1)


@pytest.mark.usefixtures("no_looking")
async def test_a_busy_feed_polls_and_spares_writers_the_bell(
    connection: Connection,
    other: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While commits follow each other closely they do not ring; when they stop, the feed sleeps
    again.
    """
    monkeypatch.setattr("app.feed.listener.BUSY_WITHIN_S", 1.0)  # even on a slow machine
    heard: list[object] = []

    def hear(*call: object) -> None:
        heard.append(call[-1])

    await other.add_listener(CHANNEL, hear)
    async with following(database_url) as (_, recorder):
        await until_asleep(connection)
        written = rings = 0
        spared = False
        async with asyncio.timeout(30):
            while not spared:
                await connection.execute(
                    f"DO $$ BEGIN FOR i IN {written + 1}..{written + 200} LOOP"
                    " INSERT INTO things (name) VALUES (i); COMMIT; END LOOP; END $$"
                )
                written += 200
                await other.execute("SELECT")  # its end delivers all bells so far
                spared = 0 < rings == heard.count("")
                rings = heard.count("")
        await recorder.until(written)
        await until_asleep(connection)
        assert recorder.ids == await logged(connection)


@pytest.mark.usefixtures("no_looking")
async def test_an_open_transaction_keeps_the_feed_awake(
    connection: Connection,
    other: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A writer that took the lock while the feed was awake commits late, without a bell; its
    changes are published all the same.
    """
    monkeypatch.setattr("app.feed.listener.BUSY_WITHIN_S", 1.0)  # even on a slow machine
    attempts: list[bool] = []
    fall_asleep = Listener.fall_asleep

    async def counted(listener: Listener) -> bool:
        attempts.append(await fall_asleep(listener))
        return attempts[-1]

    monkeypatch.setattr(Listener, "fall_asleep", counted)
    async with following(database_url) as (_, recorder):
        written = 0
        held = False
        while not held:  # until a writer finds the feed awake
            for _ in range(BUSY_BELLS):
                await insert(connection, f"{written}")
                written += 1
            transaction = other.transaction()
            await transaction.start()
            await insert(other, "late")
            held = await other.fetchval(
                "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory'"
                " AND pid = pg_backend_pid() AND objid = $1 AND mode = 'ShareLock')",
                SLEEPING,
            )
            if not held:
                await transaction.rollback()
        attempts.clear()
        await eventually(lambda: len(attempts) >= 3)
        assert not any(attempts)
        await transaction.commit()
        await recorder.until(written + 1)


async def test_every_change_once_under_concurrent_writers(database_url: str) -> None:
    """Eight connections write, commit in any order and roll back; each committed change is
    published exactly once, and each row's changes are in order.
    """

    async def write(seed: int) -> None:
        dice = random.Random(seed)
        connection = await connect(database_url)
        for number in range(80):
            transaction = connection.transaction()
            await transaction.start()
            await insert(connection, f"{seed} {number}")
            if dice.random() < 0.3:
                await asyncio.sleep(dice.random() * 0.03)
            await connection.execute("UPDATE things SET info = 'x' WHERE name LIKE $1", f"{seed} %")
            await (transaction.rollback() if dice.random() < 0.3 else transaction.commit())
        await connection.close()

    async with following(database_url) as (_, recorder):
        await asyncio.gather(*(write(seed) for seed in range(8)))
        connection = await connect(database_url)
        expected = await logged(connection)
        await connection.close()
        await recorder.until(len(expected))
        assert sorted(recorder.ids) == expected and recorder.out_of_order == 0


async def test_a_hundred_thousand_rows_in_one_transaction(
    connection: Connection, database_url: str
) -> None:
    """A transaction of 100,000 rows is published whole, once and in order, in flat memory."""
    process = psutil.Process()
    async with following(database_url, keep=False) as (_, recorder):
        await connection.execute("INSERT INTO things (name, info) SELECT 'warm', repeat('x', 900)")
        before = process.memory_info().rss
        most = before
        writing = asyncio.create_task(
            connection.execute(
                "INSERT INTO things (name, info) SELECT i, repeat(md5(i::text), 20)"
                " FROM generate_series(1, 100000) AS i"
            )
        )
        async with asyncio.timeout(40):
            while recorder.published < 100_001:
                most = max(most, process.memory_info().rss)
                await asyncio.sleep(0.01)
        await writing
        assert (recorder.published, recorder.out_of_order) == (100_001, 0)
        assert most - before < 40 * 1024**2  # the rows are 70 MB


# Nodes


async def test_of_two_nodes_one_leads_and_another_takes_over(
    connection: Connection, database_url: str
) -> None:
    """Two nodes publish everything; when the leader dies, the other takes over."""
    async with AsyncExitStack() as survivors:
        async with following(database_url) as (leader, first):
            await eventually(lambda: leader.leading)
            follower, second = await survivors.enter_async_context(following(database_url))
            for number in range(20):
                await insert(connection, f"{number}")
                await asyncio.sleep(0.02)
            await first.until(20)
            await second.until(20)
            assert not follower.leading
        await insert(connection, "after")
        await second.until(21)
        await eventually(lambda: follower.leading)
        await until_asleep(connection)


@pytest.mark.usefixtures("no_looking")
async def test_the_leader_rings_for_the_others(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower that never looks by itself is rung by the leader for each batch."""
    looked: set[Listener] = set()
    take_part = Listener.take_part

    async def noted(listener: Listener) -> None:
        await take_part(listener)
        looked.add(listener)

    monkeypatch.setattr(Listener, "take_part", noted)
    monkeypatch.setattr(pacing, "LOOK_S", 0.1)
    async with following(database_url) as (leader, _), following(database_url) as (_, recorder):
        await eventually(lambda: len(looked) == 2 and leader.leading)
        monkeypatch.setattr(pacing, "LOOK_S", 3600.0)
        looked.clear()
        await eventually(lambda: len(looked) == 2)  # both for the last time
        for number in range(30):
            await insert(connection, f"{number}")
            await recorder.until(number + 1)


# Faults


async def test_without_any_bell(connection: Connection, database_url: str) -> None:
    """If every NOTIFY is lost, changes are still published at the next look."""
    await connection.execute(
        "CREATE OR REPLACE FUNCTION feed.must_ring() RETURNS boolean LANGUAGE sql AS 'SELECT false'"
    )
    async with following(database_url) as (_, recorder):
        await until_asleep(connection)
        began = time.monotonic()
        await insert(connection, "a")
        await recorder.until(1)
        assert time.monotonic() - began < pacing.LOOK_S + 1


async def test_a_storm_of_foreign_bells(
    connection: Connection, other: Connection, database_url: str
) -> None:
    """Fifty thousand foreign notifications on our channel publish nothing and lose nothing."""
    async with following(database_url) as (feed, recorder):
        storm = asyncio.create_task(
            other.execute("SELECT pg_notify('feed', 'x' || i) FROM generate_series(1, 25000) AS i")
        )
        for number in range(25):
            await insert(connection, f"{number}")
            await connection.execute(
                "SELECT pg_notify('feed', i || repeat('y', 100)) FROM generate_series(1, 1000) AS i"
            )
        await storm
        await recorder.until(25)
        assert recorder.ids == await logged(connection) and feed.trouble() is None


BACKENDS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> ALL ($1)"


async def test_killed_backends(
    connection: Connection, other: Connection, database_url: str
) -> None:
    """The feed's connections are killed repeatedly during writes; nothing is lost."""
    ours = [connection.get_server_pid(), other.get_server_pid()]
    async with following(database_url) as (feed, recorder):
        for number in range(100):
            await insert(connection, f"{number}")
            if number % 20 == 0:
                for row in await other.fetch(BACKENDS, ours):
                    await other.execute("SELECT pg_terminate_backend($1)", row[0])
            await asyncio.sleep(0.005)
        await recorder.until(100)
        assert recorder.ids == await logged(connection)
        assert len(recorder.histories) == 1
        await eventually(lambda: feed.trouble() is None)


async def test_killed_within_a_batch(
    connection: Connection, other: Connection, database_url: str
) -> None:
    """The feed is disconnected between two pages of one transaction; no page is published twice."""
    ours = [connection.get_server_pid(), other.get_server_pid()]
    async with following(database_url) as (_, recorder):
        publish = recorder.publish
        killing: list[asyncio.Task[object]] = []

        def kill_after_the_first_page(page: Page) -> None:
            publish(page)
            if page.until.until is not None and not killing:
                kill = (
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != ALL ($1)"
                )
                kill += " AND datname = current_database()"
                killing.append(asyncio.ensure_future(other.execute(kill, ours)))

        recorder.publish = kill_after_the_first_page  # type: ignore[method-assign]
        await connection.execute(
            "INSERT INTO things (name) SELECT i FROM generate_series(1, 60000) AS i"
        )
        await recorder.until(60_000)
        assert killing
        assert recorder.ids == await logged(connection)


@pytest.mark.parametrize("end", [Server.restart, Server.kill])
async def test_restarted_postgres(
    private_postgres: Callable[..., Server], end: Callable[[Server], None]
) -> None:
    """Postgres is restarted, or killed and started again; the feed reports it, then continues after
    what it had published.
    """
    server = private_postgres()
    async with following(server.url) as (feed, recorder):
        connection = await connect(server.url)
        await insert(connection, "before")
        await recorder.until(1)
        # Written, but possibly not yet published when Postgres stops:
        await insert(connection, *(f"{number}" for number in range(1000)))
        connection.terminate()
        await asyncio.to_thread(end, server)
        await eventually(lambda: "cannot be reached" in (feed.trouble() or "cannot be reached"))
        await asyncio.to_thread(server.start)
        connection = await connect(server.url)
        await insert(connection, "after")
        await recorder.until(1002)
        assert recorder.ids == await logged(connection)
        await eventually(lambda: feed.trouble() is None)  # the page may not have been the last
        assert len(recorder.histories) == 1
        await connection.close()


async def test_two_phase_commit(private_postgres: Callable[..., Server]) -> None:
    """If writers cannot ring, the feed polls; a prepared transaction is published when it is
    committed, and holds nothing else back.
    """
    url = private_postgres(max_prepared_transactions=2, fsync="off").url
    connection = await connect(url)
    async with following(url) as (feed, recorder):
        await connection.execute(
            "BEGIN; INSERT INTO things (name) VALUES ('prepared'); PREPARE TRANSACTION 'p'"
        )
        began = time.monotonic()
        await insert(connection, "other")
        await recorder.until(1)
        assert time.monotonic() - began < 0.5
        await connection.execute("COMMIT PREPARED 'p'")
        await recorder.until(2)
        assert [json.loads(body or "")["name"] for body in recorder.bodies] == ["other", "prepared"]
        assert feed.trouble() is None
    await connection.close()


async def test_a_black_hole(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets between the feed and the database vanish, in one direction, the other, or both: the
    feed is not ready after a few seconds, and continues once they get through again.
    """
    monkeypatch.setattr("app.feed.listener.COMMAND_TIMEOUT_S", 1.0)
    monkeypatch.setattr(feed_module, "READ_TIMEOUT_S", 1.0)
    monkeypatch.setattr(pacing, "PROBE_S", 0.5)

    ways: list[dict[str, bool]] = [{"forth": False}, {"back": False}, {}]
    async with AsyncExitStack() as stack:
        proxies, feeds, recorders = [], [], []
        for _ in ways:
            proxy, url = await stack.enter_async_context(proxied(database_url))
            feed, recorder = await stack.enter_async_context(following(url))
            proxies.append(proxy)
            feeds.append(feed)
            recorders.append(recorder)
        await insert(connection, "before")
        for recorder in recorders:
            await recorder.until(1)
        for proxy, way in zip(proxies, ways, strict=True):
            proxy.hold(**way)
        await insert(connection, "meanwhile")
        for proxy, feed in zip(proxies, feeds, strict=True):
            await eventually(feed.trouble)
            proxy.cut()
            proxy.pass_on()
        for feed, recorder in zip(feeds, recorders, strict=True):
            await recorder.until(2)
            await eventually(lambda feed=feed: feed.trouble() is None)  # type: ignore[misc]
            assert recorder.ids == await logged(connection) and len(recorder.histories) == 1


async def test_a_log_emptied_by_hand(connection: Connection, database_url: str) -> None:
    """When the log is emptied by hand, every node begins the same new history."""
    async with following(database_url) as (one, first), following(database_url) as (two, second):
        await insert(connection, "a")
        await first.until(1)
        await second.until(1)
        await connection.execute("TRUNCATE feed.change")
        await eventually(lambda: len(first.histories) == len(second.histories) == 2)
        await insert(connection, "b")
        await first.until(2)
        await second.until(2)
        assert one.epoch == two.epoch and one.epoch != first.histories[0]
        assert len(first.histories) == len(second.histories) == 2


async def test_a_node_that_fell_behind_the_pruned_part(
    connection: Connection, database_url: str
) -> None:
    """A node cut off while the log was pruned beyond its position begins another history."""
    async with proxied(database_url) as (proxy, url), following(url) as (_, recorder):
        await insert(connection, "seen")
        await recorder.until(1)
        proxy.hold()
        proxy.cut()
        await insert(connection, "unseen", "unseen too")
        async with asyncio.timeout(20):  # other tests' transactions may delay it
            while await connection.fetchval("SELECT count(*) FROM feed.change"):
                await prune(connection, 0, 10**9, 1000)
                await asyncio.sleep(0.01)
        proxy.pass_on()
        proxy.cut()
        await eventually(lambda: len(recorder.histories) == 2)
        await insert(connection, "later")
        await recorder.until(2)
        assert json.loads(recorder.bodies[-1] or "")["name"] == "later"


async def test_a_dump_that_is_being_restored(connection: Connection, database_url: str) -> None:
    """The log's tables are there, but still empty: the feed waits until they are filled, and what
    comes then is another history.
    """
    async with proxied(database_url) as (proxy, url), following(url) as (feed, recorder):
        await connection.execute("CREATE TABLE dumped AS TABLE feed.state; DELETE FROM feed.state")
        proxy.cut()
        await eventually(lambda: "tables" in (feed.trouble() or ""))
        assert feed.trouble() == (
            "The database cannot be used: Tablecast's tables are missing from it"
            " (`tablecast migrate` makes them)."
        )
        await connection.execute(
            "UPDATE dumped SET history = gen_random_uuid();"
            "INSERT INTO feed.state SELECT * FROM dumped"
        )
        await eventually(lambda: len(recorder.histories) == 2)
        await insert(connection, "a")
        await recorder.until(1)


async def test_a_dump_restored_elsewhere(connection: Connection, database_url: str) -> None:
    """A dump is restored into a younger cluster, so all transactions in its log are in the future:
    the nodes begin another history and publish what is written.
    """
    before = await connection.fetchval("SELECT feed.epoch()")
    await connection.execute(
        "INSERT INTO feed.change (xid, topic, op) VALUES ('9000000000', 'thing', 'truncate');"
        "UPDATE feed.state SET horizon = '8000000000', redrawn = '8000000000'"
    )
    async with following(database_url) as (one, first), following(database_url) as (two, second):
        await insert(connection, "a")
        await first.until(1)
        await second.until(1)
        assert one.epoch == two.epoch and one.epoch and one.epoch.name != before
        assert len(first.histories) == len(second.histories) == 1
        assert await logged(connection) == first.ids


async def test_a_long_open_transaction_is_named(
    other: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server's log says which process, user and application holds changes back, and for how
    long.
    """
    monkeypatch.setattr(feed_module, "HELD_BACK_S", 0.2)
    monkeypatch.setattr(pacing, "PROBE_S", 0.2)
    with caplog.at_level(logging.WARNING, "tablecast.feed"):
        async with following(database_url), other.transaction():
            await insert(other, "open")
            await eventually(lambda: f"pid {other.get_server_pid()}" in caplog.text)
    assert "holds back" in caplog.text and "idle in transaction" in caplog.text


async def test_looking_on_demand(connection: Connection, database_url: str) -> None:
    """A feed that is asked to look has read everything committed before."""
    async with following(database_url) as (feed, recorder):
        for number in range(20):
            await insert(connection, f"{number}")
            assert await feed.look()
            assert recorder.published == number + 1
