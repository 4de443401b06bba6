"""What one client asks of one topic, and what that means for the table. No I/O."""

import hashlib
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field

from app.feed.log import too_large
from app.feed.row import excerpt
from app.live.condition import Condition, Unjudgeable
from app.live.filter import EVERYTHING, Junction, canonical
from app.live.table import Table

LOADING = "loading"
"""The offset of a client that has been sent nothing, or only part of a snapshot."""

FINGERPRINT_BYTES = 9


@dataclass(frozen=True, slots=True)
class Identity:
    """On whose behalf rows are read. There is one so far, everybody's."""

    role: str | None = None


EVERYBODY = Identity()


@dataclass(frozen=True, slots=True)
class Request:
    """A subscription as a client asks for it.

    `columns`: those it wants (None: all). `old`: whether updates and destroys carry the old row.
    `snapshot`: whether it wants the rows there are, before the changes. `fingerprint` names what is
    asked for: clients with another one hold other rows.
    """

    topic: str
    filter: Junction = EVERYTHING
    columns: tuple[str, ...] | None = None
    old: bool = False
    snapshot: bool = True
    identity: Identity = EVERYBODY
    fingerprint: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        filter = canonical(self.filter)
        parts = (self.topic, filter, self.columns, self.old, self.snapshot, self.identity)
        digest = hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).digest()
        name = urlsafe_b64encode(digest[:FINGERPRINT_BYTES]).decode()
        object.__setattr__(self, "fingerprint", name)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Subscription:
    """A request bound to a table as it is. Equal requests for the same table share one."""

    table: Table
    condition: Condition
    columns: tuple[str, ...] | None
    old: bool
    identity: Identity

    def shown(self, row: str, is_too_large: bool = False) -> str:
        """Return what clients see of a row: the columns they asked for; of a row that is too large,
        if any of these is missing, what identifies it and `too_large`.

        Raises Unjudgeable if the row does not fit this table as it is.
        """
        selected = None
        if self.columns is not None:
            selected = excerpt(row, self.columns)
        elif not is_too_large:
            selected = row
        if selected is None and is_too_large:
            shown = tuple(name for name in self.table.identifying if self._has(name))
            selected = identified(row, shown)
        if selected is None:
            raise Unjudgeable(f"a row of {self.table.topic} lacks a column")
        return selected

    def _has(self, column: str) -> bool:
        return self.columns is None or column in self.columns

    def key_of(self, row: str) -> str:
        """Return the key columns of a row, as a JSON object. Raises Unjudgeable."""
        key = excerpt(row, self.table.key)
        if key is None:
            raise Unjudgeable(f"a row of {self.table.topic} lacks a key column")
        return key


def identified(row: str, identifying: tuple[str, ...]) -> str | None:
    """Return what identifies a row that is too large, and `too_large`; without the latter if one of
    these columns has that name, so that clients can tell only by the columns that are missing. None
    if the row lacks what identifies it.
    """
    return too_large(row, identifying, None) or excerpt(row, identifying)


def columns_of(table: Table, asked: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the columns that a client gets: those it asked for, and those of the key, without
    which it could not tell the rows apart. Raises SubscriptionRefused.
    """
    if asked is None:
        return None
    for name in asked:
        table.column(name, "columns")
    wanted = {*asked, *table.key}
    return tuple(column.name for column in table.columns if column.name in wanted)
