"""Offsets: what was formatted is parsed back, and nothing else is accepted."""

import json
import string
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.database.connections import Connection, connect
from app.feed import log
from app.feed.offset import GREATEST_XID, Epoch, InvalidOffset, Offset, Position, xid_after
from tests.support.writing import insert

EPOCH = Epoch("0123abcd", "secret")
ALLOWED = set(string.ascii_letters + string.digits + ".:,_-")


def xids(greatest: int = GREATEST_XID) -> st.SearchStrategy[int]:
    """Transaction ids as Postgres assigns them: their lower 32 bits are at least 3."""
    return st.integers(3, greatest).filter(lambda xid: xid & 0xFFFFFFFF >= 3)


@st.composite
def positions(draw: st.DrawFn) -> Position:
    xmax = draw(xids())
    running = draw(st.frozensets(xids(xmax - 1), max_size=8) if xmax > 3 else st.just([]))
    return Position(xmax, frozenset(running))


offsets = st.builds(Offset, positions()) | st.builds(
    Offset, positions(), positions(), st.integers(0, 2**63 - 1)
)


@pytest.mark.parametrize(
    ("xid", "following"),
    [(3, 4), (2**32 - 2, 2**32 - 1), (2**32 - 1, 2**32 + 3), (7 * 2**32 - 1, 7 * 2**32 + 3)],
)
def test_ids_that_postgres_leaves_out_are_stepped_over(xid: int, following: int) -> None:
    """The last id before a multiple of 2^32 is followed by the fourth id after it."""
    assert xid_after(xid) == following
    position = Position(3, frozenset()).advanced(Position(following + 5, frozenset()), xid)
    assert Position.parse(str(position)).xmax == following


@given(positions())
def test_position_is_read_as_written(position: Position) -> None:
    """A position goes to Postgres and comes back unchanged."""
    assert Position.parse(str(position)) == position


@given(offsets)
def test_offset_is_read_as_written(offset: Offset) -> None:
    """A client sends back exactly the text it received, and it is understood."""
    text = EPOCH.format(offset)
    assert EPOCH.parse(text) == offset
    assert set(text) <= ALLOWED


@given(positions(), positions(), st.lists(st.integers(1, 2**63 - 1), max_size=5))
def test_offsets_of_a_batch_are_written_alike(
    since: Position, until: Position, ids: list[int]
) -> None:
    """A batch's offsets, whose common part is signed once, equal those formatted one by one."""
    write = EPOCH.writer(since, until)
    for id in ids:
        assert write(id) == EPOCH.format(Offset(since, until, id))


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    """Arbitrary text raises InvalidOffset and no other error."""
    with pytest.raises(InvalidOffset):
        EPOCH.parse(text)


@given(offsets, st.integers(0, 10_000), st.characters(codec="ascii"))
def test_one_changed_character_is_refused(offset: Offset, at: int, character: str) -> None:
    """An offset with one character changed is refused."""
    text = EPOCH.format(offset)
    at %= len(text)
    changed = text[:at] + character + text[at + 1 :]
    if changed == text:
        assert EPOCH.parse(changed) == offset
    else:
        with pytest.raises(InvalidOffset):
            EPOCH.parse(changed)


@given(offsets)
def test_foreign_and_forged_offsets_are_refused(offset: Offset) -> None:
    """An offset of another epoch, or signed with another secret, is refused."""
    for other in (Epoch("ffffffff", "secret"), Epoch("0123abcd", "another secret")):
        with pytest.raises(InvalidOffset):
            EPOCH.parse(other.format(offset))


@pytest.mark.parametrize(
    "body",
    [
        "",
        "0123abcd",
        "0123abcd.",
        "0123abcd.5:5",
        "0123abcd.5:5:.5:5:",
        "0123abcd.5:5:.5:5:.x",
        "0123abcd.5:5:.5:5:.-1",
        "0123abcd.5:5:.5:5:.1.1",
        "0123abcd.5:4:",
        "0123abcd.0:0:",
        "0123abcd.05:5:",
        "0123abcd.3:5:4",
        "0123abcd.3:5:4,3",
        "0123abcd.3:5:3,3",
        "0123abcd.3:5:3,",
        "0123abcd.3:5:6",
        f"0123abcd.{2**63}:{2**63}:",
        "0123abcd. 5:5:",
        "0123abcd.5:5:'; drop table things",
    ],
)
def test_a_good_signature_does_not_make_nonsense_an_offset(body: str) -> None:
    """Even with a valid signature, text that is not an offset raises InvalidOffset."""
    with pytest.raises(InvalidOffset):
        EPOCH.parse(EPOCH.sign(body.encode()))


def test_an_endless_text_is_refused_at_once() -> None:
    """A megabyte sent as an offset costs nothing."""
    with pytest.raises(InvalidOffset):
        EPOCH.parse("1" * 1_000_000)


@given(positions(), positions())
def test_covers_is_what_it_says(one: Position, other: Position) -> None:
    """One reader covers another if it has read every transaction that the other has."""

    def has_read(position: Position, xid: int) -> bool:
        return xid < position.xmax and xid not in position.running

    # The transactions that either mentions, and their neighbours, stand for all transactions.
    mentioned = {one.xmax, other.xmax, *one.running, *other.running}
    candidates = {xid + step for xid in mentioned for step in (-1, 0, 1) if xid + step > 0}
    expected = all(has_read(one, xid) for xid in candidates if has_read(other, xid))
    assert one.covers(other) == expected


@pytest.mark.database
async def test_sql_and_python_write_the_same_offset(connection: Connection) -> None:
    """The offset of a REST response, formatted by SQL, is what the feed's Epoch formats."""
    await connection.execute("INSERT INTO things (name) VALUES ('one')")
    text, position = await connection.fetchrow("SELECT feed.offset(), feed.position()::text")
    epoch = await log.current_epoch(connection)
    assert epoch.parse(text) == Offset(Position.parse(position))
    assert epoch.format(Offset(Position.parse(position))) == text


@pytest.mark.database
async def test_the_offset_of_a_transaction_that_writes_on(
    connection: Connection, database_url: str
) -> None:
    """A list and its offset are read in the middle of a transaction: what it writes afterwards
    follows, whatever others commit meanwhile.
    """
    other = await connect(database_url)
    async with connection.transaction():
        await insert(connection, "before")
        await other.execute("CREATE TABLE another ()")
        text = await connection.fetchval("SELECT feed.offset()")
        await insert(connection, "after")
    since = (await log.current_epoch(connection)).parse(text)
    changes = (await log.read(connection, since)).changes
    names = [json.loads(change.body or "")["name"] for change in changes]
    assert names == ["before", "after"]
    await other.close()


@pytest.mark.database
async def test_the_epoch_changes_with_the_history(connection: Connection) -> None:
    """A new history makes all earlier offsets foreign."""
    before = await log.current_epoch(connection)
    text = await connection.fetchval("SELECT feed.offset()")
    await connection.execute("UPDATE feed.state SET history = $1", uuid.uuid4())
    after = await log.current_epoch(connection)
    assert after != before
    with pytest.raises(InvalidOffset):
        after.parse(text)
