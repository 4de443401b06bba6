"""Run the benchmark, or the parts named by arguments or by ONLY; see bench/README.md."""

import asyncio
import importlib
import os
import resource
import sys
import time
import traceback

from bench import report
from bench.lab import Lab
from bench.postgres import private_postgres
from bench.servers import OURS, PYTHON, Peer, Unavailable, node


async def main(parts: list[str]) -> int:
    """Run the parts and report; return the exit code, 0 if everything could be measured.

    Only runs with all peers are kept, so that the kept figures can be compared.
    """
    failures = []
    with private_postgres() as postgres:
        await postgres.make_templates()
        peers = [PYTHON]
        for name, find in (("node", node), ("ours", ours)):
            try:
                peers.insert(0, await asyncio.to_thread(find))
                if name == "ours":
                    await postgres.migrate()
            except (Unavailable, RuntimeError, OSError) as error:
                failures.append(f"{name}: {error}")
        wanted = os.environ.get("PEERS", "ours,node,python").split(",")
        lab = Lab(postgres, tuple(peer for peer in peers if peer.name in wanted))
        for part in parts:
            begin = time.monotonic()
            print(f"{part} ...", file=sys.stderr, flush=True)
            try:
                figures = await importlib.import_module(f"bench.parts.{part}").run(lab)
            except Exception as error:  # the other parts can still be measured
                traceback.print_exc()
                failures.append(f"{part}: {error!r}")
                continue
            print(f"\n{part}, {time.monotonic() - begin:.0f} s")
            print(report.as_text(figures), flush=True)
            if len(lab.peers) == 3:
                report.remember(part, figures, time.monotonic() - begin)
    report.write()
    print(report.summary(parts))
    for failure in failures:
        print(f"not measured: {failure}", file=sys.stderr)
    return 1 if failures else 0


def ours() -> Peer:
    """Ourselves."""
    return OURS


if __name__ == "__main__":
    chosen = sys.argv[1:] or os.environ.get("ONLY", "").replace(",", " ").split()
    if unknown := set(chosen) - set(report.PARTS):
        sys.exit(f"there is no part {', '.join(sorted(unknown))}, but {', '.join(report.PARTS)}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.exit(asyncio.run(main(chosen or list(report.PARTS))))
