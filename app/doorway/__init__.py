"""Bounds what a peer can do before a handler sees it, and around one: how many connections there
are, how long a request may be and take, and which host it may be for.

A connection begins as an `Arrival`. Once the head of its first request has arrived, it becomes a
Socket.IO session, without uvicorn, or an `HttpConnection`: uvicorn's own protocol, within limits. A
refused connection ends as a `Parting`. `bounds` has what they share. Only this package and
app/serving.py rely on undocumented parts of uvicorn.
"""
