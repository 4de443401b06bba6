"""The sample table `public.things`, made unless THINGS=no."""

import os

from alembic import context

from app.database.connections import Refusal
from app.database.installation import SampleTable, sample_table
from app.settings import Settings
from migrations.sql_files import on_connection, run_file, run_text

OTHER_TABLE = """
    SELECT relation::text FROM feed.topic
    WHERE topic = 'thing' AND relation <> 'public.things'::regclass
"""
WATCH = "SELECT feed.watch('public.things', 'thing', 'name')"


def wants_sample() -> bool:
    """The setting THINGS: as the caller has read it, else from the environment."""
    given = context.config.attributes.get("things")
    return Settings.read(os.environ).things if given is None else bool(given)


def found_sample() -> SampleTable | None:
    """The sample table; None if there is none. (Were it a foreign one, no revision would run.)"""
    found: SampleTable | None = on_connection(sample_table)
    return found


def make_sample() -> None:
    """Create the table unless it is there: it outlives a dropped schema `feed`."""
    if found_sample() is None:
        run_file("things.sql")


def complete_sample() -> None:
    """Create and watch the table in a database that was migrated under THINGS=no."""
    make_sample()
    other = on_connection(lambda connection: connection.fetchval(OTHER_TABLE))
    if other is not None:
        raise Refusal(
            f"The topic thing, which the sample table has, is that of {other}: watch {other} under"
            " another topic, or set THINGS=no to do without the sample."
        )
    found = found_sample()
    if found is not None and not found.is_watched:
        run_text(WATCH)
