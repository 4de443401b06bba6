"""Positions and offsets: parse, format, compare. No I/O."""

import hashlib
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from typing import Self

# 64-bit transaction ids have at most 20 digits; a snapshot lists one per connection at most.
LONGEST_OFFSET_CHARS = 64 * 1024
GREATEST_XID = 2**63 - 1
# Postgres leaves out ids whose lower 32 bits are below this, and refuses snapshots that name them.
FIRST_XID = 3


def xid_after(xid: int) -> int:
    """The transaction id that follows one (FullTransactionIdAdvance in Postgres's transam.h)."""
    following = xid + 1
    return following + max(0, FIRST_XID - (following & 0xFFFFFFFF))


class InvalidOffset(ValueError):
    """The text is not an offset this feed gave out."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a reader is: the snapshot up to which it has read everything.

    `xmax`: transactions from here on are unread. `running`: those below it that had not ended.
    """

    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read Postgres's `pg_snapshot` text, `xmin:xmax:xip,...`; InvalidOffset if it is none."""
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
        """Whether this reader has read all that `other` has."""
        return other.xmax <= self.xmax and all(
            xid >= other.xmax or xid in other.running for xid in self.running
        )

    def advanced(self, snapshot: "Position", newest: int | None) -> "Position":
        """Where a reader is that has read on from here all that a snapshot can see, the newest of
        it by transaction `newest` (None: nothing). Cut back to just after that, as feed.position()
        is.
        """
        xmax = self.xmax if newest is None else max(self.xmax, xid_after(newest))
        return Position(xmax, frozenset(xid for xid in snapshot.running if xid < xmax))


@dataclass(frozen=True, slots=True)
class Offset:
    """Where a client continues: behind a position, or, with `until`, behind change `id` of the
    batch between two positions.
    """

    position: Position
    until: Position | None = None
    id: int = 0


class Epoch:
    """One unbroken history of the log: it writes offsets and knows its own again.

    Signing makes an offset judgeable alone: one that verifies was given out by a node of this
    database, so what it says need not be doubted piece by piece.
    """

    def __init__(self, name: str, secret: str) -> None:
        self.name = name
        self._signer = hashlib.sha256(secret.encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Epoch) and (
            (self.name, self._signer.digest()) == (other.name, other._signer.digest())
        )

    def format(self, offset: Offset) -> str:
        """Write an offset: letters, digits and `.:,_-` only, so it needs no escaping anywhere."""
        if offset.until is None:
            return self._signed(f"{self.name}.{offset.position}".encode())
        return self.writer(offset.position, offset.until)(offset.id)

    def writer(self, position: Position, until: Position) -> "BatchOffsets":
        """What writes the offsets within one batch, given the ids of its changes."""
        return BatchOffsets(self, f"{self.name}.{position}.{until}.".encode())

    def parse(self, text: str) -> Offset:
        """Read an offset of this epoch; InvalidOffset if it is foreign, forged or no offset."""
        if len(text) > LONGEST_OFFSET_CHARS or not text.isascii():
            raise InvalidOffset("no offset")
        body, _, _ = text.rpartition(".")
        name, *parts = body.split(".")
        if name != self.name or self._signed(body.encode()) != text:
            raise InvalidOffset("of another epoch, or not given out by this feed")
        match parts:
            case [position]:
                return Offset(Position.parse(position))
            case [position, until, id] if id.isdecimal():
                return Offset(Position.parse(position), Position.parse(until), int(id))
        raise InvalidOffset("no offset")

    def _signed(self, body: bytes) -> str:
        signer = self._signer.copy()
        signer.update(body)
        return f"{body.decode()}.{signature(signer.digest())}"


class BatchOffsets:
    """Offsets within one batch; what they have in common is signed once."""

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
    """Eight characters: 48 bits, against guessing over a network, not against a laboratory."""
    return urlsafe_b64encode(digest[:6]).decode()
