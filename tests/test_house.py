"""The house rules that a program can check."""

import ast
import inspect
from collections import Counter
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

ROOT = Path(__file__).parent.parent
MODULES = {path: ast.parse(path.read_text()) for path in (ROOT / "app").rglob("*.py")}


def test_no_two_classes_share_a_name() -> None:
    """Somebody names a class as another one in app/ is named already."""
    names = Counter(
        node.name
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_every_module_says_what_it_is() -> None:
    """Somebody adds a module without a sentence on what it is for."""
    assert [
        path.name
        for path, tree in MODULES.items()
        if path.name != "__init__.py" and not ast.get_docstring(tree)
    ] == []


def test_only_the_codec_imports_the_protocol_libraries() -> None:
    """Somebody uses python-engineio or python-socketio outside of app/socketio/codec.py."""
    importing = {
        path.name
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.split(".")[0] in ("engineio", "socketio")
    }
    assert importing == {"codec.py"}


def test_what_is_taken_from_uvicorn_is_there() -> None:
    """An upgrade of uvicorn takes away, or makes otherwise, what app/serving.py and app/doorway/
    rely on.
    """
    assert list(inspect.signature(HttpToolsProtocol).parameters) == [
        "config", "server_state", "app_state", "_loop",
    ]  # fmt: skip
    assert ServerState().connections == set()
    for method in (
        "connection_made", "connection_lost", "data_received", "shutdown", "pause_writing",
        "resume_writing", "on_message_begin", "on_headers_complete", "on_body",
        "on_message_complete", "on_response_complete", "_should_upgrade", "_should_upgrade_to_ws",
        "_unset_keepalive_if_required",
    ):  # fmt: skip
        assert callable(getattr(HttpToolsProtocol, method)), method
    source = inspect.getsource(HttpToolsProtocol)
    for attribute in (
        "self.parser.feed_data(data)", "self.url += url", "self.headers.append((name, value))",
        "self.pipeline.appendleft(", "self.cycle = RequestResponseCycle(", "self.flow = ",
        "on_response=self.on_response_complete", "self.transport = transport",
        "self.timeout_keep_alive_task = self.loop.call_later(",
    ):  # fmt: skip
        assert attribute in source, attribute
    cycle = inspect.getsource(RequestResponseCycle)
    for attribute in ("response_started", "response_complete", "keep_alive"):
        assert f"self.{attribute} = " in cycle
    for method in ("startup", "shutdown", "capture_signals", "serve"):
        assert callable(getattr(uvicorn.Server, method))
    server = uvicorn.Server(uvicorn.Config("app"))
    assert (server.started, server.should_exit) == (False, False)
    startup = inspect.getsource(uvicorn.Server.startup)
    assert "config.http_protocol_class(" in startup and "app_state=self.lifespan.state" in startup
    assert uvicorn.Config("app", http=HttpToolsProtocol).http is HttpToolsProtocol
