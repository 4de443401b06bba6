"""Postgres: `connections` to it, the `embedded` one, and its `migration`.

`schema` says what a migrated database contains, for alembic and for the tests.
"""
