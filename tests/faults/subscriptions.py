"""What clients ask for in a run, and which event each change must be to whom."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tests.faults.checker import THING, Row
from tests.faults.filters import (
    EQUALITY,
    ORDER,
    Column,
    Conjunction,
    condition,
    number,
    one_of,
    random_filter,
    where,
)
from tests.faults.orders import ORDER_COLUMNS, PERSON_COLUMNS
from tests.faults.tables import TOPICS

KEYS = {"order": ("region", "number")}
TABLES = {THING: "things", **TOPICS}
# What rows of each topic are filtered by.
COLUMNS: dict[str, tuple[Column, ...]] = {
    THING: (
        Column("id", ORDER, number(1, 5_000)),
        Column("info", EQUALITY, one_of("by REST", "plain ", "")),
        Column("created_at", ORDER, one_of("2024-02-29T12:00:00Z", "infinity")),
    ),
    "ticket": (
        Column("id", ORDER, number(1, 500)),
        Column("note", EQUALITY, one_of("kept", "taken back", "new")),
        Column("code", EQUALITY, lambda chance: f"T{chance.randint(1, 200)}"),
    ),
    "slot": (Column("id", ORDER, number(1, 60)), Column("id", ORDER, one_of("1000", "2000"))),
    "countdown": (
        Column("id", ORDER, number(1, 300)),
        Column("level", ORDER, number(0, 4)),
        Column("level", ORDER, number(0, 4)),
    ),
    "phoenix": (Column("id", ORDER, number(1, 200)), Column("lives", ORDER, number(0, 3))),
    "child": (
        Column("mother", ORDER, number(1, 300)),
        Column("father", ("is", "gt"), number(1, 300)),
        Column("teacher", ("is", "lt"), number(1, 300)),
        Column("elder", ("is",), number(1, 300)),
    ),
    "item": (Column("id", ORDER, number(1, 6_000)), Column("value", ORDER, number(1, 5_000))),
    "order": ORDER_COLUMNS,
    "person": PERSON_COLUMNS,
}
OTHER_COLUMNS = {THING: ("name",), "order": ("note",), "slot": ("note",), "child": ("note",)}


@dataclass(frozen=True)
class Asked:
    """A subscription as a client asks for it. `columns`: those of the key come in addition."""

    topic: str
    filter: Conjunction = ()
    columns: tuple[str, ...] | None = None
    old: bool = False
    snapshot: bool = True

    @property
    def options(self) -> dict[str, str]:
        """Return the options that a client sends."""
        options = {}
        if self.filter:
            options["where"] = where(self.filter)
        if self.columns is not None:
            options["columns"] = ",".join(self.columns)
        if self.old:
            options["old"] = "true"
        if not self.snapshot:
            options["snapshot"] = "false"
        return options

    @property
    def key(self) -> tuple[str, ...]:
        return KEYS.get(self.topic, ("id",))

    def seen(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the client gets of a row."""
        if self.columns is None:
            return dict(row)
        wanted = {*self.columns, *self.key}
        return {name: value for name, value in row.items() if name in wanted}

    def sql(self, alias: str) -> str:
        """Return the condition for a row."""
        return condition(self.filter, alias)


def fingerprint(row: Row | None) -> int:
    """Return a number that stands for a row as a client has it."""
    return hash(None if row is None else tuple(row.items()))


def content(event: str, what: Any, old: Row | None, before: int | None) -> int:
    """Return a number that stands for an event, and for the row that the client had before it
    (None: it cannot know).
    """
    return hash((event, fingerprint(what), fingerprint(old), before))


@dataclass(frozen=True)
class Logged:
    """A row of the log as Postgres wrote it."""

    op: str
    old: str | None
    new: str | None

    def content_for(self, asked: Asked, was_in: bool, is_in: bool) -> int | None:
        """Return the event it is to a subscription; None if it is none. `was_in`, `is_in`: whether
        the old row and the new one match.
        """
        event = f"{asked.topic}:"
        if self.op in ("truncate", "reload"):
            return content(event + self.op, None, None, None)
        if not (was_in or is_in):
            return None
        old = self._seen(asked, self.old) if was_in else None
        new = self._seen(asked, self.new) if is_in else None
        if was_in and is_in and old == new:
            return None
        before, after = decoded(old), decoded(new)
        op = "destroy" if not is_in else "update" if was_in else "create"
        if after is None:
            assert before is not None
            after = {name: before[name] for name in asked.key}
        had = fingerprint(before) if asked.snapshot else None
        return content(event + op, after, before if asked.old else None, had)

    def _seen(self, asked: Asked, row: str | None) -> dict[str, bytes]:
        assert row is not None
        raw = msgspec.json.decode(row, type=dict[str, msgspec.Raw])
        return {name: bytes(value) for name, value in asked.seen(raw).items()}


def decoded(raw: dict[str, bytes] | None) -> Row | None:
    """Return a row with its values."""
    if raw is None:
        return None
    return {name: msgspec.json.decode(value) for name, value in raw.items()}


def random_asked(chance: random.Random, topic: str) -> Asked:
    """Return a random subscription to a topic."""
    columns = None
    if chance.random() < 0.4:
        names = {column.name for column in COLUMNS[topic]} | {*OTHER_COLUMNS.get(topic, ())}
        columns = tuple(chance.sample(sorted(names), chance.randint(1, min(3, len(names)))))
    return Asked(
        topic,
        random_filter(chance, COLUMNS[topic]),
        columns,
        chance.random() < 0.3,
        chance.random() >= 0.1,
    )


def random_namespaces(chance: random.Random, count: int) -> dict[str, list[Asked]]:
    """Return the namespaces of one client, each with what it asks for in turn."""
    found = {}
    topics = [*COLUMNS, "order", "order", "person", THING]  # these move most
    for label in range(count):
        topic = chance.choice(topics)
        first = random_asked(chance, topic)
        others = [random_asked(chance, topic) for _ in range(chance.choice([0, 1, 1, 2]))]
        # Whether there is a snapshot is no part of what a client holds, so it stays.
        alternatives = dict.fromkeys([first, *(_like(first, other) for other in others)])
        found[f"/{topic}/{label}" if label else f"/{topic}"] = list(alternatives)
    return found


def _like(first: Asked, other: Asked) -> Asked:
    return Asked(other.topic, other.filter, other.columns, other.old, first.snapshot)
