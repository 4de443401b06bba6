"""The OpenAPI document says what the server does."""

import subprocess
import sys
from pathlib import Path

import httpx

from app.rest import about, health, openapi, things, topics
from app.settings import Settings
from tests.support.server import RunningServer

SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"
EXAMPLES_PER_OPERATION = 40
FUZZING_TIMEOUT_S = 120
# What fits a column depends on the table, which the document does not know: a list may be refused
# although its parameters are strings, as promised. And it is tried on a topic that there is.
CONFIGURATION = """
[[operations]]
include-operation-id = "listRows"
parameters = {"path.topic" = "thing"}
checks.positive_data_acceptance.expected-statuses = ["2xx", "422"]
"""


async def test_the_document_is_served(server: RunningServer) -> None:
    """A tool fetches the document."""
    async with httpx.AsyncClient() as client:
        response = await client.get(f"{server.url}/openapi.json")
    assert response.headers["Content-Type"] == "application/json"
    assert response.json() == openapi.DOCUMENT
    assert response.json()["openapi"] == "3.1.0"


async def test_the_document_names_every_method(server: RunningServer) -> None:
    """The methods in the document are those that each path allows."""
    async with httpx.AsyncClient() as client:
        for path, operations in openapi.DOCUMENT["paths"].items():
            allowed = (await client.options(server.url + path)).headers["Allow"].split(", ")
            documented = {method.upper() for method in operations} - {"PARAMETERS"}
            assert set(allowed) == documented | {"HEAD", "OPTIONS"}


def test_the_document_names_every_address() -> None:
    """The document has every route."""
    shown = about.routes(Settings())
    routed = {
        route.path_format for route in [*things.routes, *topics.routes, *health.routes, *shown]
    }
    assert routed == openapi.DOCUMENT["paths"].keys() - {f"{things.COLLECTION}/"}


def test_fuzzing_finds_nothing(server: RunningServer, tmp_path: Path) -> None:
    """Schemathesis tries to get a response that the document does not promise."""
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    finished = subprocess.run(
        [
            SCHEMATHESIS,
            "run",
            f"{server.url}/openapi.json",
            "--checks=all",
            f"--max-examples={EXAMPLES_PER_OPERATION}",
            "--seed=1",
            "--request-timeout=10",
            "--no-color",
        ],
        cwd=tmp_path,  # it writes files where it runs
        timeout=FUZZING_TIMEOUT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
    assert f"Tested: {count_operations()}" in finished.stdout, finished.stdout
    assert "Traceback" not in server.log


def count_operations() -> int:
    """Return how many operations the document has."""
    return sum(
        method != "parameters" for path in openapi.DOCUMENT["paths"].values() for method in path
    )
