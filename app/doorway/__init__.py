"""What a peer can do before a handler sees it, and around one, is bounded here: how many
connections there are, how long a request may be and take, and for which host it may be.

A connection begins as an `Arrival`. With the head of its first request it becomes a Socket.IO
session, without uvicorn, or an `HttpConnection`: uvicorn's own protocol within limits. What is
refused ends as a `Parting`. `bounds` has what they share. This room and app/serving.py are the ones
that rely on what uvicorn does not document.
"""
