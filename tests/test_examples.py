"""The programs in examples/."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.postgres import execute, run
from tests.support.server import RunningServer
from tests.test_your_own_table import running

ROOT = Path(__file__).parent.parent
ORDERS = """
    CREATE TABLE orders (id int PRIMARY KEY, status text NOT NULL, total numeric NOT NULL);
    SELECT feed.watch('orders', 'order');
    INSERT INTO orders VALUES (1, 'open', 100), (2, 'shipped', 200);
"""


@pytest.mark.database
def test_a_program_in_python_holds_its_rows(
    start_server: Callable[..., RunningServer], database_url: str
) -> None:
    """The example holds two subscriptions on one connection, through a restart of the server."""

    def sql(*statements: str) -> None:
        run(execute(database_url, *statements))

    sql(ORDERS)
    server = start_server()
    program = [sys.executable, str(ROOT / "examples" / "subscribe.py"), server.url]
    with running(*program, cwd=ROOT) as until:
        until(r"^order \[\{[^}]*'total': 100\}\]$")
        sql("INSERT INTO things (name) VALUES ('a')")
        until(r"^thing \[\{[^}]*'name': 'a'[^}]*\}\]$")
        sql("UPDATE orders SET status = 'open' WHERE id = 2", "DELETE FROM orders WHERE id = 1")
        until(r"^order \[\{[^}]*'total': 200\}\]$")
        server.kill()
        sql("UPDATE orders SET total = 201", "INSERT INTO things (name) VALUES ('b')")
        server.start()
        until(r"^order \[\{[^}]*'total': 201\}\]$")
        until(r"^thing .*'a'.*'b'")
