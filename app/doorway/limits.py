"""How long requests may be and take, and how much all of them together may hold."""

# A browser's longest request heads, cookies included, have about 8 KiB.
HEAD_BYTES = 16 * 1024
# Time for the head of a request, from the start of the connection or the end of the last response;
# for a peer to read some of a response; and for it to read its last answer and close.
PATIENCE_S = 10.0
# Time for the body of a request: 1 MiB at 280 kbit/s.
BODY_S = 30.0
# What all incomplete requests may hold together.
UNFINISHED_BYTES = 8 * 1024 * 1024
# Requests on one connection that wait for earlier responses. No browser sends any.
MOST_PIPELINED = 16
# What a refused peer may still send. Closing at once could destroy the answer before it is read.
LINGER_BYTES = 4 * 1024 * 1024
# Connections beyond MAX_CLIENTS, so that health checks, REST and refusals still have a way in.
MOST_EXTRA, LEAST_EXTRA, EXTRA_SHARE = 256, 16, 1 / 8
FULL_RETRY_S = 5


def extra_connections(max_clients: int) -> int:
    """Return how many connections beyond this number are accepted."""
    return min(MOST_EXTRA, max(LEAST_EXTRA, int(max_clients * EXTRA_SHARE)))
