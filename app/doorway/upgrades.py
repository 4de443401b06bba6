"""Turns connections into Socket.IO sessions."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from app.doorway.answers import FULL, answer_of
from app.doorway.bounds import Bounds
from app.doorway.parting import Parting
from app.hosts import Hosts
from app.rest.problems import wrong_host
from app.socketio.handshake import EngineRequest, RequestRefused


class Upgrades:
    """Decides which connections become sessions, on the `paths` of Socket.IO."""

    def __init__(self, bounds: Bounds, hosts: Hosts, paths: Sequence[str]) -> None:
        self.paths = paths
        self.openings = tuple(f"GET {path}".encode() for path in paths)
        self._bounds = bounds
        self._hosts = hosts

    def open(
        self,
        transport: asyncio.Transport,
        arguments: dict[str, Any],
        request: EngineRequest,
        early: bytes,
    ) -> None:
        """Turn a connection into a session, or refuse it. `early`: what came after the request."""
        host = request.headers.get("host")
        if self._bounds.is_extra(transport):
            Parting(self._bounds, transport, arguments, FULL)
        elif not self._hosts.allow(host):
            Parting(self._bounds, transport, arguments, answer_of(*wrong_host(host)))
        else:
            try:
                arguments["app_state"]["socketio"].accept(transport, request)
            except RequestRefused as refused:
                Parting(self._bounds, transport, arguments, refused.as_http())
            else:
                if early:
                    cast(asyncio.Protocol, transport.get_protocol()).data_received(early)
