"""What docker-compose.yml says; `docker-compose up` itself needs an engine that may pull images."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

ROOT = Path(__file__).parent.parent
Service = dict[str, Any]


@pytest.fixture
def services() -> dict[str, Service]:
    """The services by name."""
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    services: dict[str, Service] = document["services"]
    return services


def test_the_database_takes_no_port_of_the_machine(services: dict[str, Service]) -> None:
    """A user starts it where a Postgres already runs on port 5432."""
    assert "ports" not in services["database"]


def test_the_log_says_the_address_that_a_browser_opens(services: dict[str, Service]) -> None:
    """Inside the container the port is the published one, on this machine's loopback alone."""
    [port] = services["app"]["ports"]
    inside = services["app"]["environment"]["PORT"]
    assert port == f"127.0.0.1:{inside}:{inside}"


def test_the_command_shown_opens_psql_on_its_database(services: dict[str, Service]) -> None:
    """The console and the page name the container and the user of DATABASE_URL."""
    environment = services["app"]["environment"]
    url = urlsplit(environment["DATABASE_URL"].replace("${POSTGRES_PASSWORD:-tablecast}", "x"))
    user = services["database"]["environment"]["POSTGRES_USER"]
    assert (url.username, url.path) == (user, f"/{user}")  # psql takes the user's name for the rest
    assert environment["PSQL_COMMAND"] == f"docker-compose exec {url.hostname} psql -U {user}"
