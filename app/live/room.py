"""Limits how many different filters a node evaluates."""

from collections import Counter
from collections.abc import Hashable

from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.subscription import Subscription

MOST_FILTERS = 50_000
# Of these, those without a value to look them up by: they are evaluated for every change of their
# topic.
MOST_SCANNED_FILTERS = 2_000
# Their total length, written out. (A number may have 131,072 digits.)
MOST_CHARS = 32 * 1024 * 1024


def place(subscription: Subscription) -> Hashable:
    """Return what subscriptions that count as one have in common, even if they are to a table
    before and after it was altered.
    """
    topic, filter = subscription.table.topic, subscription.condition.text
    return topic, filter, subscription.columns, subscription.old, subscription.identity


class Room:
    """Counts the different subscriptions in use."""

    def __init__(self) -> None:
        self._uses: Counter[Hashable] = Counter()
        self._scanned = 0
        self._chars = 0

    def take(self, subscription: Subscription) -> None:
        """Use a subscription once more. Raises SubscriptionRefused if it is one too many."""
        if not self._uses[place(subscription)]:
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
        self._uses[place(subscription)] += 1

    def leave(self, subscription: Subscription) -> None:
        """Use a subscription one time less."""
        self._uses[place(subscription)] -= 1
        if not self._uses[place(subscription)]:
            del self._uses[place(subscription)]
            self._scanned -= subscription.condition.equality is None
            self._chars -= len(subscription.condition.text)
