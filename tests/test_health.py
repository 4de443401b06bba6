"""When trouble becomes an outage, and when an outage ends. No I/O."""

from hypothesis import given
from hypothesis import strategies as st

from app.feed.health import BEHIND, BEHIND_S, GRACE_S, SILENT, SILENT_S, FeedHealth, Outage

AS_OF = 1_700_000_000_123
STEPS = st.tuples(
    st.sampled_from(["failed", "answered", "completed", "flawed", "judge"]),
    st.floats(0, 3, allow_nan=False),
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
def test_whoever_judges_when_due_knows_all_the_time(steps: list[tuple[str, float]]) -> None:
    """In any order of events: who judges at every event and whenever it is due never sees a result
    that was true for a while unseen, and no outage outlasts a complete read.
    """
    health, now = FeedHealth(0, AS_OF), 0.0
    for step, seconds in steps:
        due = health.until_next(now)
        before = health.judge(now)
        if due is not None and due > seconds:
            assert health.judge(now + seconds) == before
        now += seconds
        match step:
            case "failed":
                health.failed("Failed.", now)
            case "answered":
                health.answered(now)
            case "completed":
                health.completed(now, AS_OF)
                assert health.judge(now) is None
            case "flawed":
                health.completed(now, AS_OF, "Flawed.")
        health.judge(now)
