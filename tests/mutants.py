"""Shows that the suite fails where it should: ``python tests/mutants.py [NAME ...]``.

Each mutant is one plausible defect. It is put into a copy of the project, and the tests that are to
notice it run there. A mutant that survives is a hole in the suite, and so is one whose place in the
code is not found any more. Prints a line for each; ends with 1 if any survived.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
LIMIT_SEC: Final = 600
LIBRARY: Final = "fsm_replication"


class Mutant(NamedTuple):
    """A defect: ``old`` becomes ``new`` in a file; ``tests`` (a pytest selection) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS: Final = (
    Mutant(
        "the cursor is advanced before the batch is in the store",
        "workers/applier.py",
        "        await self.take(prepared, prepared.chunk.end)\n",
        "        self._context.cursors.settle(\n"
        "            self._context.peer_id, Cursor(prepared.chunk.end, self._incarnation)\n"
        "        )\n"
        "        await self.take(prepared, prepared.chunk.end)\n",
        "tests/test_hot_path.py tests/test_faults.py tests/test_withstands.py",
    ),
    Mutant(
        "a reader that goes on from the oldest entry passes over it",
        "workers/history.py",
        "return Position(self.first_id.previous, self.trimmed)",
        "return Position(self.first_id, self.trimmed)",
        "tests/test_hot_path.py tests/test_foreign_nodes.py",
    ),
    Mutant(
        "what was decided before the oldest entry is a gap where nothing counts",
        "workers/history.py",
        "return self.first_id <= at or self.first_id == at.next",
        "return self.first_id <= at",
        "tests/test_rounds.py tests/test_stream_history.py",
    ),
    Mutant(
        "counts are believed whatever the entries say",
        "workers/reader.py",
        "if gap is not None and gap.is_contradiction and not self._abilities.doubt():",
        "if gap is not None and gap.is_contradiction and self._abilities is None:",
        "tests/test_rounds.py tests/test_stream_history.py",
    ),
    Mutant(
        "a hole that a blocking read has jumped over passes for miscounting",
        "workers/reader.py",
        "agreed_at=self._agreed_at)\n",
        "agreed_at=before.stream_id)\n",
        "tests/test_stream_history.py",
    ),
    Mutant(
        "entries behind a gap are thrown away",
        "workers/tailer.py",
        "                return\n            self._queue.take_in(read)\n",
        "                return\n            if read.gap is not None:\n                continue\n"
        "            self._queue.take_in(read)\n",
        "tests/test_rounds.py",
    ),
    Mutant(
        "rounds that come to nothing do not wait",
        "workers/rounds.py",
        "        if doublings < 0:\n",
        "        if doublings < 10**9:\n",
        "tests/test_rounds.py tests/test_stream_history.py",
    ),
    Mutant(
        "the wait before the next connection begins anew with each connection",
        "peer_link.py",
        "return answered > settings.hot_path.block_timeout or lasted > settings.reconnect.longest",
        "return lasted > 0",
        "tests/test_rounds.py",
    ),
    Mutant(
        "what is read at the head is not looked at for gaps while it flows",
        "workers/tailer.py",
        "        return waited or not read.entries\n",
        "        return not read.entries\n",
        "tests/test_stream_history.py",
    ),
    Mutant(
        "a store that lost its positions is not read again",
        "workers/tailer.py",
        "if applied is None and context.store.keeps_positions:",
        "if applied is None and not context.store.keeps_positions:",
        "tests/test_backups.py tests/test_campaign.py -k 'failed_before or before_a_peer'",
    ),
    Mutant(
        "counts of a peer's server are believed after it was started again",
        "workers/peer_history.py",
        "        same_run = run_id == abilities.run_id\n",
        "        same_run = True\n",
        "tests/test_backups.py",
    ),
    Mutant(
        "an agreement is as young as before although the peer came back older",
        "workers/peer_history.py",
        "        if newest == at:\n",
        "        if newest != at:\n",
        "tests/test_backups.py",
    ),
    Mutant(
        "an agreement does not know how far its peer had come",
        "workers/peer_history.py",
        "        return replace(comparison, head=head, run_id=self._lines.abilities.run_id)\n",
        "        return comparison\n",
        "tests/test_backups.py",
    ),
    Mutant(
        "what a peer deleted before it was compared is taken when it is read late",
        "workers/applier.py",
        "stale.suspects(e.key) or was_compared(e))",
        "stale.suspects(e.key))",
        "tests/test_campaign.py",
    ),
    Mutant(
        "ids that run ahead of a clock are believed after a restart",
        "workers/history.py",
        "latest_ms is not None and at.ms > latest_ms:",
        "latest_ms is not None and at.ms < 0:",
        "tests/test_stream_history.py",
    ),
    Mutant(
        "what our own clock makes old is held back for good",
        "workers/applier.py",
        "                self.check_age()\n",
        "                pass\n",
        "tests/test_clocks.py",
    ),
    Mutant(
        "a delete that was heard of late is forgotten with its tombstone",
        "workers/guards.py",
        "            dates = (known.get(key), before, deleted_ms)\n",
        "            dates = (known.get(key), before)\n",
        "tests/test_own_store.py",
    ),
    Mutant(
        "an agreement outlives the store that it was made with",
        "workers/tailer.py",
        '        if {before, owner} - {"", now}:\n',
        "        if owner is None:\n",
        "tests/test_backups.py",
    ),
    Mutant(
        "an excepted key is judged by the date of all others",
        "workers/guards.py",
        "self._is_old(agreement.exceptions.get(key, agreement.at_ms))",
        "self._is_old(agreement.at_ms)",
        "tests/test_backups.py",
    ),
    Mutant(
        "an entry of each read is passed over",
        "workers/chunks.py",
        "        entries = read.entries\n        if not entries:",
        "        entries = [*read.entries[:1], *read.entries[2:]]\n        if not entries:",
        "tests/test_campaign.py -k every_promise",
    ),
    Mutant(
        "gaps are counted after the batch",
        "workers/history.py",
        "    missed = info.trimmed - before.entries_read\n",
        "    missed = info.trimmed - before.entries_read - count\n",
        "tests/test_hot_path.py tests/test_repair.py tests/test_convergence.py",
    ),
    Mutant(
        "tombstones are not in the tree",
        "stores/memory.py",
        "if item is None or (item.deleted and expiry <= self._wall_clock.now_ms()):",
        "if item is None or item.deleted:",
        "tests/test_repair.py tests/test_merkle.py tests/test_stores.py",
    ),
    Mutant(
        "tombstones are not in the tree in Redis",
        "stores/redis_scripts.py",
        "    if not (expiry and expiry <= now) then stamp =",
        "    if not expiry then stamp =",
        "tests/test_repair.py tests/test_merkle.py",
    ),
    Mutant(
        "a key that the peer lacks is deleted",
        "workers/repair.py",
        "        buckets = await comparer.differing_buckets(our_root)\n"
        "        assert comparison.head is not None\n",
        "        everything = await comparer.differing_buckets(both=True)\n"
        "        async for group in comparer.groups(everything, both=True):\n"
        "            gone = Part()\n"
        "            for key, mine, theirs in group.newer_here:\n"
        "                if theirs is None:\n"
        "                    gone.items.append(\n"
        '                        SyncItem(key, b"", "binary", EMPTY_HASH, mine.version + 1,\n'
        "                                 mine.updated_at + 1, True)\n"
        "                    )\n"
        "                    gone.wire.append(None)\n"
        '            await self._applier.hand_over(gone, None, "repair")\n'
        "        buckets = await comparer.differing_buckets(our_root)\n"
        "        assert comparison.head is not None\n",
        "tests/test_repair.py",
    ),
    Mutant(
        "equal content is taken as current",
        "workers/comparer.py",
        "    if ours is None or theirs > ours:\n        return True\n",
        "    if ours is not None and theirs.content_hash == ours.content_hash:\n"
        "        return False\n"
        "    if ours is None or theirs > ours:\n        return True\n",
        "tests/test_convergence.py -k 'equal_content or empty_put'",
    ),
    Mutant(
        "a circuit counts cancellations as failures",
        "circuits.py",
        "        except Exception as error:\n            outcome = CallOutcome.FAILURE\n"
        "            if era == self._era:\n                self._tell(error)\n",
        "        except BaseException as error:\n            outcome = CallOutcome.FAILURE\n"
        "            if era == self._era:\n                self._tell(RuntimeError(str(error)))\n",
        "tests/test_circuits.py",
    ),
    Mutant(
        "a report of an earlier entry is obeyed",
        "driver.py",
        "if not self.machine.is_current(report.ticket) or not triggers:",
        "if not triggers:",
        "tests/test_driver.py",
    ),
    Mutant(
        "a row of the link's table leads elsewhere",
        "tables/link.py",
        "            (_S.DISCONNECTING,),\n            _S.BACKOFF,",
        "            (_S.DISCONNECTING,),\n            _S.CONNECTING,",
        "tests/test_tables.py tests/test_faults.py tests/test_diagram.py",
    ),
    Mutant(
        "a row of the engine's table is missing a source",
        "tables/engine.py",
        '            "abort",\n            (_S.CONNECTING, _S.RUNNING),',
        '            "abort",\n            (_S.CONNECTING,),',
        "tests/test_tables.py tests/test_engine.py",
    ),
    Mutant(
        "a batch is lost when the store fails",
        "workers/chunks.py",
        "        except BaseException:\n            await self.abandon()\n            raise",
        "        except BaseException:\n            await self.abandon()\n"
        "            self._pending.clear()\n            raise",
        "tests/test_hot_path.py tests/test_faults.py tests/test_withstands.py",
    ),
    Mutant(
        "a local write ignores the time of what it replaces",
        "items.py",
        "    return max(now_ms, known.updated_at + 1), min(known.version + 1, NUMBER_MAX)",
        "    return now_ms, min(known.version + 1, NUMBER_MAX)",
        "tests/test_stores.py tests/test_convergence.py",
    ),
    Mutant(
        "a local write in Redis ignores the time of what it replaces",
        "stores/redis_scripts.py",
        "  return math.max(now, at + 1), math.min(version + 1, LIMIT)",
        "  return now, math.min(version + 1, LIMIT)",
        "tests/test_redis_store.py",
    ),
    Mutant(
        "versions begin anew after a delete",
        "stores/redis_scripts.py",
        "  if held == '' then return now, 1 end\n",
        "  if held == '' or byte(held, 17) == 1 then return now, 1 end\n",
        "tests/test_redis_store.py tests/test_stores.py",
    ),
    Mutant(
        "the cursor passes dead letters that are not kept",
        "workers/chunks.py",
        "        if prepared.has_letters:\n            await applier.keep_letters(prepared)\n"
        "        return prepared",
        "        prepared.selection.letters.clear()\n        return prepared",
        "tests/test_hot_path.py tests/test_cli.py",
    ),
    Mutant(
        "the interlock never trips",
        "workers/interlock.py",
        "        return shrunk + self._claimed + more <= self._allowance(shrunk)\n",
        "        return True\n",
        "tests/test_repair.py",
    ),
    Mutant(
        "the interlock reserves nothing before it lets deletes through",
        "workers/interlock.py",
        "        return used + self._claimed + more <= self._reserved\n",
        "        return used >= 0\n",
        "tests/test_interlock.py",
    ),
    Mutant(
        "a killed process gives its block of deletes away",
        "workers/interlock.py",
        "        self._sum.move(-row.reserved, now)\n",
        "",
        "tests/test_interlock.py",
    ),
    Mutant(
        "old items of a peer long not agreed with are taken",
        "workers/guards.py",
        "            ours is None\n            and not theirs.deleted\n",
        "            False\n            and not theirs.deleted\n",
        "tests/test_repair.py",
    ),
    Mutant(
        "contents are not checked against their hashes",
        "stream.py",
        "            if check.digest() != digest:\n",
        "            if not check.digest():\n",
        "tests/test_stalls.py",
    ),
    Mutant(
        "a compressed content may be of any size",
        "stream.py",
        "            if declared > self.payload_bytes:\n",
        "            if False:\n",
        "tests/test_stream.py tests/test_hot_path.py",
    ),
    Mutant(
        "the journal is unbounded",
        "journal.py",
        "deque(maxlen=limit)",
        "deque()",
        "tests/test_journal.py",
    ),
    Mutant(
        "an engine without a peer calls itself ready",
        "engine.py",
        "ready = self.is_running and (connected > 0 or not peers)",
        "ready = self.is_running",
        "tests/test_engine.py tests/test_faults.py",
    ),
    Mutant(
        "a leaf leaves the tree in Redis, but not its digest",
        "stores/redis_scripts.py",
        "        count(bucket, nil, digest_of(key, stamp))\n",
        "",
        "tests/test_merkle.py tests/test_repair.py",
    ),
    Mutant(
        "the peer's position is not kept with the batch",
        "stores/redis_scripts.py",
        "  call('HSET', positions, peer, position)\n",
        "  call('HSET', positions, peer, '0-0 0')\n",
        "tests/test_redis_store.py tests/test_stores.py tests/test_withstands.py",
    ),
    Mutant(
        "of two entries of a key in one batch the older wins",
        "batch.py",
        "        return entry.updated_at < rival.updated_at\n    return _order(entry)",
        "        return entry.updated_at > rival.updated_at\n    return _order(entry)",
        "tests/test_hot_path.py",
    ),
    Mutant(
        "foreign entries keep the stamps they came with",
        "batch.py",
        "    return msgspec.structs.replace(entry, updated_at=at_ms)",
        "    return entry",
        "tests/test_hot_path.py",
    ),
    Mutant(
        "a cycle of the cold path has no budget",
        "workers/repair.py",
        "            self.left = max(0, self.left - fetched)",
        "            self.left = max(1, self.left)",
        "tests/test_repair.py",
    ),
    Mutant(
        "an operator's pause ends with the connection",
        "peer_link.py",
        "        self._lines = None\n        self._tailer = None\n        self.driver.await_end()",
        "        self._lines = None\n        self._tailer = None\n        self._reasons = frozenset()\n"
        "        self.driver.await_end()",
        "tests/test_faults.py tests/test_engine.py tests/test_hot_path.py",
    ),
    Mutant(
        "after a copy the stream is read on from its head of now",
        "workers/copier.py",
        "        cursor = Cursor(row.head, self._incarnation, row.run_id)\n",
        "        info = await ask_info(\n"
        "            self._lines.asking, Keys(context.peer.redis_prefix).stream,\n"
        "            context.settings.timeouts.command,\n"
        "        )\n"
        "        row = row._replace(head=info.head)\n"
        "        cursor = Cursor(row.head, self._incarnation, row.run_id)\n",
        "tests/test_hot_path.py tests/test_repair.py tests/test_convergence.py",
    ),
    Mutant(
        "passwords stand in errors",
        "redaction.py",
        '    return _CREDENTIALS.sub(rf"\\g<scheme>{MASK}@", text)\n',
        "    return text\n",
        "tests/test_config.py tests/test_transport.py",
    ),
    Mutant(
        "a server that quotes its client is believed",
        "transport.py",
        "told = flight.errors[text] = PeerReplyError(self._secrets.scrub(text))",
        "told = flight.errors[text] = PeerReplyError(text)",
        "tests/test_secrets.py",
    ),
    Mutant(
        "a foreign delete is written on absence",
        "workers/foreign_walk.py",
        "            if not _is_leaf_of(child, held.get(child[0])):\n",
        "            if child[0] not in held:\n",
        "tests/test_foreign_nodes.py",
    ),
    Mutant(
        "a key of the dotted tree that was kept out never comes back",
        "stores/dotted_scripts.py",
        "    if call('SISMEMBER', out, path) == 1 then call('ZADD', dirty, 0, path) end\n",
        "",
        "tests/test_dotted.py",
    ),
    Mutant(
        "another store behind a living connection passes for the peer",
        "workers/peer_tree.py",
        "if marker != [self._lines.marker.get(name) for name in names]:",
        "if False:",
        "tests/test_repair.py",
    ),
    Mutant(
        "a late report takes the place of one that counts",
        "driver.py",
        "        if not self.machine.is_current(report.ticket):\n            # It must not",
        "        if False:\n            # It must not",
        "tests/test_driver.py",
    ),
    Mutant(
        "a running engine takes what it cannot change",
        "engine.py",
        "            else:\n                refuse_what_is_fixed(change)\n",
        "",
        "tests/test_reconfigure.py",
    ),
    Mutant(
        "cursors are not flushed at the end",
        "drain.py",
        "                await self._book.flush()\n",
        "                pass\n",
        "tests/test_faults.py tests/test_stops.py tests/test_engine.py",
    ),
    Mutant(
        "what a resolver cannot merge is tried for ever",
        "stores/memory.py",
        "                except MergeError as error:\n",
        "                except ZeroDivisionError as error:\n",
        "tests/test_resolvers.py",
    ),
    Mutant(
        "a dead letter that is still bad is thrown away by a retry",
        "workers/letter_retry.py",
        "stay = bad.keys() | held_back | waiting",
        "stay = held_back",
        "tests/test_dead_letters.py",
    ),
    Mutant(
        "a letter that was too far ahead undoes what was stamped since",
        "workers/letter_retry.py",
        "stamp.updated_at > letter.at_ms",
        "stamp.updated_at > letter.at_ms + 10**9",
        "tests/test_dead_letters.py",
    ),
    Mutant(
        "what is restamped stays in the stream as it was",
        "stores/redis.py",
        "await self._take_back(lane, item)",
        "pass",
        "tests/test_restamp.py",
    ),
    Mutant(
        "a reading of the tree waits for what is written meanwhile",
        "stores/memory.py",
        "            if not due:\n                self._due.popleft()",
        "            due |= self._touched\n            self._touched = set()\n"
        "            if not due:\n                self._due.popleft()",
        "tests/test_merkle.py",
    ),
    Mutant(
        "a batch is applied to a store that has become another",
        "stores/redis_scripts.py",
        "if meant ~= '' and incarnation ~= meant then",
        "if false then",
        "tests/test_redis_store.py",
    ),
    Mutant(
        "what a link holds is written to a store that has become another",
        "workers/tailer.py",
        '            if self._incarnation not in ("", incarnation):\n',
        "            if False:\n",
        "tests/test_backups.py",
    ),
    Mutant(
        "a repair that is asked for trusts what is remembered of the store",
        "workers/cold_path.py",
        "        self._root = None\n        await self._look_at_store()\n",
        "        self._root = None\n",
        "tests/test_backups.py",
    ),
    Mutant(
        "what a failing call of the store applied is told to nobody",
        "workers/applier.py",
        "                self._context.doubts.add([item.key for item in items], until)\n",
        "                pass\n",
        "tests/test_changes.py",
    ),
)


def _copy_to(folder: Path) -> Path:
    copy = folder / "project"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, copy / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return copy


def _selected(copy: Path, tests: str) -> list[str]:
    files, option, pattern = tests.partition(" -k ")
    found = [
        str(path.relative_to(copy)) for glob in files.split() for path in sorted(copy.glob(glob))
    ]
    return [*found, *(["-k", pattern.strip("'")] if option else [])]


def _try(mutant: Mutant, folder: Path) -> str:
    """Return what became of a mutant: "killed", "SURVIVED", or that its place is not there."""
    copy = _copy_to(folder)
    path = copy / LIBRARY / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return f"NOT FOUND ({text.count(mutant.old)} places in {mutant.file})"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    selected = _selected(copy, mutant.tests)
    if not selected or selected[0] == "-k":
        return "NO TESTS are selected"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-m",
        "",
        *selected,
    ]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=LIMIT_SEC, check=False
        )
    except subprocess.TimeoutExpired:
        return "killed (it hung)"
    if ended.returncode == 0:
        return "SURVIVED"
    if b"errors during collection" in ended.stdout or b"TableError" in ended.stderr + ended.stdout:
        return "killed (it is refused when it is imported)"
    if ended.returncode != 1:
        return f"BROKEN: {ended.stdout.decode()[-300:]}{ended.stderr.decode()[-300:]}"
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py::\S+)", ended.stdout.decode(), re.MULTILINE)
    return f"killed by {failed[1]}" if failed else "killed"


def main(names: list[str]) -> int:
    """Try the mutants whose names contain any of ``names``, or all; returns how many got away."""
    chosen = [m for m in MUTANTS if not names or any(name in m.name for name in names)]
    away = 0
    for mutant in chosen:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fsm-mutant-") as folder:
            result = _try(mutant, Path(folder))
        away += not result.startswith("killed")
        took = time.monotonic() - began
        sys.stdout.write(f"{took:6.1f} s  {mutant.name}: {result}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - away} of {len(chosen)} mutants were killed\n")
    return 1 if away else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
