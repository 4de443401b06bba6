"""Work that comes in bulk leaves time for everything else, and keeps its order."""

import asyncio
import time

import httpx
import pytest

from app.database.connections import Connection
from app.socketio import engine as engine_module
from app.turns import Turns
from tests.support.feeds import eventually
from tests.support.sockets import PollingClient, serving_here
from tests.support.subscribers import subscriber
from tests.test_subscriptions import OPEN, ORDERS

SUBSCRIPTIONS = 20


async def test_much_work_takes_several_turns() -> None:
    """A hundred pieces of work are given at once, and more while they are done: all are done in
    this order, and other work goes on between them.
    """
    turns = Turns(0.01)
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.001)
        done.append(number)

    for number in range(100):
        turns.do(lambda number=number: work(number))  # type: ignore[misc]
    assert 0 < len(done) < 50
    await asyncio.sleep(0)
    assert 0 < len(done) < 75
    assert not turns.do(lambda: work(100))
    await turns.done(lambda: work(101))
    assert done == list(range(102))


async def test_little_work_is_done_at_once() -> None:
    """Nothing else is to be done."""
    turns, done = Turns(0.01), list[int]()
    for number in range(3):
        assert turns.do(lambda: done.append(1))
        await turns.done(lambda: done.append(1))
        assert len(done) == 2 * number + 2
        await asyncio.sleep(0)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
async def test_work_that_fails(seconds: float) -> None:
    """Some work raises, at once or later: whoever waits for it learns that; the rest is done."""
    turns, done = Turns(seconds), list[int]()

    def fail() -> None:
        raise ValueError("no")

    failing = asyncio.create_task(turns.done(fail))
    following = asyncio.create_task(turns.done(lambda: done.append(1)))
    with pytest.raises(ValueError, match="no"):
        await failing
    await following
    assert done == [1]


@pytest.mark.database
@pytest.mark.parametrize("plain", [False, True], ids=["ours", "any server"])
async def test_messages_that_have_to_wait(
    connection: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """A node can only take one message in each turn of its loop. Clients that send many at once are
    served in order; those that leave meanwhile leave nothing behind.
    """
    monkeypatch.setattr(engine_module, "TURN_S", 0.0)
    await connection.execute(ORDERS)
    async with (
        serving_here(database_url, plain) as app,
        subscriber(app.url) as one,
        subscriber(app.url) as other,
    ):
        for number in range(SUBSCRIPTIONS):
            for client in (one, other):
                await client.subscribe(f"/order/{number}", where=OPEN)
        for number in range(1, SUBSCRIPTIONS):
            await one.client.send(f"41/order/{number},")
        await one.subscribe("/order/last", where=OPEN)
        await one.loaded(one.held["/order/last"])
        for client in (one, other):
            async with subscriber(app.url) as leaving:
                for number in range(SUBSCRIPTIONS):
                    await leaving.subscribe(f"/order/{number}", where=OPEN)
            await client.loaded(client.held["/order/0"])
        await other.until(lambda: all(each.is_loaded for each in other.held.values()))
        async with httpx.AsyncClient(base_url=app.url) as http:
            polling = PollingClient(http)
            await polling.open()
            await polling.subscribe("order", SUBSCRIPTIONS)
            assert (await polling.post("1")).status_code == 200
        await eventually(lambda: app.broadcast.stats().subscribers == SUBSCRIPTIONS + 2)
        await connection.execute("UPDATE orders SET note = 'all have it' WHERE id = 1")
        await other.until(
            lambda: all(each.rows["[1]"]["note"] == "all have it" for each in other.held.values())
        )
