"""Lists, shows, tries again and purges dead letters from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fsm_replication.cli.cursors import opened_cursors
from fsm_replication.cli.repair import cold_only, repairing_engine
from fsm_replication.cli.tables import utc_text
from fsm_replication.config import ReplicationConfig
from fsm_replication.dead_letters import RetryStats
from fsm_replication.errors import AlreadyRunningError, UsageError
from fsm_replication.ports import DeadLetter
from fsm_replication.printable import printable

__all__ = (
    "FIELD_WIDTH",
    "purge_letters",
    "retry_letters",
    "show_letter",
    "show_letters",
)

FIELD_WIDTH: Final = 400
COLUMN_WIDTH: Final = 120


def _as_json(letter: DeadLetter) -> dict[str, Any]:
    plain = asdict(letter)
    if letter.fields is not None:
        plain["fields"] = [part.decode("utf-8", "backslashreplace") for part in letter.fields]
    return plain


# Reading, beside a running node too ---------------------------------------------------------------


async def show_letters(
    config: ReplicationConfig, peer: str | None, limit: int, console: Console, *, as_json: bool
) -> None:
    """Print up to ``limit`` letters, one after the other, however much they hold together.

    :raises CursorStoreError: if the cursor file cannot be read.
    """
    table = Table(
        "id", "peer", "stream id", "at (UTC)", "reason", "key", "times", "bytes", "detail"
    )
    after = 0
    async with opened_cursors(config, read_only=True) as store:
        while limit and (page := await store.dead_letters(peer, after_id=after, limit=limit)):
            after = page[-1].id
            limit -= len(page)
            for letter in page:
                if as_json:
                    sys.stdout.write(json.dumps(_as_json(letter)) + "\n")
                else:
                    table.add_row(*map(Text, _row(letter)))
    if as_json:
        return
    console.print(table if after else "no dead letters")


def _row(letter: DeadLetter) -> Sequence[str]:
    return (
        str(letter.id),
        printable(letter.peer_id, COLUMN_WIDTH),
        printable(letter.stream_id, COLUMN_WIDTH),
        utc_text(letter.at_ms),
        printable(letter.reason, COLUMN_WIDTH),
        printable(letter.key or "", COLUMN_WIDTH),
        f"{letter.count:,}",
        f"{letter.size:,}",
        printable(letter.detail, COLUMN_WIDTH),
    )


async def show_letter(
    config: ReplicationConfig, letter_id: int, console: Console, *, width: int, as_json: bool
) -> None:
    """Print one letter with its raw fields, each cut to ``width`` characters.

    :raises UsageError: if there is none of that id.
    :raises CursorStoreError: if the cursor file cannot be read.
    """
    async with opened_cursors(config, read_only=True) as store:
        found = await store.dead_letters(after_id=letter_id - 1, limit=1)
    if not found or found[0].id != letter_id:
        raise UsageError(f"there is no dead letter {letter_id}")
    letter = found[0]
    if as_json:
        sys.stdout.write(json.dumps(_as_json(letter)) + "\n")
        return
    heads = ("id", "peer", "stream id", "at (UTC)", "reason", "key", "times", "bytes", "detail")
    for head, told in zip(heads, _row(letter), strict=True):
        console.print(Text.assemble((f"{head:10}", "dim"), told), soft_wrap=True)
    if letter.first_stream_id:
        since = printable(letter.first_stream_id, COLUMN_WIDTH)
        console.print(Text.assemble((f"{'since':10}", "dim"), since), soft_wrap=True)
    sender = "a foreign node" if letter.foreign else "a node of ours"
    console.print(Text.assemble((f"{'sent by':10}", "dim"), sender), soft_wrap=True)
    if letter.fields is None:
        console.print("its raw fields were too large to be kept")
        return
    parts = letter.fields
    for place in range(0, len(parts), 2):
        name = printable(parts[place], width)
        value = parts[place + 1] if place + 1 < len(parts) else b""
        line = Text.assemble("  ", (name, "bold"), f" ({len(value):,} bytes) ")
        console.print(line + Text(printable(value, width)), soft_wrap=True)


# Changing, of a stopped node ----------------------------------------------------------------------


async def retry_letters(
    config: ReplicationConfig, peer: str | None, ids: Sequence[int] | None
) -> RetryStats:
    """Try letters of a node that is not running again.

    :raises AlreadyRunningError: if an engine runs on the same cursor file.
    :raises UsageError: if the node's store holds nothing while it is stopped.
    """
    try:
        # Peers that are away do not matter: a letter holds all that is needed.
        async with repairing_engine(cold_only(config), ()) as engine:
            return await engine.dead_letters.retry(peer, ids=ids or None)
    except AlreadyRunningError as error:
        raise _runs(error, "engine.dead_letters.retry()") from None


async def purge_letters(
    config: ReplicationConfig,
    peer: str | None,
    ids: Sequence[int] | None,
    agree: Callable[[str], bool],
) -> int | None:
    """Remove letters of a node that is not running; None if ``agree`` says no to the question.

    :raises AlreadyRunningError: if an engine runs on the same cursor file.
    :raises CursorStoreError: if the cursor file cannot be used.
    """
    try:
        async with opened_cursors(config, read_only=True) as store:
            counts = await store.dead_letter_counts()
        count, whose = sum(counts.values()), "of all peers"
        if ids:
            count, whose = len(set(ids)), "by id"
        elif peer is not None:
            count, whose = counts.get(peer, 0), f"of peer {printable(peer, COLUMN_WIDTH)}"
        # Whether a node runs is known before a person is asked, and once more afterwards; the lock
        # is not held while the person thinks, for the node may have to start.
        async with opened_cursors(config, read_only=False):
            pass
        if not agree(f"Remove {count:,} dead letters {whose} for good?"):
            return None
        async with opened_cursors(config, read_only=False) as store:
            if ids:
                return await store.delete_dead_letters(ids)
            return await store.purge_dead_letters(peer)
    except AlreadyRunningError as error:
        raise _runs(error, "engine.dead_letters.purge()") from None


def _runs(error: AlreadyRunningError, call: str) -> AlreadyRunningError:
    return AlreadyRunningError(
        f"{error}. The running engine keeps its dead letters itself: stop it first, or call {call}"
        " in it; list and show work beside it",
        path=error.path,
    )
