"""The command `tablecast`: serve, migrate, psql, watch, unwatch, topics."""

import asyncio
import contextlib
import errno
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NoReturn

import click
import uvloop

from app.database import topics
from app.database.connections import Refusal, connect, ignore_unreadable_home
from app.database.embedded import embedded, has_database
from app.database.migration import check, migrate
from app.database.psql import run_psql, without_password
from app.database.rights import Rights, refuse_serving, refuse_watching
from app.database.unprivileged import UNPRIVILEGED, data_directory
from app.logs import log_to_stderr
from app.settings import SettingError, Settings, flag, misspelled, variable

logger = logging.getLogger("tablecast.cli")

REFUSED, WRONG_USE = 1, 2
FROM_ENVIRONMENT = 'psql "$DATABASE_URL"'
EXAMPLE = "INSERT INTO things (name) VALUES ('hello at ' || now())"
SAMPLES = """
    INSERT INTO public.things (name, info)
    SELECT name, info
    FROM (VALUES
        ('apple', 'edit me'),
        ('pear', 'or change me with psql'),
        ('plum 🟣', 'any text is a name')
    ) AS sample (name, info)
    WHERE NOT EXISTS (SELECT FROM public.things)
"""


def options(*names: str) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Add these settings (default: all) as options to a command, and call it with Settings."""

    def decorate(run: Callable[..., None]) -> Callable[[], None]:
        def command(*given: Any, **values: Any) -> None:
            texts = {
                option.name: values.pop(option.name)
                for option in fields(Settings)
                if option.name in values
            }
            environ = dict(os.environ) | {
                name.upper(): text for name, text in texts.items() if text is not None
            }
            run(Settings.read(environ), *given, **values)

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__click_params__ = getattr(run, "__click_params__", [])  # type: ignore[attr-defined]
        decorated: Callable[..., None] = command
        for option in reversed(fields(Settings)):
            if not names or option.name in names:
                default = option.metadata["shown"] or option.default
                shown = "" if default is None else f" [default: {default}]"
                text = f"{option.metadata['help']}{shown} [env: {variable(option)}]"
                decorated = click.option(flag(option), option.name, help=text)(decorated)
        return decorated

    return decorate


def in_utf_8(_: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Return an argument as it is. Raises BadParameter unless it is UTF-8, as Postgres requires."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise click.BadParameter("it must be UTF-8.", param=parameter) from None
    return value


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tablecast")
def tablecast() -> None:
    """Show the rows of a Postgres table in browsers and keep them up to date."""


@tablecast.command()
@options()
@click.option(
    "--migrate",
    "migrating",
    is_flag=True,
    help="bring the database up to date first (an embedded one always is)",
)
def serve(settings: Settings, migrating: bool) -> None:
    """Serve the page, the API and the live feed.

    The embedded database is created, migrated and filled with a few samples automatically; the
    database in DATABASE_URL is migrated only with --migrate.
    """
    from app.serving import serve as serve_until_stopped  # the other commands do not need it

    log_to_stderr(settings.log_level.upper())
    for name, similar in misspelled(os.environ):
        logger.warning("%s is not a setting; %s is", name, similar)
    with database(settings, create=True) as url:
        if migrating and settings.database_url:
            migrate(url, settings.things)
        asyncio.run(check(url, settings.things))
        command = settings.psql_command or psql_command(settings)
        # On another machine this machine's command is useless, and its paths should not leak.
        shown = command if is_loopback(settings.host) else settings.psql_command

        def say(address: str) -> None:
            announce(address, command, settings)

        served = replace(settings, database_url=url, psql_command=shown)
        try:
            uvloop.run(serve_until_stopped(served, say))
        except OSError as error:
            raise Refusal(listening_problem(settings, error)) from error


def announce(address: str, command: str, settings: Settings) -> None:
    """Print where the server is, and how to write to its database."""
    for everywhere, here in (("//0.0.0.0:", "//127.0.0.1:"), ("//[::]:", "//[::1]:")):
        address = address.replace(everywhere, here)  # one that a browser can open
    click.echo(f"Tablecast is at {address}")
    if settings.things:
        click.echo(f'Change its table:  {command} -c "{EXAMPLE}"')
    else:
        click.echo(f"Change its tables:  {command}")
    if command == FROM_ENVIRONMENT:
        click.echo("In another terminal, set DATABASE_URL there as well.")
    if settings.database_url is None:
        directory = data_directory(settings.data_dir)
        if directory != settings.data_dir.absolute():
            click.echo(
                f"Its data is in {directory}: the user {UNPRIVILEGED}, as whom Postgres runs for"
                f" root, cannot get into {settings.data_dir.absolute().parent}."
            )


@tablecast.command("migrate")
@options("database_url", "data_dir", "things")
def migrate_command(settings: Settings) -> None:
    """Bring the database in DATABASE_URL up to date. Safe to run twice, even at the same time.

    The embedded database needs no migrating: it is brought up to date whenever it starts.
    """
    with database(settings) as url:
        if settings.database_url:
            migrate(url, settings.things)
        click.echo("The database is up to date.")


@tablecast.command(context_settings={"ignore_unknown_options": True})
@options("database_url", "data_dir")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(settings: Settings, arguments: tuple[str, ...]) -> None:
    """Open psql on the database; ARGUMENTS are psql's own, such as -c "SELECT 1".

    An embedded database is started for that if it is not running, but not created.
    """
    with database(settings) as url:
        signal.signal(signal.SIGINT, lambda *_: None)  # in psql it cancels a query
        sys.exit(run_psql(url, arguments))


@tablecast.command()
@options("database_url", "data_dir")
@click.argument("table", callback=in_utf_8)
@click.option(
    "--topic",
    callback=in_utf_8,
    help="what the events are named after [default: as now, else the table's name]",
)
@click.option(
    "--destroy-with",
    callback=in_utf_8,
    metavar="COLUMN",
    help="what a destroy carries: the value of this unique column [default: as now, else the key]",
)
def watch(settings: Settings, table: str, topic: str | None, destroy_with: str | None) -> None:
    """Make a table live; TABLE is its name as in SQL. Repeat it to change the topic or column."""
    with migrated_database(settings, refuse_watching) as url:
        watched, before = asyncio.run(topics.watch(url, table, topic, destroy_with))
    name = watched.name
    click.echo(
        f"{watched.table} is watched: its events are {name}:create, {name}:update, {name}:destroy"
        f" and {name}:truncate."
    )
    if watched.destroy_with is not None:
        click.echo(f"A destroy carries the value of the column {watched.destroy_with}.")
    if before not in (None, name):
        click.echo(
            f"Its topic was {before} before; clients that follow {before} receive nothing any more."
        )


@tablecast.command()
@options("database_url", "data_dir")
@click.argument("table", callback=in_utf_8)
def unwatch(settings: Settings, table: str) -> None:
    """Stop following a table; TABLE is its name as in SQL."""
    with migrated_database(settings, refuse_watching) as url:
        topic = asyncio.run(topics.unwatch(url, table))
    click.echo(f"{table} is not watched any more; its topic was {topic}.")


@tablecast.command("topics")
@options("database_url", "data_dir")
def topics_command(settings: Settings) -> None:
    """List the watched tables."""
    with migrated_database(settings) as url:
        found = asyncio.run(topics.list_topics(url))
    if not found:
        click.echo("No table is watched.")
        return
    rows = [("topic", "table", "key", "destroy carries", "problem")]
    rows += [
        (each.name, each.table, ", ".join(each.key), each.destroy_with or "the key",
         each.problem or "none")
        for each in found
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


@contextlib.contextmanager
def migrated_database(settings: Settings, rights: Rights = refuse_serving) -> Iterator[str]:
    """Yield the URL of the chosen database, which must exist and be up to date.

    Raises Refusal, also if `rights` finds that the role lacks a privilege.
    """
    with database(settings) as url:
        asyncio.run(check(url, False, rights))  # these commands do not need the sample table
        yield url


@contextlib.contextmanager
def database(settings: Settings, create: bool = False) -> Iterator[str]:
    """Yield the URL of the chosen database; an embedded one is migrated, and runs during the block.

    Raises Refusal, also if there is no embedded one and `create` is false.
    """
    if settings.database_url is not None:
        yield settings.database_url
        return
    if not create and not has_database(settings.data_dir):
        raise Refusal(
            f"There is no embedded database in {settings.data_dir} yet: start Tablecast first, name"
            " another directory with DATA_DIR or --data-dir, or a database with DATABASE_URL."
        )
    with embedded(settings.data_dir) as url:
        if migrate(url, settings.things) is None and settings.things:  # it was empty
            asyncio.run(execute(url, SAMPLES))
        yield url


async def execute(url: str, statement: str) -> None:
    """Run one statement."""
    connection = await connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def listening_problem(settings: Settings, error: OSError) -> str:
    """Return the sentence that says why the server cannot listen on its address."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {settings.port} on {settings.host} is in use: choose another with PORT or"
            " --port."
        )
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM):
        reason = "this user may not use that port; choose one above 1023 with PORT or --port"
    elif error.errno == errno.EADDRNOTAVAIL:
        reason = "that is not an address of this machine; choose another with HOST or --host"
    elif error.errno in (socket.EAI_NONAME, socket.EAI_AGAIN):
        reason = "there is no such host; choose another with HOST or --host"
    return f"Cannot listen on {settings.host}, port {settings.port}: {reason}."


def psql_command(settings: Settings) -> str:
    """Return the command that opens psql on the chosen database, from the current directory."""
    if settings.database_url is None:
        default = settings.data_dir == Settings().data_dir
        option = "" if default else f" --data-dir {shlex.quote(str(settings.data_dir))}"
        return f"{shlex.quote(own_name())} psql{option}"
    if settings.database_url == os.environ.get("DATABASE_URL"):
        return FROM_ENVIRONMENT
    return f"psql {shlex.quote(without_password(settings.database_url)[0])}"


def own_name() -> str:
    """Return how to run this program from here: its name if that is on PATH, else its path."""
    path = Path(sys.argv[0]).absolute()
    found = shutil.which(path.name)
    if found is not None and Path(found).absolute() == path:
        return path.name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on this address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> NoReturn:
    """Run the command and exit with 0, or with another code and a message on standard error."""
    ignore_unreadable_home()
    try:
        sys.exit(tablecast.main(standalone_mode=False))
    except KeyboardInterrupt:
        sys.exit(0)  # interrupted before anything was running
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(WRONG_USE)
    except click.Abort:
        sys.exit(0)
    except (SettingError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else error
        click.echo(f"tablecast: {message}", err=True)
        sys.exit(WRONG_USE)
    except Refusal as error:
        sentence = str(error).replace("`tablecast ", f"`{own_name()} ")
        click.echo(f"tablecast: {sentence}", err=True)
        sys.exit(REFUSED)
