"""The checker itself, on made-up logs: what is whole passes, and each kind of damage is named."""

from typing import Any

import pytest

from tests.faults.checker import Findings, Log, Reader, Snapshot

# Transaction 11 commits after 12, so the batches are 10 and 12, then 11.
FIRST, SECOND, THIRD = "10:10:", "11:13:11", "13:13:"
LIST: list[Any] = ["list", f"e.{FIRST}.s", []]
HELLO: list[Any] = ["hello", True, f"e.{FIRST}.s", False]


def row(id: int, name: str) -> dict[str, Any]:
    return {"id": id, "name": name, "info": "", "created_at": "now"}


EVENTS: list[list[Any]] = [
    ["create", row(1, "a"), f"e.{FIRST}.{SECOND}.1.s"],
    ["create", row(3, "c"), f"e.{SECOND}.s"],
    ["create", row(2, "b"), f"e.{SECOND}.{THIRD}.2.s"],
    ["destroy", "b", f"e.{THIRD}.s"],
]


def findings(*entries: list[Any]) -> Findings:
    """What the checker says to these entries of a client."""
    log = Log()
    log.add(
        [
            (10, 1, "create", row(1, "a")),
            (11, 2, "create", row(2, "b")),
            (12, 3, "create", row(3, "c")),
            (11, 4, "destroy", row(2, "b")),
        ]
    )
    log.known_below = 13
    reader = Reader("client", log)
    for entry in entries:
        reader.take(entry)
    return reader.finish(Snapshot(13, frozenset()), [row(1, "a"), row(3, "c")])


def test_a_whole_list_of_events_passes() -> None:
    """A client got every change once, and was cut off within a batch."""
    resumed = ["hello", True, EVENTS[0][2], True]
    assert not findings(LIST, HELLO, *EVENTS).red()
    assert not findings(LIST, HELLO, EVENTS[0], resumed, *EVENTS[1:]).red()


@pytest.mark.parametrize(
    ("events", "damage"),
    [
        ([EVENTS[0], *EVENTS[2:]], "lost"),
        (EVENTS[:2], "lost"),
        (EVENTS[:3], "lost"),
        ([EVENTS[0], *EVENTS], "doubled"),
        ([*EVENTS, EVENTS[3]], "doubled"),
        ([EVENTS[0], EVENTS[1], EVENTS[3], EVENTS[2]], "lost"),
        ([["create", row(9, "z"), EVENTS[0][2]], *EVENTS], "phantom"),
        ([*EVENTS[:2], ["hello", False, f"e.{SECOND}.s", False]], "refused"),
        ([EVENTS[0], ["hello", True, f"e.{SECOND}.s", True], *EVENTS[1:]], "disordered"),
        ([["create", row(1, "a"), f"e.{FIRST}.{SECOND}.7.s"], *EVENTS[1:]], "disordered"),
        ([*EVENTS, ["state", [row(1, "a")]]], "stale"),
    ],
)
def test_damage_is_found(events: list[list[Any]], damage: str) -> None:
    """A client lost a change, got one twice, or otherwise what it should not."""
    assert getattr(findings(LIST, HELLO, *events), damage)
