"""The cursor store: how far each peer was read, and what could not be applied, in one SQLite file.

Theory of operation. Every call is one *unit*: a function that runs whole on the thread of the
connection, from BEGIN to COMMIT or ROLLBACK. A caller that is cancelled or out of time only stops
waiting; it cannot cut a transaction in two, so what it asked for is either there or not.

On disk: WAL with ``synchronous=FULL``. The cursor and the dead letters that it passes are one
transaction, so either both survive or neither, and a cursor is never ahead. NORMAL would keep that
too, and would lose nothing to kill -9; but it brings the log to the disk only at a checkpoint,
every 1,000 pages, which at one flush in five seconds is over an hour: a loss of power could then
set the cursor back further than the peer's stream remembers. FULL costs one fsync for each
transaction, off the event loop, and transactions are few: a flush, a batch with dead letters.

One engine at a time: an advisory lock on ``<file>.lock`` is held while the store is open.

What is where: ``lock`` the lock, ``file`` the file and its thread, ``schema`` the tables and their
versions, ``rows`` what stands in them, ``store`` the calls.
"""

from fsm_replication.cursor.store import SqliteCursorStore

__all__ = ("SqliteCursorStore",)
