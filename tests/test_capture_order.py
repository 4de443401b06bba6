"""From nested statements to the log: whatever runs inside what, folding the log gives the table,
and what a filter lets through of it the rows that match.

The property test draws a small schema with triggers, foreign keys and functions that write, and
transactions on it. It plays them twice: on unwatched tables and on watched ones. Both must have the
same outcome, statement by statement, and folding the log of the second must give its tables.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from app.database.connections import Connection, connect
from tests.support.scale import scaled

pytestmark = pytest.mark.database

EXAMPLES = scaled(80, 20_000)
Draw = Callable[[st.SearchStrategy[Any]], Any]

# The values a key of each type may have, and SQL that turns one into the next. The numeric keys
# include two spellings of equal values.
KEYS = {
    "int": ("01234", "($1 + 1) % 5"),
    "bigint": ("01234", "($1 + 1) % 5"),
    "text": ("abcde", "translate($1, 'abcde', 'bcdea')"),
    "uuid": (
        [f"{letter * 8}-0000-0000-0000-000000000000" for letter in "abcde"],
        "translate($1::text, 'abcde', 'bcdea')::uuid",
    ),
    "numeric": (
        ["0", "1", "1.0", "2", "2.00"],
        "CASE scale($1) WHEN 0 THEN $1 + 0.0 ELSE trim_scale(($1 + 1) % 4) END",
    ),
}
SECOND = ["'x'", "'y'"]  # values of a second key column
# Whether a trigger may write: limits the depth, and also the number of calls in a transaction,
# because deferred triggers start again at depth 1.
MAY_RUN = """
    CREATE FUNCTION may_run(depth int) RETURNS boolean LANGUAGE sql AS $$
        SELECT pg_trigger_depth() <= depth AND set_config('test.calls',
            (coalesce(nullif(current_setting('test.calls', true), ''), '0')::int + 1)::text, true
        )::int <= 30
    $$
"""
ACTIONS = ["", "ON DELETE CASCADE", "ON DELETE SET NULL", "ON DELETE SET DEFAULT"]
UPDATE_ACTIONS = ["", "ON UPDATE CASCADE", "ON UPDATE SET NULL", "ON UPDATE SET DEFAULT"]
DEFERRABLE = ["", "DEFERRABLE", "DEFERRABLE INITIALLY DEFERRED"]


class Violation(AssertionError):
    """The log is not what was promised."""


@dataclass(frozen=True)
class Table:
    """A table of a scenario: its name, its columns, and which of them form its primary key."""

    name: str
    definition: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    deferrable: bool


@dataclass(frozen=True)
class Transaction:
    """Statements between BEGIN and `end`; without `end` each is its own transaction.

    If it is guarded, a statement that fails is rolled back by itself.
    """

    statements: list[str]
    end: str | None
    guarded: bool


@dataclass(frozen=True)
class Scenario:
    """Tables, the triggers and functions on them, and the transactions to run."""

    tables: list[Table]
    definitions: list[str]
    transactions: list[Transaction] = field(default_factory=list)


@dataclass
class Writer:
    """Draws statements that write to one of the tables.

    `row` is the record (NEW or OLD) that a trigger's statements may refer to.
    """

    draw: Draw
    tables: list[Table]
    keys: list[str]
    row: str | None = None
    nested: bool = False
    functions: bool = False

    def one_of(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def key(self) -> str:
        choices = [*self.keys]
        if self.row:
            choices = [f"{self.row}.id", f"next({self.row}.id)", choices[0], choices[1]]
        return str(self.one_of(choices))

    def value(self, of: str = "v") -> str:
        choices = ["0", "1", "2", f"({of} + 1) % 3"]
        if self.functions:
            choices.append("f(1)")
        return str(self.one_of(choices if of else [c for c in choices if "%" not in c]))

    def values(self, table: Table, key: str | None = None) -> str:
        row = [key or self.key()]
        for column in table.columns[1:]:
            if column == "k":
                row.append(self.one_of(SECOND))
            elif column == "v":
                row.append(self.value(""))
            else:
                row.append(self.one_of(["NULL", row[0], "DEFAULT", self.key()]))
        return f"({', '.join(row)})"

    def change(self, table: Table) -> str:
        """A SET clause."""
        column = self.one_of(["v", *table.columns])
        if column == "v":
            return f"v = {self.value(f'{table.name}.v')}"
        if column == "k":
            return f"k = {self.one_of(SECOND)}"
        value = self.one_of([f"next({table.name}.{column})", self.key()])
        return f"{column} = {value}"

    def where(self, table: Table) -> str:
        one = f"{table.name}.id = {self.key()}"
        choices = [one, one, f"{table.name}.v = {self.one_of('012')}", "true"]
        if self.functions:
            choices.append(f"{table.name}.v <> f(1)")
        return str(self.one_of(choices))

    def insert(self, table: Table) -> str:
        rows = ", ".join(self.values(table) for _ in range(self.one_of([1, 1, 2, 3])))
        conflict = self.one_of(["", "DO NOTHING", "DO NOTHING", "UPDATE", "UPDATE"])
        if conflict and table.deferrable:  # ON CONFLICT cannot use a deferrable key
            conflict = ""
        elif conflict == "UPDATE":
            conflict = f"({', '.join(table.key)}) DO UPDATE SET {self.change(table)}"
        return (
            f"INSERT INTO {table.name} ({', '.join(table.columns)}) VALUES {rows}"
            f"{' ON CONFLICT ' + conflict if conflict else ''}"
        )

    def update(self, table: Table) -> str:
        return f"UPDATE {table.name} SET {self.change(table)} WHERE {self.where(table)}"

    def delete(self, table: Table) -> str:
        return f"DELETE FROM {table.name} WHERE {self.where(table)}"

    def merge(self, table: Table) -> str:
        matched = ["DELETE", f"UPDATE SET {self.change(table)}", "DO NOTHING"]
        given = [f"({self.key()}, {self.one_of('012')})" for _ in range(self.one_of([1, 2, 3]))]
        other = self.values(table, self.one_of([None, "next(s.id)", "s.id"]))
        return (
            f"MERGE INTO {table.name} USING (VALUES {', '.join(given)}) AS s (id, n)"
            f" ON {table.name}.id = s.id WHEN MATCHED AND s.n = 0 THEN {self.one_of(matched)}"
            f" WHEN MATCHED THEN {self.one_of(matched)}"
            f" WHEN NOT MATCHED THEN INSERT ({', '.join(table.columns)})"
            f" VALUES {other.replace('DEFAULT', 'NULL')}"
        )

    def with_parts(self, table: Table) -> str:
        kinds = [self.insert, self.update, self.delete]
        parts = [
            f"w{i} AS ({self.one_of(kinds)(self.one_of(self.tables))} RETURNING 1)"
            for i in range(self.one_of([1, 2]))
        ]
        return f"WITH {', '.join(parts)} {self.one_of(kinds)(table)}"

    def calling(self, table: Table) -> str:
        kind = self.one_of(["SELECT", "INSERT", "RETURNING"])
        if kind == "SELECT":
            verb = "PERFORM" if self.nested else "SELECT"
            return (
                f"{verb} {self.one_of(['f(0)', 'count(f(0))', 'f(id)'])}".replace("f(id)", "f(v)")
                + f" FROM {table.name}"
            )
        if kind == "INSERT":
            return (
                f"INSERT INTO {table.name} (id, v) SELECT {self.key()}, f(0)"
                f" FROM generate_series(1, {self.one_of('12')}) ON CONFLICT DO NOTHING"
            )
        write = self.one_of([self.insert, self.update, self.delete])(table)
        return (
            f"WITH w AS ({write} RETURNING f(0)) {self.one_of([self.insert, self.update])(table)}"
        )

    def statement(self) -> str:
        table = self.one_of(self.tables)
        kinds = [self.insert, self.update, self.delete, self.merge, self.with_parts]
        if self.functions:
            kinds.append(self.calling)
        if self.row is None:
            kinds.insert(0, self.insert)
        return str(self.one_of(kinds)(table))

    def body(self, at_most: int = 2) -> str:
        """Return statements in PL/pgSQL, possibly with failures ignored."""
        statements = "; ".join(self.statement() for _ in range(self.draw(st.integers(1, at_most))))
        if self.one_of([False, True]):
            return f"BEGIN {statements}; EXCEPTION WHEN OTHERS THEN NULL; END"
        return statements


def draw_table(draw: Draw, name: str, kind: str, keys: list[str], others: list[Table]) -> Table:
    columns = {"id": f"{kind} NOT NULL"}
    key = ["id"]
    if draw(st.sampled_from([False, False, False, True])):
        columns["k"] = "text NOT NULL DEFAULT 'x'"
        key.append("k")
    columns["v"] = "int DEFAULT 0"
    deferrable = draw(st.sampled_from(["", "", "", *DEFERRABLE[1:]]))
    constraints = [f"PRIMARY KEY ({', '.join(key)}) {deferrable}"]
    parents = [other for other in others if len(other.key) == 1 and not other.deferrable]
    if len(key) == 1 and not deferrable:
        parents.append(Table(name, "", (), ("id",), False))
    for column in "pq"[: draw(st.integers(0, 2)) if parents else 0]:
        default = draw(st.sampled_from(["", "", f" DEFAULT {keys[0]}"]))
        columns[column] = kind + default
        constraints.append(
            f"FOREIGN KEY ({column}) REFERENCES {draw(st.sampled_from(parents)).name} "
            f"{draw(st.sampled_from(ACTIONS))} {draw(st.sampled_from(UPDATE_ACTIONS))} "
            f"{draw(st.sampled_from(DEFERRABLE))}"
        )
    definition = ", ".join([*(f"{name} {type}" for name, type in columns.items()), *constraints])
    return Table(name, definition, tuple(columns), tuple(key), bool(deferrable))


def draw_trigger(writer: Writer, number: int) -> str:
    """A trigger and its function."""
    draw, one_of = writer.draw, writer.one_of
    table = one_of(writer.tables)
    event = one_of(["INSERT", "UPDATE", "DELETE"])
    timing = one_of(["BEFORE", "AFTER", "AFTER", "CONSTRAINT"])
    level = "ROW" if timing == "CONSTRAINT" else one_of(["ROW", "ROW", "STATEMENT"])
    row = {"INSERT": "NEW", "DELETE": "OLD"}.get(event) or one_of(["NEW", "OLD"])
    inside = Writer(draw, writer.tables, writer.keys, row, True, writer.functions)
    if level == "STATEMENT":
        inside.row = None
    name = f"{one_of(['a', 'z'])}{number}"
    result = "OLD" if event == "DELETE" else "NEW"
    first = ""
    if level == "STATEMENT":
        result = "NULL"
    elif timing == "BEFORE":
        result = one_of([result, result, result, result, "NULL"])
        if event != "DELETE":
            first = one_of(["", "", "NEW.v := 2; ", "NEW.id := next(NEW.id); "])
    depth = draw(st.integers(1, 3))
    made = "CONSTRAINT TRIGGER" if timing == "CONSTRAINT" else "TRIGGER"
    when = "AFTER" if timing == "CONSTRAINT" else timing
    deferred = "DEFERRABLE INITIALLY DEFERRED" if timing == "CONSTRAINT" else ""
    return (
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {first}"
        f"IF may_run({depth}) THEN {inside.body()}; END IF; RETURN {result}; END $$;\n"
        f"CREATE {made} {name} {when} {event} ON {table.name} {deferred}"
        f" FOR EACH {level} EXECUTE FUNCTION {name}()"
    )


@st.composite
def scenarios(draw: Draw) -> Scenario:
    """Two or three tables, triggers on them, and a few transactions."""
    kind = draw(st.sampled_from(["int", *KEYS]))
    literals, following = KEYS[kind]
    keys = [f"'{literal}'::{kind}" for literal in literals]
    tables: list[Table] = []
    for name in ("a", "b", "c")[: draw(st.integers(1, 3))]:
        tables.append(draw_table(draw, name, kind, keys, tables))
    definitions = [
        MAY_RUN,
        f"CREATE FUNCTION next({kind}) RETURNS {kind} LANGUAGE sql IMMUTABLE"
        f" AS $$SELECT {following}$$",
    ]
    writer = Writer(draw, tables, keys)
    if draw(st.booleans()):
        body = Writer(draw, tables, keys, nested=True).body()
        definitions.append(
            "CREATE FUNCTION f(given int) RETURNS int LANGUAGE plpgsql AS $$"
            f" BEGIN IF may_run(2) THEN {body}; END IF; RETURN given; END $$"
        )
        writer.functions = True
    definitions += [draw_trigger(writer, i) for i in range(draw(st.integers(0, 4)))]

    # The first transaction fills the tables.
    fill = [
        f"INSERT INTO {table.name} (id, v) VALUES ({key}, {draw(st.integers(0, 2))})"
        for table in tables
        for key in draw(st.lists(st.sampled_from(keys), max_size=4, unique=True))
    ]
    transactions = [Transaction(fill, None, False)]
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([None, "COMMIT", "COMMIT", "ROLLBACK"]))
        steps = []
        for _ in range(draw(st.integers(1, 4))):
            other = draw(st.integers(0, 11)) if end else 0
            if other == 11:
                steps.append(draw(st.sampled_from(CONTROL)))
            elif other == 10:
                steps.append(f"TRUNCATE {draw(st.sampled_from(tables)).name} CASCADE")
            else:
                steps.append(writer.statement())
        transactions.append(Transaction(steps, end, draw(st.booleans())))
    return Scenario(tables, definitions, transactions)


CONTROL = [
    "SAVEPOINT s", "ROLLBACK TO s", "RELEASE s", "SET CONSTRAINTS ALL IMMEDIATE",
    "SET CONSTRAINTS ALL DEFERRED",
]  # fmt: skip


@dataclass
class Played:
    """The outcome of a transaction: an error code or '' for each statement, and then the rows."""

    outcomes: list[str]
    rows: list[tuple[str, str]]


async def outcome(connection: Connection, statement: str) -> str:
    try:
        await connection.execute(statement)
    except asyncpg.PostgresError as error:
        return str(error.sqlstate)
    return ""


async def play(connection: Connection, scenario: Scenario, transaction: Transaction) -> Played:
    """Run a transaction, then read the tables."""
    outcomes = []
    if transaction.end:
        await connection.execute("BEGIN")
    for statement in transaction.statements:
        guarded = transaction.guarded and transaction.end
        if guarded:
            await outcome(connection, "SAVEPOINT guard")
        outcomes.append(await outcome(connection, statement))
        if guarded and outcomes[-1]:
            await connection.execute("ROLLBACK TO guard")
    if transaction.end:
        outcomes.append(await outcome(connection, transaction.end))
    rows = await connection.fetch(
        " UNION ALL ".join(
            f"SELECT '{table.name}', row_to_json({table.name})::text FROM {table.name}"
            for table in scenario.tables
        )
    )
    return Played(outcomes, sorted((name, row) for name, row in rows))


@dataclass
class Fold:
    """The tables according to the log; checks that each change applies to the rows there are.

    `filtered`: the rows that a subscriber holds for each value of `v`, which hears only of changes
    to and from it.
    """

    tables: dict[str, Table]
    rows: dict[tuple[str, ...], str] = field(default_factory=dict)
    filtered: dict[str, dict[tuple[str, ...], str]] = field(
        default_factory=lambda: {v: {} for v in "012"}
    )
    updates: Counter[str] = field(default_factory=Counter)

    def key(self, topic: str, row: str) -> tuple[str, ...]:
        values = json.loads(row, parse_int=str, parse_float=str)
        return (topic, *(values[column] for column in self.tables[topic].key))

    def apply(self, topic: str, op: str, old: str | None, new: str | None) -> None:
        change = f"{topic}:{op} {old} -> {new}"
        held = {"create": (False, True), "update": (True, True), "destroy": (True, False)}
        if op == "truncate":
            for rows in (self.rows, *self.filtered.values()):
                for key in [key for key in rows if key[0] == topic]:
                    del rows[key]
            return
        if op not in held or (old is not None, new is not None) != held[op]:
            raise Violation(f"impossible change: {change}")
        if old and new and self.key(topic, old) != self.key(topic, new):
            raise Violation(f"an update of the key: {change}")
        key = self.key(topic, old or new or "")
        if not self.tables[topic].deferrable and self.rows.get(key) != old:
            raise Violation(f"{change}, but the row was {self.rows.get(key)}")
        self.rows.pop(key, None)
        if new:
            self.rows[key] = new
        for value, matching in self.filtered.items():
            if has(new, value):
                matching[key] = new or ""
            elif has(old, value):
                matching.pop(key, None)
        self.updates[topic] += op == "update"


def has(row: str | None, value: str) -> bool:
    """Whether there is a row, with a value of `v`."""
    return row is not None and json.loads(row, parse_int=str, parse_float=str)["v"] == value


RESET = """
    SET search_path = public; SET client_min_messages = warning;
    DROP SCHEMA IF EXISTS unwatched CASCADE; DROP SCHEMA IF EXISTS watched CASCADE;
    DELETE FROM feed.topic; SELECT feed.drop_unused_captures(); TRUNCATE feed.change;
"""
# Only on the unwatched tables: counts the rows whose update changed something.
COUNT = """
    CREATE TABLE counted (name text);
    CREATE FUNCTION count_update() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO counted VALUES (TG_TABLE_NAME); RETURN NULL; END $$;
"""


async def make(connection: Connection, scenario: Scenario, schema: str) -> None:
    statements = [f"CREATE SCHEMA {schema}; SET search_path = {schema}, public"]
    statements += [f"CREATE TABLE {table.name} ({table.definition})" for table in scenario.tables]
    if schema == "watched":
        statements += [
            f"SELECT feed.watch('{table.name}', '{table.name}')" for table in scenario.tables
        ]
    else:
        statements.append(COUNT)
        statements += [
            f"CREATE TRIGGER counting AFTER UPDATE ON {table.name} FOR EACH ROW"
            " WHEN (OLD.* OPERATOR(pg_catalog.*<>) NEW.*) EXECUTE FUNCTION count_update()"
            for table in scenario.tables
        ]
    await connection.execute(";\n".join([*statements, *scenario.definitions]))


async def check(connection: Connection, scenario: Scenario) -> None:
    """Play a scenario in both schemas. Raises Violation."""
    await connection.execute(RESET)
    await make(connection, scenario, "unwatched")
    expected = []
    for transaction in scenario.transactions:
        played = await play(connection, scenario, transaction)
        made = await connection.fetch("SELECT name, count(*) FROM counted GROUP BY name")
        expected.append((played, Counter(dict(made))))
    await make(connection, scenario, "watched")
    fold = Fold({table.name: table for table in scenario.tables})
    last = await connection.fetchval("SELECT max(id) FROM feed.change")  # of watching them
    for transaction, (there, made) in zip(scenario.transactions, expected, strict=True):
        here = await play(connection, scenario, transaction)
        if here != there:
            raise Violation(f"{transaction}: watched {here}, unwatched {there}")
        logged = await connection.fetch(
            "SELECT id, topic, op, old::text, new::text FROM feed.change WHERE id > $1 ORDER BY id",
            last,
        )
        for id, *change in logged:
            last = id
            fold.apply(*change)
        if sorted((key[0], row) for key, row in fold.rows.items()) != here.rows:
            raise Violation(
                f"{transaction}: the log gives {fold.rows}, the tables have {here.rows}"
            )
        for value, rows in fold.filtered.items():
            matching = sorted((name, row) for name, row in here.rows if has(row, value))
            if sorted((key[0], row) for key, row in rows.items()) != matching:
                raise Violation(f"{transaction}: v = {value} gives {rows}, and should {matching}")
        if not fold.updates <= made:
            raise Violation(f"{transaction}: {fold.updates} logged, {made} made")


def check_examples(url: str, examples: int, *sabotage: str, shrink: bool = True) -> None:
    """Check drawn scenarios until one is a violation, in a database altered by `sabotage`."""
    with asyncio.Runner() as runner:
        connection = runner.run(connect(url))

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=DERANDOMIZE,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        )
        @given(scenarios())
        def holds(scenario: Scenario) -> None:
            note(as_sql(scenario))
            runner.run(check(connection, scenario))

        try:
            for statement in sabotage:
                runner.run(connection.execute(statement))
            holds()
        finally:
            runner.run(connection.close())


def as_sql(scenario: Scenario) -> str:
    """Return a scenario as a script for psql."""
    lines = [f"CREATE TABLE {table.name} ({table.definition})" for table in scenario.tables]
    lines += [f"SELECT feed.watch('{table.name}', '{table.name}')" for table in scenario.tables]
    lines += scenario.definitions
    for transaction in scenario.transactions:
        inside = transaction.statements
        if transaction.end:
            lines += ["BEGIN" + " -- guarded" * transaction.guarded, *inside, transaction.end]
        else:
            lines += inside
    return ";\n".join(lines) + ";"


DERANDOMIZE = scaled(True, False)


def test_the_log_of_any_nesting_folds_to_the_table(database_url: str) -> None:
    """Whatever triggers, foreign keys and functions write inside a statement, folding the log gives
    the tables, and the rows that match a filter if only changes that concern it are folded.
    """
    check_examples(database_url, EXAMPLES)


NO_REORDER = """
    CREATE OR REPLACE FUNCTION feed.reorder(
        relation regclass, changed text, since bigint, mine bigint
    ) RETURNS void LANGUAGE sql AS ''
"""


def test_without_reorder_a_scenario_breaks(database_url: str) -> None:
    """The property test can fail: it does if `feed.reorder` does nothing."""
    with pytest.raises(Violation):
        check_examples(database_url, EXAMPLES, NO_REORDER, shrink=False)


MOVE_AWAY = """
    CREATE FUNCTION move_away() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE seats SET id = 2 WHERE v = 1 AND pg_trigger_depth() = 1;
        RETURN NULL;
    END $$
"""
SEATS = Scenario(
    [
        Table(
            "seats",
            "id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v int",
            ("id", "v"),
            ("id",),
            True,
        )
    ],
    [
        MOVE_AWAY,
        "CREATE TRIGGER move_away AFTER INSERT ON seats FOR EACH ROW EXECUTE FUNCTION move_away()",
    ],
    [Transaction([f"INSERT INTO seats VALUES (1, {v})"], None, False) for v in (0, 1)],
)


async def test_a_row_that_another_takes_the_place_of(connection: Connection) -> None:
    """Two rows hold one key until a trigger moves the second away: whoever follows only rows like
    the second does not keep it under the key of the first.
    """
    await check(connection, SEATS)
