"""The schema of the cursor database, every version of it, and the way from one to the next."""

from __future__ import annotations

import sqlite3
from typing import Any, Final

__all__ = ("APPLICATION_ID", "SCHEMA_VERSION", "migrate", "one_number", "view_as_newest")

APPLICATION_ID: Final = 0x46534D52  # "FSMR"

# ``peers.synced`` is no longer used: that a peer was met is a matter of the present process.
_SCHEMA_1: Final = (
    """CREATE TABLE peers (
        peer_id TEXT PRIMARY KEY,
        stream_id TEXT,
        entries_read INTEGER,
        incarnation TEXT,
        operator_pause INTEGER NOT NULL DEFAULT 0,
        synced INTEGER NOT NULL DEFAULT 0,
        agreed_at_ms INTEGER
    )""",
    """CREATE TABLE bootstraps (
        peer_id TEXT PRIMARY KEY,
        stream_id TEXT NOT NULL,
        entries_read INTEGER,
        walk TEXT NOT NULL,
        incarnation TEXT NOT NULL,
        reason TEXT NOT NULL
    )""",
    """CREATE TABLE dead_letters (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        peer_id TEXT NOT NULL,
        stream_id TEXT NOT NULL,
        reason TEXT NOT NULL,
        detail TEXT NOT NULL,
        key TEXT,
        fields BLOB,
        size INTEGER NOT NULL,
        at_ms INTEGER NOT NULL,
        UNIQUE (peer_id, stream_id)
    )""",
    "CREATE INDEX dead_letters_by_peer ON dead_letters (peer_id, id)",
    """CREATE TABLE gaps (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        peer_id TEXT NOT NULL,
        found_at_ms INTEGER NOT NULL,
        missed INTEGER,
        reason TEXT NOT NULL,
        healed_at_ms INTEGER,
        healed_by TEXT NOT NULL
    )""",
    "CREATE INDEX gaps_by_peer ON gaps (peer_id, id)",
)
_SCHEMA_2: Final = (
    "ALTER TABLE gaps ADD COLUMN kind TEXT NOT NULL DEFAULT 'gap'",
    "ALTER TABLE dead_letters ADD COLUMN from_foreign INTEGER NOT NULL DEFAULT 0",
    # Nodes of ours name the origin in every entry, and foreign ones in none.
    """UPDATE dead_letters SET from_foreign = 1
    WHERE fields IS NOT NULL AND instr(fields, CAST('"origin"' AS BLOB)) = 0""",
)
_SCHEMA_3: Final = (
    "ALTER TABLE peers ADD COLUMN run_id TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE bootstraps ADD COLUMN run_id TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE peers ADD COLUMN agreed_with TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE peers ADD COLUMN agreed_up_to TEXT NOT NULL DEFAULT '0-0'",
    "ALTER TABLE peers ADD COLUMN agreed_head TEXT",
    "ALTER TABLE peers ADD COLUMN agreed_head_read INTEGER",
    "ALTER TABLE peers ADD COLUMN agreed_run_id TEXT NOT NULL DEFAULT ''",
    # A link agrees with the store that its cursor belongs to.
    "UPDATE peers SET agreed_with = incarnation WHERE incarnation IS NOT NULL",
    """CREATE TABLE exceptions (
        peer_id TEXT NOT NULL,
        key TEXT NOT NULL,
        agreed_at_ms INTEGER,
        PRIMARY KEY (peer_id, key)
    ) WITHOUT ROWID""",
    """CREATE TABLE interlocks (
        peer_id TEXT PRIMARY KEY,
        saved_at_ms INTEGER NOT NULL,
        falls TEXT NOT NULL,
        reserved INTEGER NOT NULL,
        forgiven_ms INTEGER NOT NULL,
        tripped TEXT NOT NULL
    )""",
    "ALTER TABLE dead_letters ADD COLUMN entries INTEGER NOT NULL DEFAULT 1",
    "ALTER TABLE dead_letters ADD COLUMN first_stream_id TEXT NOT NULL DEFAULT ''",
    # What comes after a large field of a row takes long to read: sizes are read from the index.
    "ALTER TABLE dead_letters ADD COLUMN held_bytes INTEGER NOT NULL DEFAULT 0",
    "UPDATE dead_letters SET held_bytes = size WHERE fields IS NOT NULL",
    "ALTER TABLE dead_letters ADD COLUMN same_as BLOB",
    "DROP INDEX dead_letters_by_peer",
    "CREATE INDEX dead_letters_by_peer ON dead_letters (peer_id, id, held_bytes, entries)",
    "CREATE INDEX dead_letters_alike ON dead_letters (peer_id, same_as, reason)",
)
# Each brings the schema of the number before to its own; a new file goes through all of them.
_SCHEMAS: Final = (_SCHEMA_1, _SCHEMA_2, _SCHEMA_3)
SCHEMA_VERSION: Final = len(_SCHEMAS)
# What is only read is not migrated, but looked at as if it were: a view hides a table of its name.
_VIEWS_OF_2: Final = (
    "PRAGMA temp_store = MEMORY",
    """CREATE TEMP VIEW peers AS SELECT *, '' AS run_id, coalesce(incarnation, '') AS agreed_with,
    '0-0' AS agreed_up_to, NULL AS agreed_head, NULL AS agreed_head_read, '' AS agreed_run_id
    FROM main.peers""",
    "CREATE TEMP VIEW bootstraps AS SELECT *, '' AS run_id FROM main.bootstraps",
    "CREATE TEMP VIEW exceptions AS SELECT '' AS peer_id, '' AS key, 0 AS agreed_at_ms WHERE 0",
    """CREATE TEMP VIEW interlocks AS SELECT '' AS peer_id, 0 AS saved_at_ms, '[]' AS falls,
        0 AS reserved, 0 AS forgiven_ms, '' AS tripped WHERE 0""",
)
_LETTERS_OF_2: Final = """1 AS entries, '' AS first_stream_id,
    CASE WHEN fields IS NULL THEN 0 ELSE size END AS held_bytes FROM main.dead_letters"""
_VIEWS_OF_OLDER: Final = {
    1: (
        *_VIEWS_OF_2,
        "CREATE TEMP VIEW gaps AS SELECT *, 'gap' AS kind FROM main.gaps",
        f"CREATE TEMP VIEW dead_letters AS SELECT *, 0 AS from_foreign, {_LETTERS_OF_2}",
    ),
    2: (*_VIEWS_OF_2, f"CREATE TEMP VIEW dead_letters AS SELECT *, {_LETTERS_OF_2}"),
}


def one_number(db: sqlite3.Connection, query: str, *values: Any) -> int:
    """Return the one number that a query asks for."""
    found: int = db.execute(query, values).fetchone()[0]
    return found


def migrate(db: sqlite3.Connection) -> None:
    """Bring a file of any older schema, or an empty one, to the newest."""
    version = one_number(db, "PRAGMA user_version")
    for statements in _SCHEMAS[version:]:
        for statement in statements:
            db.execute(statement)
    if version < SCHEMA_VERSION:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def view_as_newest(db: sqlite3.Connection, version: int) -> None:
    """Show a file of an older schema, that is only read, as if it were of the newest."""
    for statement in _VIEWS_OF_OLDER.get(version, ()):
        db.execute(statement)
