"""The LISTEN connection: the bell, the lock that shows a feed is asleep, and a probe of both.

A NOTIFY makes its commit take a cluster-wide lock, so writers ring only when a feed is asleep:

* To sleep, the feed takes the lock SLEEPING exclusively, reads once more, and waits for the bell.
* The capture trigger tries to take SLEEPING shared, until its commit. If it cannot, a feed is
  asleep, and it rings. If it can, the feed is awake and polling; and it cannot fall asleep without
  seeing the change, because the lock is released only when the commit is visible.

Only one of several nodes does this: the one that holds LEADING. It rings for the others.
"""

import asyncio
import secrets
import time
from collections import deque

import asyncpg

from app.database.connections import SharedSession, connect

CHANNEL = "feed"

# Advisory locks; the first number is Tablecast's, as in migrations/sql/0003_capture.sql.
LOCKS = 1413563213
SLEEPING = 1
LEADING = 2
PRESENT = 3  # held shared by every node

# With this many bells within this many seconds, polling is cheaper than being rung.
BUSY_BELLS = 8
BUSY_WITHIN_S = 0.020

OWN_PID = "SELECT pg_backend_pid()"

COMMAND_TIMEOUT_S = 5.0
ECHO_TIMEOUT_S = 2.0


class Listener:
    """One listening session. If any method fails, close it and open another.

    `deaf`: notifications it sends to itself do not come back, so no bell can be relied on.
    """

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._bell = asyncio.Event()
        self._rung_at: deque[float] = deque(maxlen=BUSY_BELLS)
        self._echo = asyncio.Event()
        self._token = f"echo {secrets.token_hex(8)}"
        self._own_pid = 0
        self.asleep = False
        self.leading = False
        self.accompanied = False
        self.deaf = True
        self._writers_ring = True

    @classmethod
    async def open(cls, url: str) -> "Listener":
        """Connect and listen. Raises one of UNAVAILABLE."""
        connection = await connect(url, command_timeout=COMMAND_TIMEOUT_S)
        listener = cls(connection)
        try:
            connection.add_termination_listener(lambda _: listener._bell.set())
            # Not get_server_pid(): poolers send a number of their own on connecting.
            listener._own_pid = await connection.fetchval(OWN_PID)
            await connection.add_listener(CHANNEL, listener._heard)
            await listener._hear_itself()
            # With two-phase commit enabled, writers cannot ring (see feed.ring).
            setting = await connection.fetchval("SHOW max_prepared_transactions")
            listener._writers_ring = setting == "0"
        except BaseException:
            listener.close()
            raise
        return listener

    async def settle_in(self, reader: asyncpg.Connection) -> None:
        """Announce this node to the others. `reader` is another connection of this node.

        Raises SharedSession.
        """
        await self._check_session(reader)
        if not self.deaf:
            await self._connection.execute("SELECT pg_advisory_lock_shared($1, $2)", LOCKS, PRESENT)

    async def _check_session(self, reader: asyncpg.Connection) -> None:
        """Raise SharedSession if this session is not always the same, or not ours alone."""
        here = await self._connection.fetchval(OWN_PID)
        if here != self._own_pid or here == await reader.fetchval(OWN_PID):
            raise SharedSession("statements of one connection run in different sessions")

    def close(self) -> None:
        """End the session at once, releasing every lock it holds."""
        self._connection.terminate()

    def _heard(self, _: object, pid: int, __: str, payload: object) -> None:
        if payload == self._token:
            self._echo.set()
        elif payload == "" and pid != self._own_pid:
            self._bell.set()
            self._rung_at.append(time.monotonic())

    def nudge(self) -> None:
        """Ring for this node only."""
        self._bell.set()

    async def wait(self, seconds: float) -> bool:
        """Wait for the bell, at most `seconds`; return whether it rang. Several rings count as one.

        Raises ConnectionError if the session has ended.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._bell.wait()
        except TimeoutError:
            return False
        finally:
            if self._connection.is_closed():
                raise ConnectionError("the listening connection was closed")
        self._bell.clear()
        return True

    async def probe(self, reader: asyncpg.Connection) -> None:
        """Check whether the last probe came back, and send the next one.

        This notices what no keepalive can: a pooler that gives every transaction a different
        session swallows LISTEN without an error. Raises SharedSession.
        """
        await self._check_session(reader)
        self.deaf = not self._echo.is_set()
        if self.deaf:
            await self.wake_up()
        await self._send_probe()

    async def _send_probe(self) -> None:
        self._echo.clear()
        await self._connection.execute("SELECT pg_notify($1, $2)", CHANNEL, self._token)

    async def _hear_itself(self) -> None:
        await self._send_probe()
        try:
            async with asyncio.timeout(ECHO_TIMEOUT_S):
                await self._echo.wait()
        except TimeoutError:
            pass
        self.deaf = not self._echo.is_set()

    async def ask(self) -> None:
        """Return once the database answers. Raises one of UNAVAILABLE."""
        await self._connection.execute("SELECT")

    @property
    def bell_works(self) -> bool:
        """Whether a writer's commit would wake this node if it were asleep."""
        return self._writers_ring and not self.deaf

    def busy(self) -> bool:
        """Return whether the last bells came close together."""
        return (
            len(self._rung_at) == BUSY_BELLS
            and self._rung_at[-1] - self._rung_at[0] < BUSY_WITHIN_S
        )

    async def fall_asleep(self) -> bool:
        """Try to fall asleep; return whether the feed is asleep.

        That is impossible while a transaction that has written changes is open.
        """
        if not self.asleep and self.bell_works:
            self.asleep = await self._try_lock(SLEEPING)
        return self.asleep

    async def wake_up(self) -> None:
        """Wake up: from now on writers do not ring, so the caller must poll."""
        if self.asleep:
            await self._connection.execute("SELECT pg_advisory_unlock($1, $2)", LOCKS, SLEEPING)
            self.asleep = False
            self._rung_at.clear()

    async def take_part(self) -> None:
        """Lead if no other node does; if leading, check whether there are other nodes."""
        if self.deaf and not self.leading:
            return  # through such a pooler, the lock would stay in somebody else's session
        if not self.leading:
            self.leading = await self._try_lock(LEADING)
        if self.leading:
            self.accompanied = await self._connection.fetchval(
                "SELECT count(*) > 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = $1"
                " AND objid = $2 AND objsubid = 2 AND granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                LOCKS,
                PRESENT,
            )

    async def ring(self) -> None:
        """Ring for the other nodes, if there are any."""
        if self.accompanied:
            await self._connection.execute(f"NOTIFY {CHANNEL}")

    async def _try_lock(self, key: int) -> bool:
        return bool(
            await self._connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", LOCKS, key)
        )
