"""The revisions of the database, run by alembic, and the SQL they are made of."""
