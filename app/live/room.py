"""How many different filters a node evaluates."""

from collections import Counter

from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.subscription import Subscription

MOST_FILTERS = 50_000
# Of these, those without a value to look them up by: they are evaluated for every change of their
# topic.
MOST_SCANNED_FILTERS = 2_000
# What they have together, written out. (A number may have 131,072 digits.)
MOST_CHARS = 32 * 1024 * 1024


class Room:
    """Counts the different subscriptions in use."""

    def __init__(self) -> None:
        self._uses: Counter[Subscription] = Counter()
        self._scanned = 0
        self._chars = 0

    def take(self, subscription: Subscription) -> None:
        """Use a subscription once more. Raises SubscriptionRefused if it is one too many."""
        if not self._uses[subscription]:
            is_scanned = subscription.condition.equality is None
            chars = self._chars + len(subscription.condition.text)
            is_full = is_scanned and self._scanned >= MOST_SCANNED_FILTERS
            if is_full or len(self._uses) >= MOST_FILTERS or chars > MOST_CHARS:
                raise SubscriptionRefused(
                    RefusalCode.TOO_MANY,
                    "This node has too many different filters; try again later, or ask for one"
                    " value of a column (column=eq.value): there is more room for such filters.",
                    "where",
                )
            self._scanned += is_scanned
            self._chars = chars
        self._uses[subscription] += 1

    def leave(self, subscription: Subscription) -> None:
        """Use a subscription once less."""
        self._uses[subscription] -= 1
        if not self._uses[subscription]:
            del self._uses[subscription]
            self._scanned -= subscription.condition.equality is None
            self._chars -= len(subscription.condition.text)
