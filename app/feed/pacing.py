"""Decides when to read the log again, look for other nodes, probe and ring, given what happened and
when.

Times are seconds on one monotonic clock. Nothing here waits.
"""

# While awake the feed polls; the longer nothing arrives, the longer it waits. Up to a few thousand
# changes a second latency matters; beyond that, longer waits spare the writers.
SHORTEST_REST_S = 0.001
LONGEST_REST_S = 0.020
REST_PER_CHANGE_S = 0.00015
# The longest rests while an open transaction keeps the feed awake, and where no bell works.
KEPT_AWAKE_REST_S = 0.030
NO_BELL_REST_S = 0.010
# Nothing found for this long: try to sleep.
TIRED_AFTER_S = 0.030
# A busy feed rings for the other nodes no more often than this.
RING_S = 0.010
# Every node looks at least this often, even without a bell.
LOOK_S = 1.0
PROBE_S = 5.0


class Pacing:
    """The rhythm of one session of the feed."""

    def __init__(self, now: float) -> None:
        self._last_found = now
        self._next_look = self._next_probe = self._next_ring = now
        self._others_know = self._owes_ring = False
        self._found = 0

    def read(self, changes: int, now: float) -> None:
        """Note a read and how many changes it found."""
        self._found = changes
        if changes:
            self._last_found = now
            self._owes_ring = self._owes_ring or not self._others_know

    def woke(self, rung_by_writer: bool) -> None:
        """Note the end of a wait. A writer's bell reaches every node."""
        self._others_know = rung_by_writer

    def stay_awake(self, now: float) -> None:
        """Note that bells come so often that polling is cheaper."""
        self._last_found = now

    def should_ring(self, asleep: bool, now: float) -> bool:
        """Return whether it is time to ring for the other nodes; if so, it counts as done."""
        if not self._owes_ring or not (asleep or now >= self._next_ring):
            return False
        self._owes_ring, self._next_ring = False, now + RING_S
        return True

    def should_look(self, now: float) -> bool:
        """Return whether it is time to check which node leads; if so, it counts as done."""
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_S
        return True

    def should_probe(self, now: float) -> bool:
        """Return whether it is time to test the bell; if so, it counts as done."""
        if now < self._next_probe:
            return False
        self._next_probe = now + PROBE_S
        return True

    def is_tired(self, now: float) -> bool:
        """Return whether nothing has come for long enough to try to sleep."""
        return now - self._last_found >= TIRED_AFTER_S

    def until_look(self, now: float) -> float:
        """Return how long a wait for the bell may last."""
        return max(0.0, self._next_look - now)

    def rest(self, bell_works: bool, now: float) -> float:
        """Return how long to rest, awake, before the next read."""
        if self._found:
            rest = min(self._found * REST_PER_CHANGE_S, LONGEST_REST_S)
        else:
            longest = KEPT_AWAKE_REST_S if bell_works else NO_BELL_REST_S
            rest = min(max((now - self._last_found) / 4, SHORTEST_REST_S), longest)
        return min(rest, self.until_look(now))
