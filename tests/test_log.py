"""Positions in, pages out: nothing is skipped or repeated, however transactions commit."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest

from app.database.connections import Connection, connect
from app.feed import log
from app.feed.log import HistoryLost, Page
from app.feed.offset import Offset
from tests.support.writing import current_offset, insert

OneMore = Callable[[], "asyncio.Future[Connection]"]


@pytest.fixture(autouse=True, params=["the latest", "a batch", "a large batch"])
def way_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test three times: reading like a feed that keeps up, like one that is behind, and
    like a batch of any size is read.
    """
    if request.param != "the latest":
        monkeypatch.setattr(log, "FEW_ROWS", 0)
    if request.param == "a large batch":
        monkeypatch.setattr(log, "BATCH_ROWS", 0)


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[Connection]:
    """A second connection to the test's database."""
    opened = await connect(database_url)
    yield opened
    opened.terminate()


async def quiet_start(connection: Connection) -> Offset:
    """Return an offset taken while no transaction is running anywhere on the server. A running one
    would be in the position, and pruning beyond it would invalidate the position, to be safe.
    """
    async with asyncio.timeout(20):
        while (since := await current_offset(connection)).position.running:
            await asyncio.sleep(0.002)
    return since


async def until_pruned(
    connection: Connection, retention: float, keep: int, step: int, *, changes: int
) -> None:
    """Prune until this many changes are gone. Transactions of other tests, in other databases on
    the same server, may delay it.
    """
    async with asyncio.timeout(20):
        while changes:
            deleted = await log.prune(connection, retention, keep, step)
            assert deleted <= changes
            changes -= deleted
            await asyncio.sleep(0.01)


def names(page: Page) -> list[str]:
    """Return the names on a page."""
    return [json.loads(change.body or "")["name"] for change in page.changes]


async def read_on(connection: Connection, since: Offset) -> tuple[list[int], Offset]:
    """Read all pages after an offset; return the ids and the offset reached."""
    ids: list[int] = []
    while True:
        page = await log.read(connection, since)
        assert page.since == since
        ids += [change.id for change in page.changes]
        since = page.until
        if since.until is None:
            return ids, since


async def test_nothing_to_read(connection: Connection) -> None:
    """A reader that has read everything gets an empty page and stays where it is."""
    since = await current_offset(connection)
    page = await log.read(connection, since)
    assert (page.changes, page.until) == ([], since)


async def test_every_way_of_reading_leads_to_the_same_position(
    connection: Connection,
    other: Connection,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A read of the latest changes, a read of any number of changes, and feed.position() arrive at
    the same position, with one transaction that has since ended, one still open, and one that
    failed.
    """
    ended, older = other.transaction(), connection.transaction()
    reader = await connect(database_url)
    await ended.start()
    await insert(other, "ends")
    since = await current_offset(reader)
    await ended.commit()
    await insert(reader, "a")
    await older.start()
    await insert(connection, "stays open")
    with pytest.raises(asyncpg.UniqueViolationError):
        await insert(reader, "a")
    await insert(reader, "b", "c")
    async with reader.transaction(isolation="repeatable_read", readonly=True):
        monkeypatch.setattr(log, "FEW_ROWS", 1000)
        latest = await log.read(reader, since)
        monkeypatch.setattr(log, "FEW_ROWS", 0)
        paged = await log.read(reader, since)
        now = await current_offset(reader)
    assert latest.until == paged.until == now and now.position.running
    assert names(latest) == names(paged) == ["ends", "a", "b", "c"]
    await older.rollback()
    reader.terminate()


async def test_commits_out_of_order(connection: Connection, other: Connection) -> None:
    """Of two writers, the first to draw an id commits last; both are read, once each."""
    since = await current_offset(connection)
    transaction = other.transaction()
    await transaction.start()
    await insert(other, "early id, late commit")
    await insert(connection, "late id, early commit")
    page = await log.read(connection, since)
    assert names(page) == ["late id, early commit"]
    await transaction.commit()
    assert names(await log.read(connection, page.until)) == ["early id, late commit"]


async def test_an_open_transaction_holds_back_only_itself(
    connection: Connection, other: Connection
) -> None:
    """While one transaction stays open, the changes of others are read as they come, once each."""
    since = await current_offset(connection)
    transaction = other.transaction()
    await transaction.start()
    for number in range(50):
        await insert(other, f"open {number}")
        await insert(connection, f"other {number}")
        page = await log.read(connection, since)
        assert names(page) == [f"other {number}"]
        since = page.until
    await transaction.commit()
    page = await log.read(connection, since)
    assert names(page) == [f"open {number}" for number in range(50)]


async def test_rolled_back_changes_are_never_read(
    connection: Connection, other: Connection
) -> None:
    """A transaction that was seen running and is then rolled back leaves nothing to read."""
    since = await current_offset(connection)
    transaction = other.transaction()
    await transaction.start()
    await insert(other, "undone")
    await insert(connection, "done")
    page = await log.read(connection, since)
    await transaction.rollback()
    assert (await log.read(connection, page.until)).changes == []


async def test_a_position_does_not_claim_what_left_no_trace(connection: Connection) -> None:
    """A position ends just after the newest change, not after ids that may be reused after a crash:
    those of transactions that were rolled back.
    """
    await insert(connection, "kept")
    before = (await log.current_position(connection)).xmax
    for _ in range(5):
        with pytest.raises(asyncpg.UniqueViolationError):
            await insert(connection, "kept")
    assert (await log.current_position(connection)).xmax == before


async def test_a_large_transaction_comes_in_pages(connection: Connection) -> None:
    """A batch longer than a page is read page by page, in order, and can be continued from any
    page; changes committed in the meantime come after it.
    """
    since = await current_offset(connection)
    await connection.execute("INSERT INTO things (name) SELECT i FROM generate_series(1, 12000) i")
    pages: list[Page] = []
    offset = since
    while not pages or offset.until is not None:
        pages.append(await log.read(connection, offset))
        offset = pages[-1].until
        await insert(connection, f"meanwhile {len(pages)}")
    assert [len(page.changes) for page in pages] == [5000, 5000, 2000]
    assert [name for page in pages for name in names(page)] == [str(i) for i in range(1, 12001)]
    assert names(await log.read(connection, offset)) == [f"meanwhile {i}" for i in (1, 2, 3)]
    again = await log.read(connection, pages[0].until)
    assert (again.changes, again.until) == (pages[1].changes, pages[1].until)


@pytest.mark.parametrize("transactions", [3, 40])
async def test_continuing_behind_any_change(connection: Connection, transactions: int) -> None:
    """A reader that stopped within a batch, of few or many transactions, continues with the next
    change.
    """
    since = await current_offset(connection)
    for number in range(transactions):
        await insert(connection, f"{number} a", f"{number} b")
    page = await log.read(connection, since)
    ids = [change.id for change in page.changes]
    assert len(ids) == 2 * transactions and ids == sorted(ids)
    for place, id in enumerate(ids):
        rest = await log.read(connection, Offset(since.position, page.until.position, id))
        assert [change.id for change in rest.changes] == ids[place + 1 :]
        assert rest.until == page.until


async def test_a_read_stops_where_it_is_told(connection: Connection, other: Connection) -> None:
    """A read up to a position returns what that position has seen, whatever came later."""
    since = await current_offset(connection)
    transaction = other.transaction()
    await transaction.start()
    await insert(other, "open")
    await insert(connection, "before")
    until = await log.current_position(connection)
    await transaction.commit()
    await insert(connection, "after")
    page = await log.read(connection, since, until)
    assert (names(page), page.until) == (["before"], Offset(until))
    assert names(await log.read(connection, page.until)) == ["open", "after"]


async def test_long_rows_make_short_pages(connection: Connection) -> None:
    """Rows of several megabytes come with only a few per page, so that no page is long."""
    since = await current_offset(connection)
    for _ in range(3):
        await connection.execute(
            # random text, which hardly compresses
            "INSERT INTO things (name, info) SELECT gen_random_uuid(), string_agg(md5(i || $1), '')"
            " FROM generate_series(1, 40000) AS i",
            str(random.random()),
        )
    lengths: list[int] = []
    while not lengths or since.until is not None:
        page = await log.read(connection, since)
        lengths.append(len(page.changes))
        since = page.until
    assert sum(lengths) == 3 and max(lengths) == 1


async def test_rows_that_compress_well_make_short_pages_too(connection: Connection) -> None:
    """A megabyte of one letter is small on disk and large in memory; pages stay short."""
    since = await current_offset(connection)
    await connection.execute(
        "INSERT INTO things (name, info) SELECT i, repeat('x', 1000000)"
        " FROM generate_series(1, 40) AS i"
    )
    count = 0
    while not count or since.until is not None:
        page = await log.read(connection, since)
        assert sum(len(change.body or "") for change in page.changes) < 16 * log.PAGE_BYTES
        count += len(page.changes)
        since = page.until
    assert count == 40


async def test_every_change_once_under_concurrent_writers(database_url: str) -> None:
    """Twelve connections write, commit in any order and roll back; a reader gets each committed
    change exactly once.
    """
    reader = await connect(database_url)
    since, ids = await current_offset(reader), []

    async def write(seed: int) -> None:
        dice = random.Random(seed)
        connection = await connect(database_url)
        for number in range(60):
            transaction = connection.transaction()
            await transaction.start()
            for part in range(dice.randint(1, 3)):
                await insert(connection, f"{seed} {number} {part}")
                await asyncio.sleep(dice.random() * 0.004)
            await (transaction.rollback() if dice.random() < 0.3 else transaction.commit())
        await connection.close()

    writers = asyncio.gather(*(write(seed) for seed in range(12)))
    while not writers.done():
        found, since = await read_on(reader, since)
        ids += found
    await writers
    ids += (await read_on(reader, since))[0]
    logged = [row[0] for row in await reader.fetch("SELECT id FROM feed.change ORDER BY id")]
    assert sorted(ids) == logged and len(logged) > 500
    await reader.close()


@pytest.mark.parametrize("bulk_is_older", [True, False])
@pytest.mark.parametrize(
    "read", [(log.READ_BATCH, log.FEW_ROWS), (log.READ_LARGE, 0)], ids=["batch", "large"]
)
async def test_reading_costs_the_same_in_a_long_log(
    connection: Connection, other: Connection, read: tuple[str, int], bulk_is_older: bool
) -> None:
    """Reading the newest change touches few blocks, even after 50,000 older changes and 50,000
    uncommitted ones, which began before or after the position.
    """
    bulk = "INSERT INTO things (name) SELECT -i FROM generate_series(1, 50000) i"
    await connection.execute("INSERT INTO things (name) SELECT i FROM generate_series(1, 50000) i")
    await connection.execute("ANALYZE feed.change; SET enable_seqscan = off")
    async with other.transaction():
        if bulk_is_older:
            await other.execute(bulk)
            await insert(connection, "newer than the bulk")
        since = await current_offset(connection)
        if not bulk_is_older:
            await other.execute(bulk)
        await insert(connection, "new")
        query, third = read
        plan = json.loads(
            await connection.fetchval(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT json) {query}",
                str(since.position),
                None,
                third,
                log.PAGE_ROWS,
                log.PAGE_BYTES,
                True,
                log.ANY_SIZE,
                log.SHORT_MEMBER_BYTES,
            )
        )[0]["Plan"]
    assert plan["Actual Rows"] == 2
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 300


# Pruned and lost changes


async def test_pruned_changes_are_not_passed_over(connection: Connection) -> None:
    """A reader whose position is before the pruned part gets an error; a later one does not."""
    old = await current_offset(connection)
    await insert(connection, "old", "old too")
    newer = await quiet_start(connection)
    await insert(connection, "new")
    await until_pruned(connection, 3600, 1, 1000, changes=2)
    with pytest.raises(HistoryLost):
        await log.read(connection, old)
    assert names(await log.read(connection, newer)) == ["new"]


async def test_an_offset_within_a_half_pruned_batch(connection: Connection) -> None:
    """A partly pruned batch cannot be continued, even after the pruned part."""
    since = await current_offset(connection)
    await insert(connection, *"abcd")
    page = await log.read(connection, since)
    end = await quiet_start(connection)
    await until_pruned(connection, 3600, 2, 1000, changes=2)
    with pytest.raises(HistoryLost):
        await log.read(connection, Offset(since.position, page.until.position, page.changes[2].id))
    assert (await log.read(connection, end)).changes == []


async def test_pruning_all_keeps_the_position(connection: Connection) -> None:
    """When every change has been pruned, a reader that had read them all continues."""
    await insert(connection, "a", "b")
    since = await quiet_start(connection)
    await until_pruned(connection, 0, 10**9, 1000, changes=2)
    epoch = await log.current_epoch(connection)
    assert (await log.read(connection, since)).changes == []
    assert await quiet_start(connection) == since
    await insert(connection, "c")
    assert names(await log.read(connection, since)) == ["c"]
    assert await log.current_epoch(connection) == epoch


async def test_pruning_spares_what_others_may_not_have_seen(
    connection: Connection, other: Connection
) -> None:
    """Changes after a running transaction are kept, and so are young changes after old ones."""
    transaction = other.transaction()
    await transaction.start()
    await insert(other, "open")
    await insert(connection, "done")
    assert await log.prune(connection, 0, 10**9, 1000) == 0
    await transaction.commit()
    assert await log.prune(connection, 3600, 10**9, 1000) == 0
    await until_pruned(connection, 0, 10**9, 1, changes=1)
    await until_pruned(connection, 0, 10**9, 1000, changes=1)


async def test_pruning_spares_what_a_reader_needs_to_continue(
    connection: Connection, other: Connection
) -> None:
    """A reader has read everything, but last looked while an older transaction was running; pruning
    waits until it has looked again.
    """
    transaction = other.transaction()
    await transaction.start()
    await other.fetchval("SELECT pg_current_xact_id()")
    await insert(connection, "read")
    reader = await current_offset(connection)
    assert reader.position.running
    await transaction.commit()
    async with asyncio.timeout(20):  # other tests' transactions may delay it
        while await connection.fetchval(
            "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint < $1",
            reader.position.xmax,
        ):
            await asyncio.sleep(0.01)
    assert await log.prune(connection, 0, 10**9, 1000, reader.position) == 0
    page = await log.read(connection, reader)
    assert page.changes == []
    assert await log.prune(connection, 0, 10**9, 1000, page.until.position) == 1
    assert (await log.read(connection, page.until)).changes == []


@pytest.mark.parametrize(
    "by_hand",
    [
        "TRUNCATE feed.change",
        "DELETE FROM feed.change",
        "DELETE FROM feed.change WHERE id = 1",
        "UPDATE feed.change SET topic = 'other' WHERE id = 1",
        "SELECT feed.prune('1h', 1000, 1000); DELETE FROM feed.change",  # one transaction
    ],
)
async def test_a_log_changed_by_hand_is_another_history(
    connection: Connection, by_hand: str
) -> None:
    """Emptying or editing the log begins another epoch, and no position can be continued."""
    await insert(connection, "a", "b")
    since, epoch = await current_offset(connection), await log.current_epoch(connection)
    await connection.execute(by_hand)
    assert await log.current_epoch(connection) != epoch
    await insert(connection, "c")
    with pytest.raises(HistoryLost):
        await log.read(connection, since)
    assert (await log.read(connection, await current_offset(connection))).changes == []


async def test_commits_that_were_lost_begin_another_epoch(connection: Connection) -> None:
    """If a reader's newest change is missing but was not pruned, it disowns the history; if it is
    there, it does not.
    """
    await insert(connection, "a")
    kept, epoch = await log.current_position(connection), await log.current_epoch(connection)
    await insert(connection, "b")
    lost = await log.current_position(connection)
    # As after a crash under synchronous_commit = off: the row is gone and nothing recorded it.
    await connection.execute(
        "ALTER TABLE feed.change DISABLE TRIGGER rewrite_history;"
        "DELETE FROM feed.change WHERE id = 2;"
        "ALTER TABLE feed.change ENABLE TRIGGER rewrite_history"
    )
    await log.disown(connection, kept)
    assert await log.current_epoch(connection) == epoch
    with pytest.raises(HistoryLost):
        await log.read(connection, Offset(lost))
    await log.disown(connection, lost)
    assert await log.current_epoch(connection) != epoch


async def test_transactions_that_hold_changes_back(
    connection: Connection, other: Connection
) -> None:
    """A transaction that has written and stays open is named; one that only reads is not."""
    assert await log.holding_back(connection, 0) == []
    async with other.transaction():
        await other.execute("SELECT count(*) FROM things")
        assert await log.holding_back(connection, 0) == []
        await insert(other, "open")
        [holder] = await log.holding_back(connection, 0)
        assert holder["pid"] == other.get_server_pid() and holder["state"] == "idle in transaction"
        assert await log.holding_back(connection, 60) == []
