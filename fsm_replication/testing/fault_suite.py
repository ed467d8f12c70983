"""Faults of a peer, and what becomes of the nodes that read it.

Theory of operation. Three nodes with real Redis servers: two of them, the readers, read the third
over a :class:`FaultProxy`, and it reads them. While writers keep writing to the third and to one of the
readers, the third is made to fail, the links to it must leave Running, and when it is well again
they must tail once more: with the same engines, which nobody restarts. Then the writers stop, the
nodes come to agree, and the books are checked: every acknowledged write that survived in its own
Redis, or that a reader had read, is at every node or was superseded there.

Where the peer's Redis forgets what it had acknowledged, the readers also read each other and all
nodes compare trees, since one of them may have what the others lack. Otherwise the links to the
peer have to bring every event themselves.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fsm_replication.config import (
    ColdPathConfig,
    CursorConfig,
    HotPathConfig,
    PeerConfig,
    PeerHealthConfig,
    ReconnectConfig,
    ReplicationConfig,
    Settings,
    StartupConfig,
    TimeoutsConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import StoreError
from fsm_replication.journal import Transition
from fsm_replication.servers import RedisServer
from fsm_replication.stores import RedisSyncEngine
from fsm_replication.tables import EngineState, PeerState
from fsm_replication.testing.fault_books import Books, Rounds, Write, Writer
from fsm_replication.testing.fault_proxy import FaultProxy
from fsm_replication.transport import RedisTransport
from fsm_replication.workers.context import LinkProgress

__all__ = ("FAULTS", "Fault", "FaultResult", "Site", "run_fault")

PEER: Final = "a"
READERS: Final = ("b", "c")
# The peer may be unable to take writes, so what another node gets is enough of a load by itself.
RATES_PER_SEC: Final = {PEER: 250.0, "b": 650.0}
WARM_SEC: Final = 0.4
FORGOTTEN_SEC: Final = 0.4
WAIT_SEC: Final = 30.0
POLL_SEC: Final = 0.02
STORE_RESET_SEC: Final = 0.3
# Commands of rounds that both links send in a second in which neither gets on; one that spins sends
# thousands, and what waits for 0.1 to 0.4 s between two attempts about 70.
ROUNDS_MAX: Final = 250
# A script's stream entry gets its id a little later than its item its time.
ID_MARGIN_MS: Final = 50
_DOWN: Final = (PeerState.BACKOFF, PeerState.FAILED)
_LOST: Final = frozenset({"connection_lost", "connect_failed", "give_up"})


class Site:
    """Three nodes; use it as an async context manager, which starts all but the engines."""

    def __init__(self, fault: Fault, seed: int = 0) -> None:
        self.books = Books()
        self.rounds = Rounds(self._got_on)
        self.stores: dict[str, RedisSyncEngine] = {}
        self.engines: dict[str, ReplicationEngine] = {}
        # When everything the peer's Redis held was put on its disk, in seconds of the loop's time.
        self.saved_at: float | None = None
        self._fault = fault
        self._rng = random.Random(seed)  # noqa: S311 - a seed must give the same writes
        self._stack = AsyncExitStack()
        self._servers: dict[str, RedisServer] = {}
        self._writers: list[Writer] = []
        self._writing: list[asyncio.Task[None]] = []

    @property
    def server(self) -> RedisServer:
        """The peer's Redis."""
        return self._servers[PEER]

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _open(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fsm-faults-")))
        for name in (PEER, *READERS):
            keeps = name == PEER and not self._fault.forgets
            server = RedisServer(persist=keeps)
            self._servers[name] = await self._stack.enter_async_context(server)
        self.proxy = await self._stack.enter_async_context(
            FaultProxy(self.server.port, on_request=self.rounds.note)
        )
        for name, server in self._servers.items():
            store = RedisSyncEngine(server.url, node_id=name, timeout_sec=1.0)
            self.stores[name] = await self._stack.enter_async_context(store)
        for name in self._servers:
            engine = ReplicationEngine(self._config(name, folder), self.stores[name])
            # A minute would pass until a node tries its own store again.
            for circuit in (engine.circuit.reads, engine.circuit.writes):
                circuit.reset_sec = STORE_RESET_SEC
            self.engines[name] = engine
            self._stack.push_async_callback(engine.shutdown)
        counting = asyncio.create_task(self.rounds.run(), name="rounds")
        self._stack.push_async_callback(asyncio.wait, (counting,))
        self._stack.callback(counting.cancel)

    def _config(self, name: str, folder: Path) -> ReplicationConfig:
        urls = {peer: server.url for peer, server in self._servers.items() if peer != name}
        if name in READERS:
            # Where nothing is forgotten the link alone must bring everything, so that no loss is
            # made good by a detour.
            urls = {**(urls if self._fault.forgets else {}), PEER: self.proxy.url}
        return ReplicationConfig(
            local_node_id=name,
            peers=[
                PeerConfig(
                    node_id=peer,
                    redis_url=url,
                    circuit_failure_threshold=3,
                    circuit_reset_timeout_sec=0.2,
                )
                for peer, url in urls.items()
            ],
            settings=self._settings(),
            cursor=CursorConfig(sqlite_path=str(folder / f"{name}.db")),
        )

    def _settings(self) -> Settings:
        answer_sec = self._fault.answer_sec
        return Settings(
            hot_path=HotPathConfig(block_timeout=0.2),
            cold_path=ColdPathConfig(
                enabled=self._fault.forgets,
                interval_sec=1.0,
                backoff_base_sec=0.2,
                backoff_max_sec=0.5,
            ),
            peer_health=PeerHealthConfig(ping_interval_sec=0.2, idle_threshold_sec=0.2),
            startup=StartupConfig(when_no_peer="run"),
            reconnect=ReconnectConfig(first=0.1, longest=0.4, rejected=0.4),
            timeouts=TimeoutsConfig(
                connect=answer_sec, command=answer_sec, ping=answer_sec, store_call=1.0
            ),
        )

    # What happens at it.

    async def start_engines(self) -> None:
        """Start every engine, side by side."""
        async with asyncio.TaskGroup() as starting:
            for engine in self.engines.values():
                starting.create_task(engine.start())

    async def all_tail(self, timeout_sec: float) -> None:
        """Wait until every link has tailed.

        :raises TimeoutError: after ``timeout_sec``.
        """
        async with asyncio.timeout(timeout_sec):
            for engine in self.engines.values():
                for peer in engine.peers:
                    await engine.wait_for_state(PeerState.TAILING, peer_id=peer)

    def start_writers(self) -> None:
        """Begin to write."""
        for name, rate_per_sec in RATES_PER_SEC.items():
            rng = random.Random(self._rng.random())  # noqa: S311 - as above
            writer = Writer(name, self.stores[name], self.books, rate_per_sec=rate_per_sec, rng=rng)
            self._writers.append(writer)
            self._writing.append(asyncio.create_task(writer.run(), name=f"writer-{name}"))
        self._stack.push_async_callback(self.stop_writers)

    async def stop_writers(self) -> None:
        """Write no more."""
        for writer in self._writers:
            writer.stop()
        await asyncio.gather(*self._writing)

    async def save(self) -> None:
        """Have the peer's Redis put all it holds on its disk."""
        saved_at = asyncio.get_running_loop().time()
        connection = await RedisTransport().connect(
            self.server.url, timeout_sec=WAIT_SEC, name="fault suite"
        )
        try:
            await connection.call("SAVE", timeout_sec=WAIT_SEC)
        finally:
            connection.close()
            await connection.wait_closed()
        self.saved_at = saved_at

    # What there is to see.

    def states(self) -> dict[str, PeerState]:
        """Return the states of the readers' links to the peer."""
        return {name: self.engines[name].peers[PEER] for name in READERS}

    def moves(self, reader: str, since_ms: int) -> list[Transition]:
        """Return the moves of a reader's link to the peer since a time of day."""
        return [
            record
            for record in self.engines[reader].journal
            if record.machine == f"link:{PEER}" and record.at_ms >= since_ms
        ]

    def read_ms(self) -> int:
        """Return the stream time up to which some reader has read the peer, -1 for none."""
        positions = [self._progress(name).read for name in READERS]
        return max((p.stream_id.ms for p in positions if p is not None), default=-1)

    def read_again(self, reader: str) -> int:
        """Return a count that grows by each event a reader reads from the peer a second time.

        It is only comparable as long as the link did not bootstrap.
        """
        progress = self._progress(reader)
        entries = progress.read.entries_read if progress.read is not None else 0
        return progress.events_read - (entries or 0)

    def is_counted(self) -> bool:
        """Say whether the peer's server counts, so that it can be told what was read twice."""
        positions = [self._progress(name).read for name in READERS]
        return all(p is None or p.entries_read is not None for p in positions)

    def copied(self, since_ms: int) -> int:
        """Return how many items the readers copied, if they did since a time of day."""
        return sum(self._progress(n).copied for n in READERS if self.bootstrapped(n, since_ms))

    def bootstrapped(self, reader: str, since_ms: int) -> bool:
        """Say whether a reader's link bootstrapped since a time of day."""
        return any(m.dest is PeerState.BOOTSTRAPPING for m in self.moves(reader, since_ms))

    def events_read(self) -> int:
        """Return how many events the readers have read from the peer."""
        return sum(self._progress(name).events_read for name in READERS)

    def _got_on(self) -> int:
        """Return how many events and items the readers have got from the peer, by any way."""
        return self.events_read() + sum(self._progress(name).copied for name in READERS)

    def _progress(self, reader: str) -> LinkProgress:
        return self.engines[reader]._links[PEER].context.progress

    def ended(self) -> str:
        """Say which engines have ended, "" for none."""
        gone = {n: e for n, e in self.engines.items() if e.state is not EngineState.RUNNING}
        return "; ".join(f"engine {n} is {e.state}: {e.error}" for n, e in gone.items())

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()


# The faults.

Step = Callable[[Site], Awaitable[None]]


async def _nothing(_site: Site) -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which a peer fails, and how it gets well.

    ``drops``: the links must notice. ``at_start``: it fails before the engines start. ``forgets``:
    its Redis comes back without what it had not saved. ``answer_sec``: how long the readers wait
    for an answer, ``lasts_sec``: how long it goes on once it was noticed, and ``wait_sec``: how long
    anything is waited for at most; in seconds.
    """

    name: str
    begin: Step
    heal: Step
    prepare: Step = _nothing
    drops: bool = True
    at_start: bool = False
    forgets: bool = False
    answer_sec: float = 0.5
    lasts_sec: float = 0.4
    wait_sec: float = WAIT_SEC


async def _kill(site: Site) -> None:
    await asyncio.to_thread(site.server.kill)


async def _start(site: Site) -> None:
    await asyncio.to_thread(site.server.start)


async def _freeze(site: Site) -> None:
    site.server.pause()


async def _thaw(site: Site) -> None:
    site.server.resume()


async def _save_and_write_on(site: Site) -> None:
    await site.save()
    await asyncio.sleep(FORGOTTEN_SEC)


async def _refuse(site: Site) -> None:
    await site.proxy.refuse()


async def _silence(site: Site) -> None:
    site.proxy.silence()


async def _drip(site: Site) -> None:
    site.proxy.drip(pause_sec=0.05)


async def _slow_down(site: Site) -> None:
    site.proxy.delay(to_server_sec=0.5, to_client_sec=0.5)


async def _cut(site: Site) -> None:
    site.proxy.cut(after_bytes=5_000)


async def _mend(site: Site) -> None:
    await site.proxy.heal()


def _answering(error: str, *commands: str) -> Fault:
    async def begin(site: Site) -> None:
        site.proxy.answer(error, commands)

    which = "".join(f"{command} " for command in commands)
    return Fault(f"{which}answers {error.split(' ', 1)[0]}", begin, _mend)


FAULTS: Final = (
    Fault("down at start", _kill, _start, at_start=True),
    Fault("killed (-9)", _kill, _start),
    Fault("frozen (SIGSTOP)", _freeze, _thaw),
    Fault("restarted empty", _kill, _start, forgets=True),
    Fault("restarted older", _kill, _start, prepare=_save_and_write_on, forgets=True),
    Fault("behind a dead port", _refuse, _mend),
    Fault("no answer at all", _silence, _mend),
    Fault("drips, a byte each 50 ms", _drip, _mend),
    Fault("slow by 500 ms each way", _slow_down, _mend, drops=False, answer_sec=2.5, lasts_sec=2.5),
    Fault("cut in mid-reply", _cut, _mend),
    _answering("LOADING Redis is loading the dataset in memory"),
    _answering("BUSY Redis is busy running a script"),
    _answering("READONLY You can't write against a read only replica."),
    _answering("NOAUTH Authentication required."),
    _answering("MOVED 3999 127.0.0.1:6381"),
    _answering("OOM command not allowed when used memory > 'maxmemory'."),
    _answering("LOADING Redis is loading the dataset in memory", "XREAD"),
)


# One run.


@dataclass(frozen=True, slots=True)
class FaultResult:
    """What one fault did. Times are in seconds, None where it did not come.

    ``noticed_sec``: from the fault until the last reader's link had left Running (or, at start, had
    failed to connect). ``tailing_sec``: from the mending until the last one tailed again.
    ``read_again``: events the readers read more than once, None where the peer's server does not
    count what it ever had; ``copied``: items they copied anew.
    ``lost``: writes missing at a node, which must be 0; ``gone``: acknowledged writes that died with
    the peer's Redis before anybody had read them. ``changes_per_sec``: acknowledged while the fault
    lasted. ``rounds``: the most commands of rounds that the readers' links sent to the peer within a
    second in which none of them got on. ``problem``: what else is not as it must be, "" if all is well.
    """

    fault: str
    noticed_sec: float | None
    tailing_sec: float | None
    read_again: int | None
    copied: int
    lost: int
    gone: int
    written: int
    changes_per_sec: float
    rounds: int
    problem: str

    @property
    def well(self) -> bool:
        """Whether everything is as it must be."""
        return not self.problem and not self.lost

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


async def run_fault(fault: Fault, *, longer_sec: float = 0.0, seed: int = 0) -> FaultResult:
    """Let a fault last, ``longer_sec`` more than it says, mend it, and check the books.

    :raises RedisServerNotFoundError: if there is no Redis server to be found.
    """
    async with Site(fault, seed) as site:
        return await _Run(site, fault, fault.lasts_sec + longer_sec).run()


class _Run:
    """One fault at one site."""

    def __init__(self, site: Site, fault: Fault, lasts_sec: float) -> None:
        self._site = site
        self._fault = fault
        self._lasts_sec = lasts_sec
        self._problems: list[str] = []
        # What died with the peer's Redis: written in this time, and not known to any reader.
        self._died: tuple[float, float] = (0.0, 0.0)
        self._read_ms = -1

    async def run(self) -> FaultResult:
        """Run it.

        :raises TimeoutError: if the nodes do not even begin to tail each other.
        """
        site, fault, loop = self._site, self._fault, asyncio.get_running_loop()
        site.start_writers()
        if not fault.at_start:
            await site.start_engines()
            await site.all_tail(fault.wait_sec)
            await asyncio.sleep(WARM_SEC)
        await fault.prepare(site)
        counts = {name: site.read_again(name) for name in READERS}
        read = site.events_read()
        began, began_ms = loop.time(), _now_ms()
        await fault.begin(site)
        if fault.at_start:
            await site.start_engines()
        noticed_sec = await self._notice(began_ms)
        await asyncio.sleep(self._lasts_sec)
        if not fault.drops and site.events_read() == read:
            self._problems.append("nothing was read meanwhile")
        healed, healed_ms = loop.time(), _now_ms()
        self._note_what_died(healed)
        broken = {name: site.read_again(name) for name in READERS}
        await fault.heal(site)
        tailing_sec = await self._tail_again(healed_ms)
        rate = site.books.count(began, healed) / (healed - began)
        await site.stop_writers()
        lost, gone = await self._check_books()
        read_again = None
        if site.is_counted():
            read_again = sum(
                self._read_again(name, counts[name], broken[name], began_ms) for name in READERS
            )
        if ended := site.ended():
            self._problems.append(ended)
        if site.rounds.most > ROUNDS_MAX:
            self._problems.append(f"{site.rounds.most} commands in a second, and nothing got on")
        return FaultResult(
            fault=fault.name,
            noticed_sec=noticed_sec,
            tailing_sec=tailing_sec,
            read_again=read_again,
            copied=site.copied(began_ms),
            lost=lost,
            gone=gone,
            written=len(site.books.writes),
            changes_per_sec=round(rate, 1),
            rounds=site.rounds.most,
            problem="; ".join(self._problems),
        )

    async def _notice(self, began_ms: int) -> float | None:
        if not self._fault.drops:
            return None
        moved: list[int] = []
        for name in READERS:
            engine = self._site.engines[name]
            try:
                await engine.wait_for_state(*_DOWN, peer_id=PEER, timeout=self._fault.wait_sec)
            except TimeoutError:
                self._problems.append(f"{name} did not notice")
                return None
            # Leaving Running is what is noticed, and not that it has ended.
            left = [m.at_ms for m in self._site.moves(name, began_ms) if m.trigger in _LOST]
            moved.append(min(left, default=_now_ms()))
        return (max(moved) - began_ms) / 1000

    async def _tail_again(self, healed_ms: int) -> float | None:
        """Wait until both links tail, and return how long the slower one took."""
        for name in READERS:
            engine = self._site.engines[name]
            try:
                await engine.wait_for_state(
                    PeerState.TAILING, peer_id=PEER, timeout=self._fault.wait_sec
                )
            except TimeoutError:
                self._problems.append(f"{name} does not tail again: it is {engine.peers[PEER]}")
                return None
        tailed = [
            move.at_ms
            for name in READERS
            for move in self._site.moves(name, healed_ms)
            if move.dest is PeerState.TAILING
        ]
        return (max(tailed, default=healed_ms) - healed_ms) / 1000

    def _note_what_died(self, healed: float) -> None:
        if self._fault.forgets:
            self._died = (self._site.saved_at or 0.0, healed)
            self._read_ms = self._site.read_ms() - ID_MARGIN_MS

    def _excused(self, write: Write) -> bool:
        """Say whether a write died with the peer's Redis, unread."""
        began, ended = self._died
        return (
            write.node_id == PEER
            and began <= write.at < ended
            and write.stamp.updated_at >= self._read_ms
        )

    async def _check_books(self) -> tuple[int, int]:
        """Wait until the nodes agree; returns how many writes are lost, and how many died."""
        site, loop = self._site, asyncio.get_running_loop()
        deadline = loop.time() + self._fault.wait_sec
        while True:
            try:
                holdings = await site.books.holdings(site.stores)
            except StoreError as error:
                # A store that has just come back may drop a connection that was idle meanwhile.
                holdings, differ = {}, str(error)
            else:
                differ = _differ(holdings)
            losses = site.books.losses(holdings, self._excused)
            if holdings and not differ and not losses:
                break
            if loop.time() > deadline:
                self._problems.append(differ or f"lost: {losses[0]}")
                break
            await asyncio.sleep(POLL_SEC)
        return len(losses), len(site.books.losses(holdings)) - len(losses)

    def _read_again(self, reader: str, before: int, broken: int, began_ms: int) -> int:
        """Return how many events a reader read again.

        A link that bootstraps counts the stream's entries anew and reads none of them twice.
        """
        if self._fault.at_start:
            return 0
        copied = self._site.bootstrapped(reader, began_ms)
        after = broken if copied else self._site.read_again(reader)
        return after - before


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _differ(holdings: Mapping[str, Mapping[str, Any]]) -> str:
    """Say where nodes hold something different, "" if nowhere."""
    (first, mine), *others = holdings.items()
    for name, theirs in others:
        if mine != theirs:
            key = next(key for key in mine if mine[key] != theirs[key])
            return f"{first} and {name} differ at {key!r}: {mine[key]} and {theirs[key]}"
    return ""
