"""Socket.IO, from the top: `server` knows namespaces and CONNECT, `engine` the Engine.IO sessions.

A `session` is either `websocket` (the connection itself, on our own server) or `queued` (long
polling, and WebSockets of any other ASGI server). `handshake`, `rfc6455`, `frames` and `codec` are
values and tools for these. Another kind of transport, such as Server-Sent Events, is a room next to
this one; like this one it hands `live` something with `try_write`,
`unsent_bytes`, `drained` and `close`.
"""
