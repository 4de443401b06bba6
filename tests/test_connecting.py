"""CONNECT payloads: for which offsets a `pid` vouches."""

from app.socketio.connecting import ConnectPayload, except_for, mark_of

NAMESPACE = "/order"
OPEN, SHIPPED = {"where": "status=eq.open"}, {"where": "status=eq.shipped"}


def pid_of(options: dict[str, str]) -> str:
    """A `pid` that a client with these options gets."""
    request = ConnectPayload.read(NAMESPACE, options).request
    assert request is not None
    return f"{request.fingerprint}.sid"


def returning(options: dict[str, str], pid: str, offset: str) -> ConnectPayload:
    """What is read of a client that returns."""
    return ConnectPayload.read(NAMESPACE, {"pid": pid, "offset": offset, **options})


def test_the_same_again() -> None:
    """A client returns and asks for the same: it continues."""
    found = returning(OPEN, pid_of(OPEN), "e.1:1:.s")
    assert (found.since, found.outdated) == ("e.1:1:.s", None)


def test_something_else() -> None:
    """A client returns and asks for something else: its offset does not count."""
    found = returning(SHIPPED, pid_of(OPEN), "e.1:1:.s")
    assert (found.pid, found.since, found.outdated) == (None, None, mark_of("e.1:1:.s"))


def test_an_answer_before_hello() -> None:
    """A client that asks for something else is answered while the database is away. It is cut off
    before it has an offset of that: it must load. Or after: then it continues.
    """
    pid = except_for(pid_of(SHIPPED), mark_of("e.1:1:.s"))
    assert returning(SHIPPED, pid, "e.1:1:.s").outdated == mark_of("e.1:1:.s")
    for offset in ("e.2:2:.s", "loading"):
        found = returning(SHIPPED, pid, offset)
        assert (found.pid, found.since, found.outdated) == (pid, offset, None)
    assert returning(OPEN, pid, "e.1:1:.s").since is None
