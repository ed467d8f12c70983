"""Whether a position is still in a stream's history, with counts and without."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import hiredis
import pytest
from conftest import Nodes, Peer
from hypothesis import given
from hypothesis import strategies as st

from fsm_replication.abilities import Abilities, Counts, is_too_old, question_of_age
from fsm_replication.config import (
    ColdPathConfig,
    PeerConfig,
    Settings,
    StartupConfig,
    TombstonesConfig,
)
from fsm_replication.current import Current
from fsm_replication.errors import ProtocolError
from fsm_replication.items import SyncItem, content_hash
from fsm_replication.ports import PART_MAX, Position, StreamId
from fsm_replication.stream import encode_fields
from fsm_replication.tables import PeerState
from fsm_replication.testing.local_mesh import (
    GRACE_SEC,
    START_MS,
    TTL_SEC,
    LocalMesh,
    topology,
)
from fsm_replication.testing.lying_proxy import Command, LyingProxy
from fsm_replication.testing.sim_dialects import REDIS_6_2, REDIS_7_0, Dialect
from fsm_replication.testing.sim_streams import Stream as Stream7
from fsm_replication.testing.virtual_time import run
from fsm_replication.workers.context import LinkProgress
from fsm_replication.workers.history import (
    EMPTY_STREAM,
    Gap,
    StreamInfo,
    check_history,
    learn_info,
)
from fsm_replication.workers.reader import Read, StreamReader
from fsm_replication.workers.rounds import FIRST_WAIT_SEC, FREE_ROUNDS, Rounds

parts = st.integers(0, 3) | st.integers(PART_MAX - 2, PART_MAX)


@given(at=st.builds(StreamId, parts, parts))
def test_the_next_and_the_previous_id_are_neighbours(at: StreamId) -> None:
    """If this fails a reader that goes on from the oldest entry misses it, or reads one twice."""
    if at.ms <= PART_MAX - 1 or at.seq < PART_MAX:
        assert at < at.next
        assert at.next.previous == at
    if at > (0, 0):
        assert at.previous < at
        assert at.previous.next == at


def reader(abilities: Abilities, at: int, read: int | None) -> StreamReader:
    """Return a reader of "s" at a position in whole milliseconds."""
    made = StreamReader("s", Current(Settings()), abilities)
    made.position = Position(StreamId(at, 0), read)
    return made


# A stream as a server keeps it ------------------------------------------------------------------


NOTHING = StreamId(0, 0)


@dataclass
class Stream:
    """Entries by id, and what a server tells of them; ``counts`` as since Redis 7.0."""

    counts: bool
    entries: list[StreamId] = field(default_factory=list)
    added: int = 0
    last: StreamId = NOTHING
    deleted: StreamId = NOTHING

    def add(self, step: int) -> None:
        """Append an entry; a step of 0 is the same millisecond."""
        self.last = StreamId(self.last.ms + step, 0) if step else self.last.next
        self.entries.append(self.last)
        self.added += 1

    def trim(self, keep: int) -> None:
        """Remove the oldest entries but ``keep``."""
        del self.entries[: max(0, len(self.entries) - keep)]

    def delete(self, place: int) -> None:
        """Remove one entry, wherever it stands."""
        if self.entries:
            self.deleted = max(self.deleted, self.entries.pop(place % len(self.entries)))

    @property
    def info(self) -> StreamInfo:
        """What XINFO STREAM says."""
        if not self.added:
            return EMPTY_STREAM
        first = self.entries[0] if self.entries else None
        told = StreamInfo(len(self.entries), self.last, first, self.added, self.deleted)
        return told if self.counts else replace(told, added=None, last_deleted=None)

    def after(self, at: StreamId, count: int) -> list[StreamId]:
        """Return the ids that XREAD gives."""
        return [entry for entry in self.entries if entry > at][:count]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 2)),
        st.tuples(st.just("trim"), st.integers(0, 4)),
        st.tuples(st.just("delete"), st.integers(0, 9)),
        st.tuples(st.sampled_from(["bulk", "blocking"]), st.integers(1, 4)),
        st.tuples(st.just("copy"), st.just(0)),
    ),
    max_size=50,
)


@given(counts=st.booleans(), made=steps)
def test_a_reader_misses_nothing_unnoticed(counts: bool, made: list[tuple[str, int]]) -> None:
    """If this fails entries are lost without a word, or a gap is found where there is none."""
    stream, abilities = Stream(counts), Abilities()
    one = reader(abilities, 0, 0)
    learn_info(stream.info, abilities)
    ever: list[StreamId] = []
    lost: set[StreamId] = set()  # What was never read, and nobody has noticed it yet.
    healed: set[StreamId] = set()  # What was gone when the peer was copied.
    was_decided = False
    for what, number in made:
        if what == "add":
            stream.add(number)
            ever.append(stream.last)
        elif what == "trim":
            stream.trim(number)
        elif what == "delete" and counts:
            # Without counts nobody can tell.
            stream.delete(number)
        elif what == "copy":
            one.position, was_decided, lost = stream.info.start, bool(stream.entries), set()
            healed = set(ever) - set(stream.entries)
        if what not in ("bulk", "blocking"):
            continue
        at, ids = one.position.stream_id, stream.after(one.position.stream_id, number)
        one._asked = number
        asked = what == "bulk" or abilities.asks_with_each_read
        info = learn_info(stream.info, abilities) if asked else None
        entries = [[str(entry).encode(), []] for entry in ids]
        read = one._interpret(entries, info, atomic=what == "bulk")
        end = ids[-1] if ids else at
        at_head = len(ids) < number or end == stream.last
        gone = {e for e in ever if e > at} - set(stream.entries) - healed
        lost |= {e for e in gone if at_head or e < end}
        if lost and asked and (at_head or not counts):
            assert read.gap is not None, f"{lost} are lost"
        if read.gap is not None and not lost | gone:
            assert read.gap.is_doubt, "only a server that does not count leaves a doubt"
            assert at not in stream.entries
            assert not was_decided, "what was decided before the oldest entry is no gap"
        if read.gap is not None:
            one.position, was_decided, lost = stream.info.start, bool(stream.entries), set()
            healed = set(ever) - set(stream.entries)
        else:
            one._move_on(read)
            was_decided = was_decided and not ids
        assert abilities.counts in (Counts.UNKNOWN, Counts.KEPT if counts else Counts.NONE)


def test_a_position_that_was_decided_is_no_gap_twice() -> None:
    """If this fails a link on a server that does not count reads from one place for ever."""
    stream, abilities = Stream(counts=False), Abilities(Counts.NONE)
    for _ in range(5):
        stream.add(1)
    stream.trim(3)
    start = stream.info.start
    assert start == Position(StreamId(2, PART_MAX), None)
    assert reader(abilities, 0, 0)._interpret((), stream.info).gap is not None
    one = reader(abilities, 0, 0)
    one.position = start
    assert one._interpret((), stream.info).gap is None
    assert check_history(start, stream.info, entry_is_there=False) is None
    stream.trim(2)
    assert one._interpret((), stream.info).gap is not None
    stream.trim(0)
    head = stream.info.start
    assert head == Position(StreamId(5, 0), None)
    assert check_history(head, stream.info, entry_is_there=False) is None
    stream.add(1)
    doubt = check_history(head, stream.info, entry_is_there=False)
    assert doubt is not None
    assert doubt.is_doubt


def test_ids_ahead_of_the_clock_tell_a_restarted_server_nothing() -> None:
    """If this fails a peer from a backup gives ids again, and passes for what was read before."""
    now = 1000
    info = replace(Stream(counts=True).info, last_id=StreamId(now + 1, 5), added=9)
    for at, doubted in ((StreamId(now + 1, 3), True), (StreamId(now, 3), False)):
        here = partial(check_history, Position(at, 7), info, entry_is_there=True, latest_ms=now)
        assert here(same_run=True) is None
        found = here(same_run=False)
        assert (found is not None and found.ids_tell_nothing) == doubted


# What is believed -------------------------------------------------------------------------------


def told(length: int, added: int | None, first: int, last: int) -> StreamInfo:
    """Return what XINFO says, with ids in whole milliseconds."""
    return StreamInfo(length, StreamId(last, 0), StreamId(first, 0), added, StreamId(0, 0))


def rows(*at: int) -> list[list[object]]:
    """Return entries as XREAD gives them."""
    return [[b"%d-0" % ms, [b"op", b"DEL"]] for ms in at]


def known(abilities: Abilities) -> Counts:
    """Return what is known by now."""
    return abilities.counts


def test_counts_that_contradict_entries_are_believed_once() -> None:
    """If this fails a peer that miscounts is copied with every change, for ever."""
    abilities = Abilities()
    info = learn_info(told(10, 30, 1, 10), abilities)
    assert known(abilities) is Counts.KEPT
    first = reader(abilities, 9, 27)._interpret(rows(10), info)
    assert first.gap is not None
    assert first.gap.is_contradiction
    assert known(abilities) is Counts.DOUBTED
    # It was copied, and the head noted with the count that it told.
    again = reader(abilities, 10, 30)._interpret(rows(11), told(11, 33, 1, 11))
    assert again.gap is None
    assert again.end == Position(StreamId(11, 0), None)
    assert known(abilities) is Counts.NONE
    assert abilities.asks_with_each_read
    assert learn_info(told(11, 33, 1, 11), abilities).added is None
    info = learn_info(told(13, 39, 1, 13), abilities)
    third = reader(abilities, 11, None)._interpret(rows(12, 13), info)
    assert (third.gap, third.end) == (None, Position(StreamId(13, 0), None))


def test_a_hole_that_a_blocking_read_has_jumped_over_is_a_loss() -> None:
    """If this fails a true loss passes for miscounting, and the second one is never told."""
    abilities = Abilities(Counts.KEPT)
    for _ in range(2):
        one = reader(abilities, 1, 1)
        one._asked = 5
        # Entries 2 and 3 were trimmed, and this read did not ask for counts.
        one._move_on(one._interpret(rows(4), None))
        read = one._interpret((), told(1, 4, 4, 4), atomic=True)
        assert read.gap is not None
        assert not read.gap.is_contradiction
        assert abilities.counts is Counts.KEPT


def test_a_stream_that_was_trimmed_is_no_contradiction() -> None:
    """If this fails a stream that is too short passes for one that is not counted."""
    abilities = Abilities(Counts.KEPT)
    for _ in range(3):
        read = reader(abilities, 5, 5)._interpret(rows(9, 10), told(2, 10, 9, 10))
        assert read.gap == Gap(3, "entries were trimmed before they were read", is_trim=True)
        assert read.start == Position(StreamId(8, PART_MAX), 8)
        assert read.end == Position(StreamId(10, 0), 10)
    deleted = replace(told(8, 10, 1, 10), last_deleted=StreamId(7, 0))
    read = reader(abilities, 5, 5)._interpret(rows(8, 9, 10), deleted)
    assert read.gap is not None
    assert (read.gap.missed, read.gap.is_contradiction) == (2, False)
    assert read.end == Position(StreamId(10, 0), 10)
    assert known(abilities) is Counts.KEPT


def test_a_server_is_asked_once_whether_it_counts() -> None:
    """If this fails the first stream of a peer, or one that was deleted, changes how it is read."""
    abilities = Abilities()
    assert learn_info(EMPTY_STREAM, abilities) is EMPTY_STREAM
    assert known(abilities) is Counts.UNKNOWN
    assert Abilities().asks_with_each_read
    learn_info(told(1, 1, 1, 1), abilities)
    assert not abilities.asks_with_each_read
    without = Abilities()
    learn_info(told(1, None, 1, 1), without)
    assert known(without) is Counts.NONE
    learn_info(EMPTY_STREAM, without)
    assert without.asks_with_each_read


@pytest.mark.parametrize("entries", [rows(4, 5), rows(5), rows(5, 6), rows(7, 6)])
def test_entries_that_were_not_asked_for_are_a_protocol_error(entries: list[object]) -> None:
    """If this fails a peer that repeats itself is read for ever, and passes for progress."""
    with pytest.raises(ProtocolError, match="XREAD"):
        reader(Abilities(), 5, 5)._interpret(entries, None)


def test_a_gap_without_entries_goes_on_from_the_oldest() -> None:
    """If this fails reading goes on where nothing ever comes."""
    read = reader(Abilities(Counts.KEPT), 9, 9)._interpret((), told(2, 2, 3, 4))
    assert read.gap is not None
    assert read.start == read.end == Position(StreamId(2, PART_MAX), 0)


def test_a_server_that_is_too_old_is_told_by_its_answer() -> None:
    """If this fails a server that nobody has tried is read, or a good one is refused."""
    assert question_of_age("cdc") == ("XRANGE", "cdc", "(0-1", "0-1")
    assert is_too_old("ERR Invalid stream ID specified as stream command argument")
    assert not is_too_old("NOPERM this user has no permissions to run the 'xrange' command")
    assert not is_too_old("WRONGTYPE Operation against a key holding the wrong kind of value")


async def test_a_peer_that_is_too_old_is_refused_with_a_reason(nodes: Nodes, peer: Peer) -> None:
    """If this fails a link to an old server goes round for ever, and nobody is told why."""

    def old(command: Command, reply: Any) -> Any:
        is_question = tuple(command) == tuple(part.encode() for part in question_of_age("cdc"))
        text = "ERR Invalid stream ID specified as stream command argument"
        return hiredis.ReplyError(text) if is_question else reply

    async with LyingProxy(peer.server.port) as proxy:
        proxy.tell(old)
        link = PeerConfig(node_id="a", redis_url=proxy.url)
        engine = nodes.engine(link, settings=Settings(startup=StartupConfig(when_no_peer="run")))
        await engine.start()
        await engine.wait_for_state(PeerState.FAILED, peer_id="a", timeout=10)
        assert "older than Redis 6.2" in engine.health_check().peers[0].last_error


@pytest.mark.parametrize("dialect", [REDIS_6_2, REDIS_7_0], ids=lambda one: one.name)
def test_a_flow_that_never_rests_is_looked_at_for_gaps(dialect: Dialect) -> None:
    """If this fails entries that were trimmed at the head are missed for as long as others come."""

    async def scenario() -> None:
        mesh = LocalMesh("ab", topology("mesh", "ab"), dialect=lambda _: dialect)
        a, session = mesh.nodes["a"].store, mesh.servers["a"].session()
        a.put("first", b"x")
        await mesh.start("b")
        engine = mesh.nodes["b"].engine
        assert engine is not None
        await engine.wait_for_state(PeerState.TAILING, peer_id="a")
        await asyncio.sleep(1)
        for number in range(30):
            # Of two entries that come together the first is gone before anybody can read it.
            lost, kept = (item_of(f"{kind}.{number}") for kind in ("lost", "kept"))
            session.execute("MULTI")
            for item in (lost, kept):
                session.execute("XADD", a.keys.stream, "*", *encode_fields(item))
            session.execute("XTRIM", a.keys.stream, "MAXLEN", 1)
            session.execute("EXEC")
            await asyncio.sleep(1)
        assert await engine.ledger("a"), "the flow goes on, and nobody has noticed"
        await mesh.close()

    run(scenario, start_ms=START_MS)


def test_a_peer_that_was_upgraded_is_not_believed_about_the_time_before() -> None:
    """If this fails what was trimmed before a server began to count is lost without a word."""

    async def scenario() -> None:
        dialects = {"a": REDIS_6_2, "b": REDIS_7_0}
        settings = Settings(
            cold_path=ColdPathConfig(enabled=False),
            tombstones=TombstonesConfig(ttl=TTL_SEC, grace=GRACE_SEC),
            startup=StartupConfig(when_no_peer="run"),
        )
        mesh = LocalMesh(
            "ab", topology("mesh", "ab"), dialect=lambda name: dialects[name], settings=settings
        )
        a, server = mesh.nodes["a"].store, mesh.servers["a"]
        await mesh.start("b")
        engine = mesh.nodes["b"].engine
        assert engine is not None
        await engine.wait_for_state(PeerState.TAILING, peer_id="a")
        await asyncio.sleep(10)
        await mesh.stop("b")
        for number in range(20):
            a.put(f"k{number}", b"x")
        server.execute("XTRIM", a.keys.stream, "MAXLEN", 3)
        # Redis 7.0 takes the length for the count where a file of 6.2 tells none.
        stream = server.db.get(a.keys.stream.encode(), Stream7)
        assert stream is not None
        stream.added = len(stream.entries)
        server.dialect = server.db.dialect = REDIS_7_0
        server.db.runs += 1
        await mesh.start("b")
        await mesh.settle()
        assert len(mesh.nodes["b"].store.items()) == 20
        await mesh.close()

    run(scenario, start_ms=START_MS)


def item_of(key: str) -> SyncItem:
    """Return an item that only a stream has."""
    return SyncItem(key, b"x", "binary", content_hash(b"x"), 1, START_MS, False, "a")


# Rounds -----------------------------------------------------------------------------------------


class Hand:
    """A clock that is set by hand."""

    now = 100.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


def test_rounds_that_come_to_nothing_wait_longer_each_time() -> None:
    """If this fails a peer that contradicts itself, or a defect of ours, makes a link spin (G12)."""
    clock, progress = Hand(), LinkProgress()
    rounds = Rounds(clock, progress)  # type: ignore[arg-type]

    def vain(count: int) -> list[float]:
        return [rounds.begin(5.0) for _ in range(count)]

    assert vain(FREE_ROUNDS) == [0.0] * FREE_ROUNDS
    waits = []
    for _ in range(12):
        waits.append(rounds.begin(5.0))
        clock.now += waits[-1] + 0.001
    assert waits[0] == FIRST_WAIT_SEC
    assert all(b >= 1.8 * a for a, b in pairwise(waits) if b < 0.9)
    assert waits[-1] == pytest.approx(1.0, abs=0.01)
    assert max(vain(20)) <= 1.0, "a wait that was cut short makes the next no longer"
    rounds.forgive()
    progress.settled_to(Position(StreamId(3, 0), 3), 3)
    assert vain(FREE_ROUNDS + 1) == [0.0] * (FREE_ROUNDS + 1)
    assert rounds.begin(5.0) > 0
    clock.now += 1.1
    assert vain(2) == [0.0, 0.0], "a round that takes a second is no spin"
    assert vain(FREE_ROUNDS)[-1] > 0
    assert rounds.begin(0.1) > 0
    clock.now += 0.1
    assert rounds.begin(0.1) == 0.0, "nor one that waits as long as a blocking read"


def test_what_is_settled_again_is_no_progress() -> None:
    """If this fails a peer whose stream jumps back is read over and over without a rest."""
    progress = LinkProgress()
    progress.settled_to(Position(StreamId(9, 0), 9), 9)
    progress.settled_to(Position(StreamId(5, 0), 5), 5)
    assert progress.advances == 9
    assert progress.settled == Position(StreamId(5, 0), 5)
    progress.go_on_from(Position(StreamId(1, 0), 1))
    progress.settled_to(Position(StreamId(5, 0), 5), 4)
    assert progress.advances == 13


def test_reads_are_taken_with_or_without_counts() -> None:
    """If this fails a blocking read on a server that does not count misses what was trimmed."""
    sent: list[tuple[object, ...]] = []

    class Line:
        received_bytes = 0

        def limit_reply(self, _limit: int) -> None:
            """Note no limit."""

        def send(self, *commands: object) -> None:
            """Note what is sent."""
            sent.append(commands)

    line = Line()
    unknown = reader(Abilities(), 5, 5)
    unknown.ask_blocking(line)  # type: ignore[arg-type]
    assert [command[0] for command in sent[-1]] == ["XREAD", "XINFO"]  # type: ignore[index]
    info = [
        *(b"length", 2, b"last-generated-id", b"9-0"),
        *(b"first-entry", rows(8)[0], b"last-entry", rows(9)[0]),
    ]
    read: Read = unknown.take(line, [[[b"s", rows(8, 9)]], info])  # type: ignore[arg-type]
    assert read.gap is not None
    assert read.gap.is_doubt
    assert (read.start, read.end) == (
        Position(StreamId(7, PART_MAX), None),
        Position(StreamId(9, 0), None),
    )
    counted = reader(Abilities(Counts.KEPT), 5, 5)
    counted.ask_blocking(line)  # type: ignore[arg-type]
    assert len(sent[-1]) == 1
    read = counted.take(line, [[[b"s", rows(8, 9)]]])  # type: ignore[arg-type]
    assert (read.gap, read.end) == (None, Position(StreamId(9, 0), 7))
