"""Under load: large transactions, and many small ones, delivered to 200 clients."""

from contextlib import AsyncExitStack

from bench.lab import Figure, Lab, Stage, at_least, most, stage, write_singly
from bench.limits import send_loop_seconds

CLIENTS = 200
ROWS = 1_000  # in a transaction
PER_SECOND = 5_000
CONNECTIONS = 16
ROUNDS = 3
# In a round: enough clock ticks to be accurate, without taking the slow peers minutes.
TRANSACTIONS = {"ours": 15, "node": 2, "python": 1}
SINGLE_ROWS_EACH = {"ours": 1_000, "node": 100, "python": 15}


async def run(lab: Lab) -> list[Figure]:
    """Deliveries per second of server CPU, from large transactions and from single commits."""
    large: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    single: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    rates: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    async with AsyncExitStack() as stack:
        stages = [await stack.enter_async_context(stage(lab, peer, CLIENTS)) for peer in lab.peers]
        for each in stages:
            await one_transaction(each, 10)  # to warm up
        for _ in range(ROUNDS):
            for each in stages:
                name = each.peer.name
                if name == "python" and large[name]:
                    continue  # one round takes a quarter of a minute
                before = each.server.cpu_seconds()
                for _ in range(TRANSACTIONS[name]):
                    await one_transaction(each, ROWS)
                used = each.server.cpu_seconds() - before
                large[name].append(TRANSACTIONS[name] * ROWS * CLIENTS / used)
            for each in stages:
                name = each.peer.name
                before = each.server.cpu_seconds()
                written = await write_singly(
                    lab.postgres,
                    each.database,
                    CONNECTIONS,
                    rows_each=SINGLE_ROWS_EACH[name],
                    per_second=PER_SECOND,
                )
                await each.delivered(written.rows)
                used = each.server.cpu_seconds() - before
                single[name].append(written.rows * CLIENTS / used)
                rates[name].append(written.per_second)
        for each in stages:
            await each.crowd.check(each.written)
    limit = 1 / await send_loop_seconds(CLIENTS, TRANSACTIONS["ours"], together=ROWS)
    figures = [
        Figure(
            "load",
            f"transactions of {ROWS:,} rows to {CLIENTS} clients, deliveries per CPU second",
            "/s",
            most(large),
            target="≥ 20 × Node",
            limit=limit,
            limit_is=f"{ROWS:,} events in one send()",
        ),
        Figure(
            "load",
            f"{PER_SECOND:,} single commits/s to {CLIENTS} clients, deliveries per CPU second",
            "/s",
            most(single),
            target="≥ 20 × Node",
            note="commits/s reached: "
            + ", ".join(f"{name} {rate:,.0f}" for name, rate in most(rates).items()),
        ),
    ]
    for figure in figures:
        figure.reached = at_least(figure.ratio, 20)
    return figures


async def one_transaction(on: Stage, rows: int) -> None:
    """Insert `rows` rows in one statement and wait until all clients have them."""
    await on.connection.execute(
        "INSERT INTO things (name) SELECT gen_random_uuid() FROM generate_series(1, $1)", rows
    )
    await on.delivered(rows)
