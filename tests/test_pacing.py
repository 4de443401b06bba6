"""The feed's rhythm: when it reads again, looks around, probes, rings and sleeps."""

from app.feed import pacing
from app.feed.pacing import Pacing


def test_the_first_round_looks_and_probes() -> None:
    """A feed that has just connected sees who leads and tests the bell, and not again at once."""
    pace = Pacing(100.0)
    assert pace.should_look(100.0) and pace.should_probe(100.0)
    assert not pace.should_look(100.1) and not pace.should_probe(100.1)
    assert pace.should_look(100.0 + pacing.LOOK_S)
    assert pace.should_probe(100.0 + pacing.PROBE_S)


def test_rests_grow_while_nothing_comes() -> None:
    """A feed that finds nothing rests longer and longer, up to a limit: a shorter one without a
    bell.
    """
    pace = Pacing(0.0)
    pace.should_look(0.0)
    rests = []
    for now in (0.001, 0.02, 0.06, 0.1, 0.2, 0.5):
        pace.read(0, now)
        rests.append(pace.rest(True, now))
    assert rests == sorted(rests)
    assert rests[0] == pacing.SHORTEST_REST_S and rests[-1] == pacing.KEPT_AWAKE_REST_S
    assert pace.rest(False, 0.5) == pacing.NO_BELL_REST_S


def test_rests_follow_what_was_found() -> None:
    """A feed that finds changes rests a little for each of them, up to a limit."""
    pace = Pacing(0.0)
    pace.should_look(0.0)
    pace.read(10, 0.1)
    assert pace.rest(True, 0.1) == 10 * pacing.REST_PER_CHANGE_S
    pace.read(100_000, 0.1)
    assert pace.rest(True, 0.1) == pacing.LONGEST_REST_S


def test_no_rest_outlasts_the_next_look() -> None:
    """Whatever the feed waits for, it looks around in time."""
    pace = Pacing(0.0)
    pace.should_look(0.0)
    pace.read(100_000, 0.0)
    late = pacing.LOOK_S - 0.001
    assert pace.rest(True, late) <= 0.001 + 1e-9
    assert pace.until_look(late) <= 0.001 + 1e-9 and pace.until_look(pacing.LOOK_S + 5) == 0.0


def test_a_feed_is_tired_after_a_while_without_changes() -> None:
    """Only a feed that has found nothing for a while tries to sleep; bells in quick succession keep
    it awake.
    """
    pace = Pacing(0.0)
    pace.read(1, 1.0)
    assert not pace.is_tired(1.0 + pacing.TIRED_AFTER_S / 2)
    assert pace.is_tired(1.0 + pacing.TIRED_AFTER_S)
    pace.stay_awake(2.0)
    assert not pace.is_tired(2.0 + pacing.TIRED_AFTER_S / 2)


def test_changes_found_awake_ring_for_the_others() -> None:
    """A feed that found changes by itself rings for the other nodes, but seldom while busy."""
    pace = Pacing(0.0)
    assert not pace.should_ring(False, 0.0)
    pace.read(3, 1.0)
    assert pace.should_ring(False, 1.0) and not pace.should_ring(False, 1.0)
    pace.read(3, 1.0 + pacing.RING_S / 2)
    assert not pace.should_ring(False, 1.0 + pacing.RING_S / 2)
    assert pace.should_ring(False, 1.0 + pacing.RING_S)


def test_a_feed_about_to_wait_for_the_bell_rings_at_once() -> None:
    """A feed that is asleep does not put off the bell it owes."""
    pace = Pacing(0.0)
    pace.read(3, 1.0)
    assert pace.should_ring(False, 1.0)
    pace.read(3, 1.001)
    assert pace.should_ring(True, 1.001)


def test_a_writers_bell_is_not_rung_again() -> None:
    """A writer that rang has rung for every node; what is found later by polling has not."""
    pace = Pacing(0.0)
    pace.woke(rung_by_writer=True)
    pace.read(3, 1.0)
    assert not pace.should_ring(True, 1.0)
    pace.woke(rung_by_writer=False)
    pace.read(3, 2.0)
    assert pace.should_ring(True, 2.0)
