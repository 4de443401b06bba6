"""How long requests may be and take, and how much all of them together may hold."""

# A browser's longest request heads, cookies included, have about 8 KiB.
HEAD_BYTES = 16 * 1024
# Time for the head of a request, from the connection's start or the last response on; for a peer to
# read anything of a response; and for it to take the last answer and close.
PATIENCE_S = 10.0
# Time for the body of a request: 1 MiB at 280 kbit/s.
BODY_S = 30.0
# What requests that have not come in full may hold together.
UNFINISHED_BYTES = 8 * 1024 * 1024
# Requests that wait on a connection for the responses before them. No browser sends any.
MOST_PIPELINED = 16
# What a refused peer may still send. To close at once could take its answer away from it.
LINGER_BYTES = 4 * 1024 * 1024
# Connections beyond MAX_CLIENTS, so that health checks, REST and refusals still have a way in.
MOST_EXTRA, LEAST_EXTRA, EXTRA_SHARE = 256, 16, 1 / 8
FULL_RETRY_S = 5


def extra_connections(max_clients: int) -> int:
    """How many connections beyond this number are accepted."""
    return min(MOST_EXTRA, max(LEAST_EXTRA, int(max_clients * EXTRA_SHARE)))
