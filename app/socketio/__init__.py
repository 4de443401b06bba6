"""Socket.IO, from the top: `server` knows namespaces and CONNECT, `engine` the Engine.IO sessions.

A `session` is either `websocket` (the connection itself, on our own server) or `queued` (long
polling, and WebSockets of any other ASGI server). `connecting`, `handshake`, `rfc6455`, `frames`
and `codec` are values and tools for these. Another kind of transport, such as Server-Sent Events,
would be a package next to this one; like this one, it would give `live` a `Transport`.
"""
