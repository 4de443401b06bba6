"""What many tests do to the database, and the resulting offset."""

from app.database.connections import Connection
from app.feed import log
from app.feed.offset import Offset


async def insert(connection: Connection, *names: str) -> None:
    """Create things in one statement."""
    await connection.execute("INSERT INTO things (name) SELECT unnest($1::text[])", names)


async def watch(connection: Connection, definition: str, name: str = "watched") -> None:
    """Create a table and watch it with the topic `watched`."""
    await connection.execute(f"CREATE TABLE {name} ({definition})")
    await connection.execute(f"SELECT feed.watch('{name}', 'watched')")


async def current_offset(connection: Connection) -> Offset:
    """Return the offset of now."""
    return Offset(await log.current_position(connection))
