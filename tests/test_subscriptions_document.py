"""docs/subscriptions.md, run by the official client."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.machine import require
from tests.support.postgres import execute, run
from tests.support.server import RunningServer
from tests.test_your_own_table import running

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "subscriptions.md").read_text(encoding="utf-8")
# What the document's program is run with: the address, and a look at what it holds.
BEFORE = """
import {{ io as connect }} from 'socket.io-client';
const io = (namespace, options) =>
  connect('{url}' + namespace, {{reconnectionDelay: 100, ...options}});
"""
AFTER = """
const show = () => console.log(JSON.stringify([...rows.values()]));
for (const event of ['feed:loaded', 'order:create', 'order:update', 'order:destroy']) {
  open.on(event, show);
}
"""
ORDERS = """
    CREATE TABLE orders (id int PRIMARY KEY, status text NOT NULL, total numeric NOT NULL);
    SELECT feed.watch('orders', 'order');
    INSERT INTO orders VALUES (1, 'open', 100), (2, 'open', 200), (3, 'shipped', 300);
"""


def program(url: str) -> str:
    """The document's first program in JavaScript, for a server."""
    first: str = re.findall(r"```js\n(.*?)```", DOCUMENT, re.DOTALL)[0]
    return BEFORE.format(url=url) + first + AFTER


def holding(*totals: int) -> str:
    """What the program prints when it holds rows with these totals."""
    return r"^\[" + ",".join(rf"[^\]]*\"total\":{total}\}}" for total in totals) + r"\]$"


@pytest.mark.database
def test_the_official_client_holds_the_rows(
    start_server: Callable[..., RunningServer], database_url: str, tmp_path: Path
) -> None:
    """The document's program follows rows that come, change and leave, while the server runs, is
    killed and is away: every time it continues by itself.
    """

    def sql(*statements: str) -> None:
        run(execute(database_url, *statements))

    sql(ORDERS)
    server = start_server()
    (tmp_path / "node_modules").symlink_to(ROOT / "node_modules")
    (tmp_path / "client.mjs").write_text(program(server.url), encoding="utf-8")
    with running(require("node"), "client.mjs", cwd=tmp_path) as until:
        until(holding(200))
        sql("UPDATE orders SET total = 101 WHERE id = 1")
        until(holding(200, 101))
        sql("UPDATE orders SET status = 'shipped' WHERE id = 2")
        until(holding(101))
        server.stop(signal.SIGKILL)
        sql("UPDATE orders SET status = 'open' WHERE id = 3", "DELETE FROM orders WHERE id = 1")
        server.start()
        until(holding(101, 300))  # it continues, one change after the other
        until(holding(300))
