"""The payload of a client's CONNECT, as a value. No I/O."""

import hashlib
import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from app.live.filter import parse_filter, parse_names
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.subscription import Request
from app.live.table import TOPIC

PID = re.compile(r"[A-Za-z0-9_.~-]{1,100}")
# `/order`, `/order/open`: a topic, and perhaps a label.
NAMESPACE = re.compile(rf"/({TOPIC})(?:/.*)?", re.DOTALL)
MARK_BYTES = 6
FLAGS = {True: True, "true": True, False: False, "false": False}


@dataclass(frozen=True, slots=True)
class ConnectPayload:
    """What a client sends with CONNECT.

    `request`: the subscription it asks for, None for the namespace `/`. `pid` and `since`, an
    offset, come from an official client that was connected before; `since` alone from one that has
    fetched a list. `outdated`: the mark (see `mark_of`) of the offset of a client that was
    connected before, but now asks for something else. `timing`: whether it wants `feed:timing`.
    `key`: whether `feed:hello` should name the key columns.
    """

    request: Request | None
    pid: str | None
    since: str | None
    outdated: str | None
    timing: bool
    key: bool = False

    @classmethod
    def read(cls, namespace: str, payload: Any) -> "ConnectPayload":
        """Read the payload of a CONNECT packet.

        Raises SubscriptionRefused for an invalid namespace or option; for the namespace `/`,
        invalid options are ignored.
        """
        given = payload if isinstance(payload, dict) else {}
        if namespace == "/":
            return cls(None, *continued(None, given), given.get("timing") in (True, "true"))
        named = NAMESPACE.fullmatch(namespace)
        if named is None:
            raise SubscriptionRefused(
                RefusalCode.UNKNOWN_TOPIC,
                "A namespace is / for everything, or /topic or /topic/label for a topic, whose name"
                " is in lower case.",
                "topic",
            )
        options = options_of(given, named[1], namespace)
        request = Request(
            named[1],
            parse_filter(text(options, "where") or ""),
            parse_names(columns) if (columns := text(options, "columns")) else None,
            flag(options, "old", False),
            flag(options, "snapshot", True),
        )
        return cls(
            request,
            *continued(request, {**given, **options}),
            flag(options, "timing", False),
            flag(options, "key", False),
        )


def continued(
    request: Request | None, given: Mapping[str, Any]
) -> tuple[str | None, str | None, str | None]:
    """Return `pid`, `since` and `outdated` (see ConnectPayload): where a client continues."""
    pid, offset, since = given.get("pid"), given.get("offset"), given.get("since")
    if isinstance(pid, str) and PID.fullmatch(pid) and isinstance(offset, str):
        if request is None or vouches(pid, request, offset):
            return pid, offset, None
        return None, None, mark_of(offset)
    return None, since if isinstance(since, str) else None, None


def vouches(pid: str, request: Request, offset: str) -> bool:
    """Return whether a `pid` vouches that its client got this offset for the same request."""
    given, _, mark = pid.partition("~")
    return given.startswith(f"{request.fingerprint}.") and not (mark and mark == mark_of(offset))


def except_for(pid: str, outdated: str) -> str:
    """Return a `pid` that does not vouch for one offset, given by its mark: that of the client's
    previous subscription, which it keeps until it receives one of the new subscription.

    If nothing was written in between, both offsets are the same, and the client loads its rows once
    more than needed when it returns.
    """
    return f"{pid}~{outdated}"


def mark_of(offset: str) -> str:
    """Return the short hash that represents an offset in a `pid`."""
    digest = hashlib.sha256(offset.encode("utf-8", "surrogatepass")).digest()
    return urlsafe_b64encode(digest[:MARK_BYTES]).decode()


def options_of(given: Mapping[str, Any], topic: str, namespace: str) -> Mapping[str, Any]:
    """Return the options for a namespace. A client that sends one payload to all its namespaces
    gives them by topic, or by topic and label: `{topics: {order: {...}, 'order/open': {...}}}`.

    Raises SubscriptionRefused.
    """
    topics = given.get("topics")
    if isinstance(topics, str):
        try:
            topics = msgspec.json.decode(topics)
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            raise bad_option("topics", "an object of options by topic") from None
    if not isinstance(topics, dict):
        return given
    nested = topics.get(namespace[1:], topics.get(topic)) or {}
    if not isinstance(nested, dict):
        raise bad_option("topics", "an object of options by topic")
    return {**given, **nested}


def text(options: Mapping[str, Any], name: str) -> str | None:
    """Return an option that is a string, or None if absent. Raises SubscriptionRefused."""
    value = options.get(name)
    if value is None or isinstance(value, str):
        return value
    raise bad_option(name, "a string")


def flag(options: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return an option that is a boolean, or a string for one. Raises SubscriptionRefused."""
    value = options.get(name)
    if value is None:
        return default
    if not isinstance(value, bool | str) or value not in FLAGS:
        raise bad_option(name, "true or false")
    return FLAGS[value]


def bad_option(name: str, expected: str) -> SubscriptionRefused:
    """Return the refusal for an option that is not what was expected."""
    return SubscriptionRefused(RefusalCode.BAD_OPTION, f"{name} must be {expected}.", name)
