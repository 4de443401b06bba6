"""What a migrated database contains; a test compares the two.

Tables are SQLAlchemy metadata. For each function, this names the SQL file that holds its text.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, REGCLASS
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.types import UserDefinedType


class Xid8(UserDefinedType[int]):
    """Postgres's 64-bit transaction id."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "xid8"


class PgSnapshot(UserDefinedType[str]):
    """Which transactions had ended at a given moment."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "pg_snapshot"


# So that reflection knows these types as well.
ischema_names["xid8"] = Xid8
ischema_names["pg_snapshot"] = PgSnapshot

metadata = MetaData()

things = Table(
    "things",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("info", Text, nullable=False, server_default=""),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    CheckConstraint("char_length(name) BETWEEN 1 AND 200", name="things_name_check"),
)

change = Table(
    "change",
    metadata,
    Column("xid", Xid8, primary_key=True, server_default=text("pg_current_xact_id()")),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
    Column("topic", Text, nullable=False),
    Column("op", Text, nullable=False),
    Column("new", JSON),
    Column("old", JSON),
    Column(
        "async",
        Boolean,
        server_default=text("CASE current_setting('synchronous_commit') WHEN 'off' THEN true END"),
    ),
    schema="feed",
    postgresql_with={
        "autovacuum_vacuum_scale_factor": 0.02,
        "autovacuum_vacuum_threshold": 5000,
        "autovacuum_vacuum_insert_scale_factor": 0.1,
        "autovacuum_analyze_scale_factor": 0.1,
    },
)

state = Table(
    "state",
    metadata,
    Column("singleton", Boolean, primary_key=True, server_default=text("true")),
    Column("history", Uuid, nullable=False, server_default=text("gen_random_uuid()")),
    Column("redrawn", Xid8, nullable=False, server_default=text("pg_current_xact_id()")),
    Column("secret", Uuid, nullable=False, server_default=text("gen_random_uuid()")),
    Column(
        "horizon",
        Xid8,
        nullable=False,
        server_default=text("pg_snapshot_xmin(pg_current_snapshot())"),
    ),
    Column("birthplace", Text, nullable=False, server_default=text("feed.place()")),
    CheckConstraint("singleton", name="state_singleton_check"),
    schema="feed",
)

topic = Table(
    "topic",
    metadata,
    Column("relation", REGCLASS, primary_key=True),
    Column("topic", Text, nullable=False),
    Column("shape", Text, nullable=False),
    Column("key", ARRAY(Text)),
    Column("destroy_with", Text),
    Column("ambiguous", Boolean, nullable=False, server_default=text("false")),
    Column("problem", Text),
    UniqueConstraint("topic", name="topic_topic_key"),
    schema="feed",
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column(
        "until",
        Xid8,
        primary_key=True,
        server_default=text("pg_snapshot_xmax(pg_current_snapshot())"),
    ),
    Column(
        "id",
        BigInteger,
        primary_key=True,
        autoincrement=False,
        server_default=text("currval('feed.change_id_seq')"),
    ),
    Column("snapshot", PgSnapshot, nullable=False, server_default=text("feed.seen_by_others()")),
    schema="feed",
)

# The functions in the schema `feed`, by the file in migrations/sql that holds their newest text.
# The capture functions of watched tables are not among them; feed.watch makes those.
FUNCTIONS = {
    "log.sql": ("disown", "offset", "rewrite_history"),
    "0003_log.sql": (
        "place",
        "seen_by_others",
        "xid_after",
        "xid_before",
        "epoch",
        "position_of",
        "continues",
        "adopt",
    ),
    "0003_capture.sql": (
        "must_ring",
        "ring",
        "begin_statement",
        "rekey",
        "trusts",
        "needs_spelling",
        "rows_of",
        "key_of",
        "key_is_deferrable",
        "large_json",
        "json_expression",
        "capture_statement",
        "capture_body",
    ),
    "0003_order.sql": (
        "may_read",
        "present_rows",
        "is_in_order",
        "settle",
    ),
    "0003_topics.sql": ("drop_unused_captures",),
    "0004_topics.sql": (
        "position",
        "log_reload",
        "identifies",
        "problem_of",
        "forget_dropped",
        "grantable",
        "require_owner",
        "require_watchable",
        "remove_capture",
        "watch",
        "unwatch",
        "check_topics",
        "excerpt",
    ),
    "0006_prune.sql": ("prune",),
    "0007_outline.sql": ("outline",),
    "0008_capture.sql": ("chain", "reorder"),
    "0009_types.sql": ("types_within", "trusts_type", "shape", "install_capture"),
}

# Watching a table puts the capture triggers on it.
TRIGGERS = """
    CREATE TRIGGER rewrite_history AFTER DELETE OR UPDATE OR TRUNCATE ON feed.change
    FOR EACH STATEMENT WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION feed.rewrite_history();
    SELECT feed.watch('things', 'thing', 'name')
"""

# What is not in the texts of the functions themselves.
RIGHTS = """
    REVOKE ALL ON ALL FUNCTIONS IN SCHEMA feed FROM PUBLIC;
    ALTER FUNCTION feed.check_topics() SECURITY DEFINER;
    ALTER FUNCTION feed.rows_of(regclass, text) SECURITY DEFINER
"""
