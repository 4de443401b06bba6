"""Changes of types within ranges and of casts are noticed; `array_nulls` has no say in the log."""

from migrations.sql_files import alter_captures, definition, run_file, run_text

revision = "0009"
down_revision = "0008"

# Tables that are as they were when they were last checked: no client has to load again because the
# shape is written otherwise now.
NOTE_UNCHANGED = "UPDATE feed.topic SET shape = 'unchanged' WHERE shape = feed.shape(relation)"
KEEP_UNCHANGED = "UPDATE feed.topic SET shape = feed.shape(relation) WHERE shape = 'unchanged'"


def upgrade() -> None:
    run_text(NOTE_UNCHANGED)
    run_file("0009_types.sql")
    run_text("REVOKE ALL ON FUNCTION feed.types_within FROM PUBLIC")
    alter_captures("SET array_nulls = on")
    run_text(KEEP_UNCHANGED)


def downgrade() -> None:
    run_text(NOTE_UNCHANGED)
    run_text(definition("0003_capture.sql", "trusts_type"))
    run_text(definition("0008_capture.sql", "shape"))
    run_text(definition("0008_capture.sql", "install_capture"))
    alter_captures("RESET array_nulls")
    run_text("DROP FUNCTION feed.types_within")
    run_text(KEEP_UNCHANGED)
