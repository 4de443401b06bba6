"""The checker itself, on made-up logs: intact logs pass, and each kind of damage is reported."""

from typing import Any

import pytest

from tests.faults.checker import Findings, Log, Reader, Snapshot, logged_key

# Transaction 11 commits after 12, so the batches are 10 and 12, then 11.
FIRST, SECOND, THIRD = "10:10:", "11:13:11", "13:13:"
LIST: list[Any] = ["list", f"e.{FIRST}.s", []]
HELLO: list[Any] = ["hello", True, f"e.{FIRST}.s", False]


def row(id: int, name: str) -> dict[str, Any]:
    return {"id": id, "name": name, "info": "", "created_at": "now"}


EVENTS: list[list[Any]] = [
    ["thing:create", row(1, "a"), f"e.{FIRST}.{SECOND}.1.s"],
    ["thing:create", row(3, "c"), f"e.{SECOND}.s"],
    ["thing:create", row(2, "b"), f"e.{SECOND}.{THIRD}.2.s"],
    ["thing:destroy", "b", f"e.{THIRD}.s"],
]


def findings(*entries: list[Any]) -> Findings:
    """Return what the checker reports for these entries of a client."""
    log = Log()
    log.add(
        [
            (10, 1, logged_key("thing", "create", None, row(1, "a"))),
            (11, 2, logged_key("thing", "create", None, row(2, "b"))),
            (12, 3, logged_key("thing", "create", None, row(3, "c"))),
            (11, 4, logged_key("thing", "destroy", row(2, "b"), None)),
        ]
    )
    log.known_below = 13
    reader = Reader("client", log)
    for entry in entries:
        reader.take(entry)
    return reader.finish(
        Snapshot(13, frozenset()), {"thing": [row(1, "a"), row(3, "c")], "slot": []}
    )


def test_a_whole_list_of_events_passes() -> None:
    """A client that received every change once, even if disconnected within a batch, passes."""
    resumed = ["hello", True, EVENTS[0][2], True]
    assert not findings(LIST, HELLO, *EVENTS).failures()
    assert not findings(LIST, HELLO, EVENTS[0], resumed, *EVENTS[1:]).failures()


@pytest.mark.parametrize(
    ("events", "damage"),
    [
        ([EVENTS[0], *EVENTS[2:]], "lost"),
        (EVENTS[:2], "lost"),
        (EVENTS[:3], "lost"),
        ([EVENTS[0], *EVENTS], "doubled"),
        ([*EVENTS, EVENTS[3]], "doubled"),
        ([EVENTS[0], EVENTS[1], EVENTS[3], EVENTS[2]], "lost"),
        ([["thing:create", row(9, "z"), EVENTS[0][2]], *EVENTS], "phantom"),
        ([*EVENTS[:2], ["hello", False, f"e.{SECOND}.s", False]], "refused"),
        ([EVENTS[0], ["hello", True, f"e.{SECOND}.s", True], *EVENTS[1:]], "disordered"),
        ([["thing:create", row(1, "a"), f"e.{FIRST}.{SECOND}.7.s"], *EVENTS[1:]], "disordered"),
        ([*EVENTS, ["state", [row(1, "a")]]], "stale"),
    ],
)
def test_damage_is_found(events: list[list[Any]], damage: str) -> None:
    """A client that lost a change, received one twice, or got something wrong is reported."""
    assert getattr(findings(LIST, HELLO, *events), damage)


SLOTS: list[tuple[str, dict[str, int]]] = [
    ("create", {"id": 1, "n": 1}), ("update", {"id": 1, "n": 2}), ("destroy", {"id": 1, "n": 2}),
    ("create", {"id": 1, "n": 3}),
]  # fmt: skip


def slot_findings(order: list[int]) -> Findings:
    """Return what the checker reports if log and client have a slot's changes in this order."""
    log = Log()
    changes = [SLOTS[place] for place in order]
    log.add(
        (10, id, logged_key("slot", op, row if op == "destroy" else None, row))
        for id, (op, row) in enumerate(changes)
    )
    log.known_below = 13
    reader = Reader("client", log)
    for entry in (LIST, HELLO):
        reader.take(entry)
    for id, (op, row) in enumerate(changes):
        last = id == len(changes) - 1
        offset = f"e.{SECOND}.s" if last else f"e.{FIRST}.{SECOND}.{id}.s"
        reader.take([f"slot:{op}", {"id": row["id"]} if op == "destroy" else row, offset])
    return reader.finish(Snapshot(13, frozenset()), {"thing": [], "slot": [{"id": 1, "n": 3}]})


def test_changes_of_a_row_in_another_order_than_made_are_found() -> None:
    """A log whose order of changes does not lead to the rows of the table is reported."""
    assert not slot_findings([0, 1, 2, 3]).failures()
    assert slot_findings([0, 2, 1, 3]).stale
    assert slot_findings([3, 0, 1, 2]).stale
    assert slot_findings([0, 1, 2]).stale


def test_a_reload_is_a_change_like_others_and_ends_what_is_known_of_its_topic() -> None:
    """A client receives a reload when the log has one; from then on its table is not compared."""
    log = Log()
    log.add([(10, 1, logged_key("slot", "reload", None, None))])
    log.known_below = 13
    for events, lost in ([["slot:reload", None, f"e.{SECOND}.s"]], 0), ([], 1):
        reader = Reader("client", log)
        for entry in (LIST, HELLO, *events):
            reader.take(entry)
        table = [{"id": 1, "n": 1}] if events else []
        found = reader.finish(Snapshot(13, frozenset()), {"thing": [], "slot": table})
        assert (found.failures(), found.lost) == (lost, lost)
