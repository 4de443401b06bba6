"""From the INSERT to the client: the age of an event when a client reads it.

An event's age is counted from the start of its transaction (`created_at`, when Postgres has just
received the INSERT) until the probe, one of the clients, reads it; so it includes the commit and
its flush, for every peer. All clocks are this machine's.
"""

from contextlib import AsyncExitStack

from bench.lab import Figure, Lab, least, most, percentile, stage, write_singly

CLIENTS = 10
CONNECTIONS = 16
SECONDS = 6
ROUNDS = 3
QUIET, BUSY = 100, 2_000  # writes a second
MOST_ABOVE_NODE_MS = 0.5
MOST_EVER_MS = 1_000.0


async def run(lab: Lab) -> list[Figure]:
    """Median and 99th percentile of the age at both rates, and the oldest event of all."""
    ages: dict[tuple[int, int], dict[str, list[float]]] = {
        (rate, percent): {peer.name: [] for peer in lab.peers}
        for rate in (QUIET, BUSY)
        for percent in (50, 99)
    }
    oldest = {peer.name: 0.0 for peer in lab.peers}
    rates: dict[str, list[float]] = {peer.name: [] for peer in lab.peers}
    async with AsyncExitStack() as stack:
        stages = [
            await stack.enter_async_context(stage(lab, peer, CLIENTS, probe=""))
            for peer in lab.peers
        ]
        for _ in range(ROUNDS):
            for rate in (QUIET, BUSY):
                for each in stages:
                    name = each.peer.name
                    written = await write_singly(
                        lab.postgres, each.database, CONNECTIONS, seconds=SECONDS, per_second=rate
                    )
                    await each.delivered(written.rows)
                    noted = (await each.crowd.ages()).values()
                    if len(noted) != written.rows:
                        raise RuntimeError(f"{name}: the probe missed rows")
                    for percent in (50, 99):
                        ages[rate, percent][name].append(percentile(noted, percent) * 1e3)
                    oldest[name] = max(oldest[name], max(noted) * 1e3)
                    if rate == BUSY:
                        rates[name].append(written.per_second)
        for each in stages:
            await each.crowd.check(each.written)
    async with lab.postgres.clone("plain", "stage_plain") as database:
        alone = await write_singly(
            lab.postgres, database, CONNECTIONS, seconds=SECONDS, per_second=QUIET
        )
    reached = ", ".join(f"{name} {rate:,.0f}" for name, rate in most(rates).items())
    figures = []
    for (rate, percent), measured in ages.items():
        figure = Figure(
            "latency",
            f"INSERT to client at {rate:,} writes/s, p{percent}",
            "ms",
            least(measured),
            note=f"writes/s reached: {reached}" if rate == BUSY else "",
        )
        if (rate, percent) == (QUIET, 50):
            figure.limit, figure.limit_is = alone.mean_ms, "INSERT alone"
            figure.target = f"≤ Node + {MOST_ABOVE_NODE_MS} ms"
            if figure.ratio is not None:
                allowed = figure.values["node"] + MOST_ABOVE_NODE_MS
                figure.reached = figure.values["ours"] <= allowed
        if (rate, percent) == (BUSY, 99):
            figure.target = "< Node"
            if figure.ratio is not None:
                figure.reached = figure.ratio < 1
        figures.append(figure)
    worst = Figure("latency", "the oldest event of all", "ms", oldest, target="≤ 1,000 ms")
    if "ours" in oldest:
        worst.reached = oldest["ours"] <= MOST_EVER_MS
    return [*figures, worst]
