"""A small language of filters, rendered both as clients write them and as SQL. Shares no code with
the product.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote

SQL = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
SPECIAL = set(',()"\\: {}')
DEEPEST = 2
NEGATED = 0.2
QUOTED = 0.3  # of the values that need no quotes


@dataclass(frozen=True)
class Comparison:
    """A column compared with values: one, unless the operator is `in`."""

    column: str
    operator: str
    values: tuple[str, ...]
    negated: bool = False
    quoted: bool = False

    def parameter(self) -> str:
        """Return it as a parameter of a query string."""
        value = self._value()
        if self.operator != "in":
            value = self.values[0]  # taken literally up to its end
        return f"{quote(self.column, safe='')}={self._not}{self.operator}.{quote(value, safe='')}"

    def nested(self) -> str:
        """Return it as it is written within parentheses."""
        return f"{self.column}.{self._not}{self.operator}.{self._value()}"

    def sql(self, alias: str) -> str:
        """Return it as an expression over a row."""
        column = f'{alias}."{self.column}"'
        if self.operator == "is":
            test = f"{column} IS {self.values[0].replace('_', ' ').upper()}"
        elif self.operator == "in":
            test = f"{column} IN ({', '.join(map(literal, self.values))})"
        else:
            test = f"{column} {SQL[self.operator]} {literal(self.values[0])}"
        return f"NOT ({test})" if self.negated else f"({test})"

    @property
    def _not(self) -> str:
        return "not." if self.negated else ""

    def _value(self) -> str:
        if self.operator == "is":
            return self.values[0]
        values = [self._written(value) for value in self.values]
        return f"({','.join(values)})" if self.operator == "in" else values[0]

    def _written(self, value: str) -> str:
        if not (self.quoted or not value or SPECIAL & set(value)):
            return value
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True)
class Junction:
    """Filters joined by `and` or `or`."""

    connective: str
    parts: "tuple[Filter, ...]"
    negated: bool = False

    def parameter(self) -> str:
        """Return it as a parameter of a query string."""
        name, _, parts = self.nested().partition("(")
        return f"{name}={quote(f'({parts}', safe='')}"

    def nested(self) -> str:
        """Return it as it is written within parentheses."""
        parts = ",".join(part.nested() for part in self.parts)
        return f"{'not.' if self.negated else ''}{self.connective}({parts})"

    def sql(self, alias: str) -> str:
        """Return it as an expression over a row."""
        whole = f" {self.connective.upper()} ".join(part.sql(alias) for part in self.parts)
        return f"NOT ({whole})" if self.negated else f"({whole})"


Filter: TypeAlias = Comparison | Junction
Conjunction: TypeAlias = tuple[Filter, ...]
"""What a `where` says: all of these. None: everything."""


def literal(value: str) -> str:
    """Return an SQL literal, which Postgres reads as what it is compared with."""
    return "'" + value.replace("'", "''") + "'"


def where(conjunction: Conjunction) -> str:
    """Return a filter as clients write it."""
    return "&".join(part.parameter() for part in conjunction)


def condition(conjunction: Conjunction, alias: str) -> str:
    """Return a filter as SQL."""
    return " AND ".join(part.sql(alias) for part in conjunction) or "true"


@dataclass(frozen=True)
class Column:
    """What a column can be compared with: values by which rows come and go."""

    name: str
    operators: Sequence[str]
    value: Callable[[random.Random], str]


EQUALITY = ("eq", "neq", "in", "is")
ORDER = (*EQUALITY, "lt", "lte", "gt", "gte")


def random_filter(chance: random.Random, columns: Sequence[Column]) -> Conjunction:
    """Return a filter of no part, one, or a few."""
    count = chance.choices([0, 1, 2, 3], [1, 5, 3, 1])[0]
    return tuple(random_part(chance, columns, 0) for _ in range(count))


def random_part(chance: random.Random, columns: Sequence[Column], depth: int) -> Filter:
    """Return a comparison, or a junction of parts."""
    negated = chance.random() < NEGATED
    if depth < DEEPEST and chance.random() < 0.3:
        parts = tuple(random_part(chance, columns, depth + 1) for _ in range(chance.randint(1, 3)))
        return Junction(chance.choice(["and", "or", "or"]), parts, negated)
    column = chance.choice(columns)
    operator = chance.choice(column.operators)
    if operator == "is":
        boolean = column.operators == BOOLEAN
        values = ["null", "not_null", *(["true", "false", "unknown"] if boolean else [])]
        return Comparison(column.name, operator, (chance.choice(values),), negated)
    count = chance.randint(1, 4) if operator == "in" else 1
    values = [column.value(chance) for _ in range(count)]
    return Comparison(column.name, operator, tuple(values), negated, chance.random() < QUOTED)


# Booleans have no order; and only they are true, false or unknown.
BOOLEAN = ("eq", "neq", "in", "is", "is")


def one_of(*values: str) -> Callable[[random.Random], str]:
    """Return a function that chooses one of these."""
    return lambda chance: chance.choice(values)


def number(first: int, last: int) -> Callable[[random.Random], str]:
    """Return a function that chooses a number."""
    return lambda chance: str(chance.randint(first, last))
