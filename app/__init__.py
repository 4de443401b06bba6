"""Tablecast: the rows of a Postgres table, live in browsers."""
