"""Positions and offsets: parse, format, compare. No I/O."""

import hashlib
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from hmac import compare_digest
from typing import Self

# 64-bit transaction ids have at most 20 digits; a snapshot lists at most one per connection.
LONGEST_OFFSET_CHARS = 64 * 1024
GREATEST_XID = 2**63 - 1
# Postgres skips ids whose lower 32 bits are below this, and rejects snapshots that contain them.
FIRST_XID = 3


def xid_after(xid: int) -> int:
    """Return the next transaction id (FullTransactionIdAdvance in Postgres's transam.h)."""
    following = xid + 1
    return following + max(0, FIRST_XID - (following & 0xFFFFFFFF))


class InvalidOffset(ValueError):
    """The text is not an offset that this feed issued."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a reader is: the snapshot up to which it has read everything.

    `xmax`: this transaction and all later ones are unread. `running`: earlier ones that had not
    ended.
    """

    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse Postgres's `pg_snapshot` text, `xmin:xmax:xip,...`. Raises InvalidOffset."""
        try:
            xmin_text, xmax_text, xip_text = text.split(":")
            xmin, xmax = int(xmin_text), int(xmax_text)
            running = [int(xid) for xid in xip_text.split(",")] if xip_text else []
        except ValueError:
            raise InvalidOffset(f"not a snapshot: {text[:100]!r}") from None
        position = cls(xmax, frozenset(running))
        if (
            not 0 < xmin <= xmax <= GREATEST_XID
            or any(xid & 0xFFFFFFFF < FIRST_XID for xid in (xmax, *running))
            or str(position) != text
        ):
            raise InvalidOffset(f"not a snapshot: {text[:100]!r}")
        return position

    def __str__(self) -> str:
        running = sorted(self.running)
        return f"{running[0] if running else self.xmax}:{self.xmax}:{','.join(map(str, running))}"

    def covers(self, other: "Position") -> bool:
        """Return whether this reader has read everything that `other` has."""
        return other.xmax <= self.xmax and all(
            xid >= other.xmax or xid in other.running for xid in self.running
        )

    def advanced(self, snapshot: "Position", newest: int | None) -> "Position":
        """Return the position after reading from here everything that a snapshot can see.

        `newest` is the newest transaction that was read (None: nothing). The position is cut back
        to just after it, like feed.position().
        """
        xmax = self.xmax if newest is None else max(self.xmax, xid_after(newest))
        return Position(xmax, frozenset(xid for xid in snapshot.running if xid < xmax))


@dataclass(frozen=True, slots=True)
class Offset:
    """Where a client continues: after a position or, with `until`, after change `id` of the batch
    between two positions.
    """

    position: Position
    until: Position | None = None
    id: int = 0


class Epoch:
    """One unbroken history of the log: it formats offsets and recognizes its own.

    Offsets are signed, so each can be judged by itself: if the signature is valid, a node of this
    database issued it, and its parts need no further checks.
    """

    def __init__(self, name: str, secret: str) -> None:
        self.name = name
        self._signer = hashlib.sha256(secret.encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Epoch) and (
            (self.name, self._signer.digest()) == (other.name, other._signer.digest())
        )

    def format(self, offset: Offset) -> str:
        """Format an offset: only letters, digits and `.:,_-`, so it needs no escaping anywhere."""
        if offset.until is None:
            return self.sign(f"{self.name}.{offset.position}".encode())
        return self.writer(offset.position, offset.until)(offset.id)

    def writer(self, position: Position, until: Position) -> "BatchOffsets":
        """Return a function that formats the offsets within one batch, given change ids."""
        return BatchOffsets(self, f"{self.name}.{position}.{until}.".encode())

    def parse(self, text: str) -> Offset:
        """Parse an offset of this epoch; InvalidOffset if it is foreign, forged or malformed."""
        if len(text) > LONGEST_OFFSET_CHARS or not text.isascii():
            raise InvalidOffset("not an offset")
        body, _, _ = text.rpartition(".")
        name, *parts = body.split(".")
        if name != self.name or not compare_digest(self.sign(body.encode()), text):
            raise InvalidOffset("of another epoch, or not issued by this feed")
        match parts:
            case [position]:
                return Offset(Position.parse(position))
            case [position, until, id] if id.isdecimal():
                return Offset(Position.parse(position), Position.parse(until), int(id))
        raise InvalidOffset("not an offset")

    def sign(self, body: bytes) -> str:
        """Return the offset that consists of a body and its signature."""
        signer = self._signer.copy()
        signer.update(body)
        return f"{body.decode()}.{signature(signer.digest())}"


class BatchOffsets:
    """Formats the offsets within one batch; their common part is signed only once."""

    def __init__(self, epoch: Epoch, common: bytes) -> None:
        self._signer = epoch._signer.copy()
        self._signer.update(common)
        self._common = common.decode()

    def __call__(self, id: int) -> str:
        signer = self._signer.copy()
        text = str(id)
        signer.update(text.encode())
        return f"{self._common}{text}.{signature(signer.digest())}"


def signature(digest: bytes) -> str:
    """Return eight characters: 48 bits, enough against online guessing, not offline attacks."""
    return urlsafe_b64encode(digest[:6]).decode()
