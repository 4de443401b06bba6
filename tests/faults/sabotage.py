"""Ways to switch off one safety of the product, in a server process that is to be tested."""

from collections.abc import Callable

KINDS: dict[str, Callable[[], None]] = {}
