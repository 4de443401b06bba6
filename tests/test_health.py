"""When trouble becomes an outage, and when an outage ends. No I/O."""

from hypothesis import given
from hypothesis import strategies as st

from app.feed.health import BEHIND, BEHIND_S, GRACE_S, SILENT, SILENT_S, FeedHealth, Outage

AS_OF = 1_700_000_000_123
TICK_S = 1 / 16
STEPS = st.tuples(
    st.sampled_from(["failed", "answered", "completed", "flawed"]), st.integers(0, 100)
)


def test_a_short_failure_is_no_outage() -> None:
    """A connection is lost and replaced at once."""
    health = FeedHealth(0, AS_OF)
    health.failed("Lost.", 0.1)
    assert health.judge(0.2) is None
    health.completed(0.3, AS_OF)
    assert health.judge(0.1 + GRACE_S) is None


def test_a_lasting_failure_is_an_outage_until_the_log_was_read() -> None:
    """A connection is lost; the next one reads for a while before it has read everything."""
    health = FeedHealth(0, AS_OF)
    health.failed("Lost.", 0.1)
    assert health.judge(0.1 + GRACE_S) == Outage(AS_OF, "Lost.")
    health.answered(5)
    assert health.judge(5) == Outage(AS_OF, "Lost.")
    health.completed(6, AS_OF + 6000)
    assert health.judge(6) is None


def test_silence_is_an_outage() -> None:
    """A read is not answered; then it is, but there is more to read."""
    health = FeedHealth(0, AS_OF)
    health.answered(1)
    assert health.judge(0.9 + SILENT_S) is None
    assert health.judge(1 + SILENT_S) == Outage(AS_OF, SILENT)
    health.answered(4)
    assert health.judge(4) == Outage(AS_OF, SILENT)


def test_the_time_this_process_paused_does_not_count() -> None:
    """The process was stopped for a minute: only then can it see whether the database answers."""
    health = FeedHealth(0, AS_OF)
    health.completed(1, AS_OF)
    health.paused(60)
    assert health.judge(60.9 + SILENT_S) is None
    assert health.judge(61 + SILENT_S) == Outage(AS_OF, SILENT)


def test_a_feed_that_never_catches_up_is_an_outage() -> None:
    """Every read is answered, and each time there is more to read."""
    health = FeedHealth(0, AS_OF)
    for tenth in range(round(BEHIND_S * 10)):
        assert health.judge(tenth / 10) is None
        health.answered(tenth / 10)
    assert health.judge(BEHIND_S) == Outage(AS_OF, BEHIND)


def test_the_time_is_written_as_javascript_does() -> None:
    """A client passes `since` to `new Date`."""
    assert Outage(AS_OF, "").since_text == "2023-11-14T22:13:20.123Z"
    assert Outage(AS_OF - 123, "").since_text == "2023-11-14T22:13:20.000Z"


@given(st.lists(STEPS, max_size=30))
def test_judging_when_due_and_after_failures_is_enough(steps: list[tuple[str, int]]) -> None:
    """In any order of events: judging only when it is due and when a failure is noted shows every
    outage that judging all the time shows, and no outage outlasts a complete read.
    """
    now = 0.0
    health, watched = FeedHealth(now, AS_OF), FeedHealth(now, AS_OF)
    due = health.until_next(now)
    for step, ticks in steps:
        for _ in range(ticks):
            now += TICK_S
            if now >= due:
                health.judge(now)
                due = now + health.until_next(now)
            assert (health.outage is None) == (watched.judge(now) is None)
        for each in (health, watched):
            match step:
                case "failed":
                    each.failed("Failed.", now)
                case "answered":
                    each.answered(now)
                case "completed":
                    each.completed(now, AS_OF)
                case "flawed":
                    each.completed(now, AS_OF, "Flawed.")
        if step in ("failed", "flawed"):
            health.judge(now)
            due = now + health.until_next(now)
        elif step == "completed":
            assert watched.judge(now) is None
