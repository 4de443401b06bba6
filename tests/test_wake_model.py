"""Every interleaving of the wake protocol: writers, the leading node, a follower, a crash.

The model is the protocol of feed.must_ring in the database and of `app/feed/feed.py` (`_follow`),
with one step for each point at which another process could intervene. Timers are left out: they
would hide a missed bell, and the point is that none is missed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

WRITERS = 2


@dataclass(frozen=True)
class Writer:
    """`step` goes begin, written, visible, done; it rings after its commit if it must."""

    step: str = "begin"
    shares_lock: bool = False
    must_ring: bool = False


@dataclass(frozen=True)
class Node:
    """`step` goes read, decide, wait; a follower only reads and waits."""

    step: str = "read"
    asleep: bool = False
    seen: frozenset[int] = frozenset()
    bell: bool = False
    rang: bool = False


@dataclass(frozen=True)
class World:
    """The whole state; `leader` is None once it has crashed."""

    writers: tuple[Writer, ...] = (Writer(),) * WRITERS
    leader: Node | None = Node()
    follower: Node = Node()
    promoted: bool = False

    def visible(self) -> frozenset[int]:
        """The changes a read would see now."""
        return frozenset(
            i for i, writer in enumerate(self.writers) if writer.step in ("visible", "done")
        )

    def sleeper(self) -> bool:
        """Whether a node holds the lock exclusively."""
        return (self.leader is not None and self.leader.asleep) or self.follower.asleep


@dataclass(frozen=True)
class Protocol:
    """The parts that can be left out, to show that the model notices."""

    reads_once_more: bool = True
    lock_kept_until_visible: bool = True
    leader_rings: bool = True


def ring(world: World, *, leader: bool, follower: bool) -> World:
    if leader and world.leader is not None:
        world = replace(world, leader=replace(world.leader, bell=True))
    if follower:
        world = replace(world, follower=replace(world.follower, bell=True))
    return world


def writer_steps(world: World, protocol: Protocol) -> Iterator[World]:
    for i, writer in enumerate(world.writers):

        def moved(after: Writer, i: int = i) -> World:
            writers = (*world.writers[:i], after, *world.writers[i + 1 :])
            return replace(world, writers=writers)

        if writer.step == "begin":
            shares = not world.sleeper()
            yield moved(Writer("written", shares and protocol.lock_kept_until_visible, not shares))
        elif writer.step == "written":
            yield moved(replace(writer, step="visible"))
            yield moved(Writer("rolled back"))
        elif writer.step == "visible" and writer.shares_lock:
            yield moved(replace(writer, shares_lock=False))
        elif writer.step == "visible":
            after = moved(replace(writer, step="done", must_ring=False))
            yield ring(after, leader=True, follower=True) if writer.must_ring else after


def node_steps(world: World, node: Node, *, leads: bool, protocol: Protocol) -> Iterator[World]:
    def moved(after: Node) -> World:
        return (
            replace(world, follower=after)
            if node is world.follower
            else replace(world, leader=after)
        )

    if node.step == "read":
        news = world.visible() - node.seen
        after = moved(replace(node, step="decide" if leads else "wait", seen=node.seen | news))
        if news and leads and protocol.leader_rings and not (node.rang and node.asleep):
            after = ring(after, leader=False, follower=node is not world.follower)
        yield after
    elif node.step == "decide" and node.asleep:
        yield moved(replace(node, step="wait", rang=False))
        yield moved(
            replace(node, step="read", asleep=False, rang=False)
        )  # the bells came close together
    elif node.step == "decide":
        yield moved(replace(node, step="read", rang=False))  # poll
        if not any(writer.shares_lock for writer in world.writers):
            step = "read" if protocol.reads_once_more else "wait"
            yield moved(replace(node, step=step, asleep=True, rang=False))
    elif node.step == "wait" and node.bell:
        yield moved(replace(node, step="read", bell=False, rang=True))


def steps(world: World, protocol: Protocol) -> Iterator[World]:
    yield from writer_steps(world, protocol)
    if world.leader is not None:
        yield from node_steps(world, world.leader, leads=True, protocol=protocol)
        yield replace(world, leader=None)  # kill -9: its locks are released
    elif not world.promoted:  # at its next look the follower takes the lead and reads
        yield replace(world, promoted=True, follower=replace(world.follower, step="read"))
    yield from node_steps(world, world.follower, leads=world.promoted, protocol=protocol)


def missed(world: World) -> bool:
    """Return whether a node waits although it has not read everything and no bell is on its way.

    A follower whose leader is awake, or has just died, does not count: it will be rung or will
    look.
    """
    if any(writer.must_ring and writer.step == "visible" for writer in world.writers):
        return False
    leader, follower = world.leader, world.follower
    if leader is not None:
        waits = leader.step == "wait" and not leader.bell
        if waits and world.visible() - leader.seen:
            return True
        # The leader has read it and has nothing left to do, but did not ring for the follower.
        return (
            waits
            and not follower.bell
            and follower.step == "wait"
            and bool(leader.seen - follower.seen)
        )
    return bool(
        world.promoted
        and follower.step == "wait"
        and not follower.bell
        and world.visible() - follower.seen
    )


def search(protocol: Protocol) -> tuple[int, World | None]:
    """Return how many worlds can be reached, and one in which a bell was missed."""
    seen, new = {World()}, [World()]
    while new:
        world = new.pop()
        if missed(world):
            return len(seen), world
        for after in steps(world, protocol):
            if after not in seen:
                seen.add(after)
                new.append(after)
    return len(seen), None


def test_no_interleaving_misses_a_bell() -> None:
    """Two writers, two nodes and a crash, in every order: a waiting node has read everything."""
    worlds, bad = search(Protocol())
    assert bad is None
    assert worlds > 5_000


@pytest.mark.parametrize(
    "without",
    [
        Protocol(reads_once_more=False),
        Protocol(lock_kept_until_visible=False),
        Protocol(leader_rings=False),
    ],
    ids=["no second read", "lock given up before the commit", "leader silent"],
)
def test_every_part_of_the_protocol_is_needed(without: Protocol) -> None:
    """When one part is left out, the model finds the missed bell."""
    assert search(without)[1] is not None
