"""What a peer may answer, distorted: ``python -m fsm_replication.testing.reply_fuzzer --minutes 60``.

An engine reads four peers. One is honest; the others are the same real server behind proxies that
take its replies apart and give them back wrong: other types, lengths, nesting, order, numbers, ids,
RESP3, floods, lines that end in the middle. One peer is read by its tree, one by SCAN, one as a
foreign node. What is distorted is one command at a time, for a moment, so that every stage of an
exchange is reached, and all commands have their turn.

Whatever comes, the engine goes on, the honest link tails and brings each change in time, nothing dies
of an error that nobody expected, memory stays bounded and nothing spins; and when the lies end every
link finds its way back. A seed decides what is distorted and how; on what it falls depends on the
machine too, so a finding shows the last distorted replies as they went over the wire.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from fsm_replication.config import (
    ColdPathConfig,
    DeadLettersConfig,
    HotPathConfig,
    LimitsConfig,
    PeerConfig,
    PeerHealthConfig,
    ReconnectConfig,
    ReplicationConfig,
    Settings,
    TimeoutsConfig,
)
from fsm_replication.engine import ReplicationEngine
from fsm_replication.errors import ReplicationError
from fsm_replication.ports import Ports
from fsm_replication.servers import RedisServer
from fsm_replication.stores import MemorySyncEngine, RedisSyncEngine
from fsm_replication.tables import PeerState
from fsm_replication.testing.lying_proxy import (
    Command,
    HangUpError,
    LyingProxy,
    Raw,
    pack_reply,
)
from fsm_replication.testing.memory_cursor import MemoryCursorStore
from fsm_replication.transport import RedisTransport

__all__ = ("Distorter", "Finding", "Fuzzed", "fuzz", "main")

ROUND_SEC: Final = 4.0
"""How long one engine lives before the lies end and its links must come back."""
ARRIVAL_SEC: Final = 2.0
"""How long a change from the honest peer may take; an ordinary one takes milliseconds."""
RECOVERY_ARRIVALS: Final = 10
"""How much longer a link may take to come back when the lies end."""
GROWTH_BYTES: Final = 192 * 1024 * 1024
COMMANDS_PER_SEC: Final = 4000.0
"""Of one peer's links, over a round; more than a copy in a circle of reconnects asks for."""
_PASSWORD: Final = "held-in-common"  # noqa: S105 - of a server that lives as long as a run
_KEYS: Final = 40
_SHOWN_BYTES: Final = 160
_DEEP: Final = 600
_Change = Callable[[random.Random, Any], Any]

_INTEGERS: Final = (-(2**63), -1, 0, 1, 5, 2**31, 2**53, 2**63 - 1)
_STRINGS: Final = (
    b"",
    b"0",
    b"-1",
    b"\xb2",
    "²".encode(),
    b"\xff\xfe",
    b"1-\xff",
    b"0-0",
    b"5-",
    b"18446744073709551615-18446744073709551615",
    b"18446744073709551616-0",
    b"9" * 5000,
    b"nan",
    b"a" * 70_000,
    b"{" * 20_000,
    b'{"a":' * 20_000,
    b"[" * 20_000,
    b"\r\n",
    b"OK",
    b"QUEUED",
)
_WIRE: Final = (
    b",inf\r\n",
    b",nan\r\n",
    b",1.5\r\n",
    b"#t\r\n",
    b"_\r\n",
    b"(3492890328409238509324850943850943825024385\r\n",
    b"=7\r\ntxt:abc\r\n",
    b"!9\r\nERR wrong\r\n",
    b"%1\r\n+a\r\n:1\r\n",
    b"%1\r\n*0\r\n:1\r\n",
    b"~2\r\n:1\r\n:2\r\n",
    b"~1\r\n*0\r\n",
    b">2\r\n+invalidate\r\n*0\r\n",
    b"|1\r\n+ttl\r\n:3600\r\n:1\r\n",
    b"*-1\r\n",
    b"$-1\r\n",
    b"$-2\r\n",
    b":\r\n",
    b":12a\r\n",
    b"$1073741824\r\nabc",
    b"*4294967295\r\n:1\r\n",
    b"*1000000000\r\n:1\r\n",
    b"*1\r\n" * _DEEP + b":1\r\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"-\r\n",
    b"-ERR " + b"long " * 20_000 + b"\r\n",
    b"+" + b"long " * 20_000 + b"\r\n",
    b"*60000\r\n" + b"*0\r\n" * 60_000,
    b"*60000\r\n" + b"-E\r\n" * 60_000,
    b"*2000\r\n" + b"~0\r\n" * 2000,
)
_ERRORS: Final = (
    "ERR wrong",
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "NOPERM this user has no permissions",
    "NOAUTH Authentication required.",
    "LOADING Redis is loading the dataset in memory",
    "ERR unknown command 'X', with args beginning with: ",
    "EXECABORT Transaction discarded because of previous errors.",
    "ERR no such key",
    "",
    "\xe9\x00",
)


# Distorting a reply ---------------------------------------------------------------------------


def _any_value(rng: random.Random, _value: Any) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(_INTEGERS)
    if kind == 1:
        return rng.choice(_STRINGS)
    if kind == 2:
        return ReplicationError(rng.choice(_ERRORS))
    if kind == 3:
        return rng.choice((None, [], [[]], [None], [[], []], [b""], [1, [2, [3]]]))
    return Raw(rng.choice(_WIRE))


def _other_type(rng: random.Random, value: Any) -> Any:
    """Say the same in another type, or nearly."""
    if isinstance(value, int):
        return rng.choice((b"%d" % value, [value], Raw(b",%d\r\n" % value), -value - 1))
    if isinstance(value, bytes):
        line = value.replace(b"\r", b"").replace(b"\n", b"")[:1000]
        return rng.choice(
            ([value], Raw(b"+%b\r\n" % line), Raw(b":%b\r\n" % line), value.hex().encode())
        )
    if isinstance(value, list):
        body = b"".join(map(pack_reply, value))
        as_map = b"%%%d\r\n%b" % (len(value) // 2, body)
        return rng.choice((Raw(as_map), Raw(b"~%d\r\n%b" % (len(value), body)), tuple(value)))
    return _any_value(rng, value)


def _other_text(rng: random.Random, value: Any) -> Any:
    """Change some bytes, or the length."""
    if not isinstance(value, bytes) or not value:
        return _any_value(rng, value)
    at = rng.randrange(len(value))
    return rng.choice(
        (
            value[:at],
            value[at:],
            value[:at] + bytes((rng.randrange(256),)) + value[at + 1 :],
            value[:at] + b"\xff" + value[at:],
            value * 2,
            value[::-1],
            value + b"\x00" * 40_000,
        )
    )


def _other_elements(rng: random.Random, value: Any) -> Any:
    """Leave elements out, double them, swap them, or have far too many."""
    if not isinstance(value, list) or not value:
        return _any_value(rng, value)
    at, other = rng.randrange(len(value)), rng.randrange(len(value))
    swapped = list(value)
    swapped[at], swapped[other] = swapped[other], swapped[at]
    return rng.choice(
        (
            value[:at] + value[at + 1 :],
            value[:at],
            [*value[: at + 1], *value[at:]],
            swapped,
            value[::-1],
            [*value, _any_value(rng, None)],
            value * 2,
            (value * (2000 // len(value) + 1)),
            [value],
            value[0],
        )
    )


def _other_lengths(rng: random.Random, value: Any) -> Any:
    """Declare another length than there is."""
    wire = pack_reply(value)
    head, _, rest = wire.partition(b"\r\n")
    if head[:1] not in b"$*":
        return _any_value(rng, value)
    length = rng.choice((b"0", b"1", b"-1", b"7", b"1000", b"2147483647", b"99999999999999999999"))
    return Raw(b"%b%b\r\n%b" % (head[:1], length, rest))


_CHANGES: Final[tuple[_Change, ...]] = (
    _any_value,
    _any_value,
    _other_type,
    _other_text,
    _other_elements,
    _other_elements,
    _other_lengths,
)


def _distort(rng: random.Random, value: Any) -> Any:
    """Change one part of a reply, as often a deep one as the whole."""
    if isinstance(value, list) and value and rng.random() < 0.75:
        at = rng.randrange(len(value))
        return [*value[:at], _distort(rng, value[at]), *value[at + 1 :]]
    return rng.choice(_CHANGES)(rng, value)


@dataclass
class Distorter:
    """A lie for a :class:`LyingProxy`: what the seed makes of one command's replies.

    ``seen`` and ``counts`` have, over all rounds, how often each command was asked and how many of its
    replies were distorted. ``chosen`` is the command whose replies are distorted, "" for any. ``told``
    has the last of them.
    """

    rng: random.Random
    before: Callable[[Command, Any], Any]
    seen: Counter[bytes]
    counts: Counter[bytes]
    chosen: bytes | None = None
    share: float = 0.5
    told: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def __call__(self, command: Command, reply: Any) -> Any:
        """Return what is answered instead."""
        reply, name, rng = self.before(command, reply), command[0].upper(), self.rng
        self.seen[name] += 1
        if self.chosen is None or (self.chosen and name != self.chosen):
            return reply
        if rng.random() > self.share:
            return reply
        self.counts[name] += 1
        made = self._make(reply)
        wire = pack_reply(made)
        shown = wire[:_SHOWN_BYTES] + (b"..." if len(wire) > _SHOWN_BYTES else b"")
        self.told.append(f"{b' '.join(command)[:80]!r} -> {shown!r}")
        return made

    def _make(self, reply: Any) -> Any:
        rng = self.rng
        kind = rng.random()
        if kind < 0.03:
            raise HangUpError
        if kind < 0.06:
            wire = pack_reply(reply)
            return Raw(wire[: rng.randrange(len(wire))])
        if kind < 0.09:
            return Raw(pack_reply(reply) + pack_reply(_any_value(rng, None)))
        made = _distort(rng, reply)
        while rng.random() < 0.2:
            made = _distort(rng, made)
        return made

    def choose(self) -> None:
        """Distort another command's replies from now on; those that had few have precedence."""
        names = sorted(self.seen, key=lambda name: (self.counts[name], name))
        if not names:
            self.chosen, self.share = b"", 0.5
            return
        if self.rng.random() < 0.15:
            self.chosen, self.share = b"", 0.05
            return
        self.chosen = self.rng.choice(names[: max(1, len(names) // 2)] + names[:3])
        self.share = self.rng.choice((0.1, 0.5, 1.0))


# What is looked for -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise that was broken, with the last distorted replies of each peer."""

    round: int
    what: str
    told: Sequence[str]

    def __str__(self) -> str:
        return f"round {self.round}: {self.what}" + "".join(f"\n  {line}" for line in self.told)


@dataclass(slots=True)
class Fuzzed:
    """What a run came to: distorted replies by command, and what was found."""

    rounds: int = 0
    distorted: Counter[str] = field(default_factory=Counter)
    slowest_arrival_sec: float = 0.0
    grown_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


class _Ear(logging.Handler):
    """Hears of everything that died of an error which nobody had expected."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what an error was logged with."""
        if record.exc_info and record.exc_info[1] is not None:
            self.heard.append(logging.Formatter().format(record))


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect unexpected errors, of the library and of the event loop."""
    ear, loop = _Ear(), asyncio.get_running_loop()
    loggers = [logging.getLogger(name) for name in ("fsm_replication", "asyncio")]
    for logger in loggers:
        logger.addHandler(ear)
    before = loop.get_exception_handler()
    loop.set_exception_handler(
        lambda _loop, told: ear.heard.append(f"{told['message']}: {told.get('exception')!r}")
    )
    try:
        yield ear.heard
    finally:
        loop.set_exception_handler(before)
        for logger in loggers:
            logger.removeHandler(ear)


def _resident_bytes() -> int:
    """Return what this process has in RAM, or 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


# A round ----------------------------------------------------------------------------------------


def _as(node_id: str, layouts: bytes | None = None) -> Callable[[Command, Any], Any]:
    """Return what tells the marker of a node by this name, and with these layouts if given."""

    def told(command: Command, reply: Any) -> Any:
        if not isinstance(reply, list) or command[1:2] != [b"fsm:node"]:
            return reply
        if command[0] == b"HGETALL":
            marker = dict(zip(reply[::2], reply[1::2], strict=True)) | {
                b"node_id": node_id.encode()
            }
            if layouts is not None:
                marker[b"layouts"] = layouts
            return [part for pair in marker.items() for part in pair]
        if command[0] == b"HMGET" and layouts is not None:
            return [
                layouts if name == b"layouts" else part
                for name, part in zip(command[2:], reply, strict=True)
            ]
        return reply

    return told


def _foreign(command: Command, reply: Any) -> Any:
    """Tell of a foreign node: it has no marker nor other keys of ours, and a dotted tree."""
    if command[0] == b"EXISTS" and command[1].startswith(b"fsm:"):
        return 0
    return [] if command[0] == b"HGETALL" and command[1] == b"fsm:node" else reply


# Of each peer, what its distorters have seen and distorted over all rounds.
_Tallies = Mapping[str, tuple[Counter[bytes], Counter[bytes]]]
_PEERS: Final = {"by tree": _as("by tree"), "by scan": _as("by scan", b""), "foreign": _foreign}


def _random(*seeds: object) -> random.Random:
    return random.Random(repr(seeds))  # noqa: S311 - a seed must give the same lies


def _settings() -> Settings:
    return Settings(
        hot_path=HotPathConfig(block_timeout=0.2),
        cold_path=ColdPathConfig(interval_sec=0.2, backoff_base_sec=0.05, backoff_max_sec=0.2),
        peer_health=PeerHealthConfig(ping_interval_sec=0.1, idle_threshold_sec=0.0),
        reconnect=ReconnectConfig(first=0.02, longest=0.1, rejected=0.2),
        timeouts=TimeoutsConfig(connect=1.0, command=0.5, ping=0.5),
        limits=LimitsConfig(batch_bytes=2 * 1024**2, payload_bytes=1024**2),
        dead_letters=DeadLettersConfig(when_full="drop_oldest"),
    )


class _Round:
    """One engine between an honest peer and some that lie."""

    def __init__(
        self, number: int, seed: int, servers: _Servers, arrival_sec: float, tallies: _Tallies
    ) -> None:
        self._number = number
        self._arrival_sec = arrival_sec
        self._servers = servers
        self._distorters = {
            name: Distorter(_random(seed, number, name), before, *tallies[name])
            for name, before in _PEERS.items()
        }
        self._lies_before = self._lies()
        self._rng = _random(seed, number)
        self._store = MemorySyncEngine(node_id="reader")
        self.proxies = {name: LyingProxy(servers.lied_about.port) for name in _PEERS}
        self.findings: list[Finding] = []
        self.slowest_sec = 0.0

    def _found(self, what: str) -> None:
        told = [f"{name}: {line}" for name, one in self._distorters.items() for line in one.told]
        self.findings.append(Finding(self._number, what, told))

    async def run(self, seconds: float) -> None:
        """Let the peers lie for so long, then see that their links come back."""
        with _listening() as heard:
            async with AsyncExitStack() as stack:
                for name, proxy in self.proxies.items():
                    proxy.tell(self._distorters[name])
                    await stack.enter_async_context(proxy)
                await self._run(seconds)
            for what in dict.fromkeys(heard):
                self._found(what)

    def _engine(self) -> ReplicationEngine:
        peers = [PeerConfig(node_id="honest", redis_url=self._servers.honest.url)]
        for name, proxy in self.proxies.items():
            url = f"redis://:{_PASSWORD}@127.0.0.1:{proxy.port}/1"
            # A circuit would keep the link from its next reply for half a minute.
            peers.append(PeerConfig(node_id=name, redis_url=url, circuit_failure_threshold=10**6))
        config = ReplicationConfig(local_node_id="reader", peers=peers, settings=_settings())
        ports = Ports(transport=RedisTransport(), cursor_store=MemoryCursorStore())
        return ReplicationEngine(config, self._store, ports=ports)

    async def _run(self, seconds: float) -> None:
        engine = self._engine()
        # Some commands are asked for while a link connects and copies, and maybe never again.
        self._choose()
        try:
            await engine.start()
            await engine.wait_for_state(
                PeerState.TAILING, peer_id="honest", timeout=10 * self._arrival_sec
            )
            await self._lie(engine, seconds)
            await self._recover(engine)
        except (ReplicationError, TimeoutError) as error:
            self._found(f"{type(error).__name__}: {error}")
        finally:
            with suppress(ReplicationError):
                await engine.shutdown()
        if engine.error is not None:
            self._found(f"the engine ended: {engine.error}")

    async def _lie(self, engine: ReplicationEngine, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        began, seen = loop.time(), self._commands()

        def is_over() -> bool:
            lasted = loop.time() - began
            # On a busy machine it may take a while until a lie is told at all.
            return lasted > seconds and (
                self._lies() > self._lies_before or lasted > self._arrival_sec
            )

        asking = asyncio.create_task(self._ask(engine))
        turn = 0
        try:
            while not is_over() and engine.is_running and not self.findings:
                turn += 1
                await self._write(self._servers.liar, f"k.{turn % _KEYS}")
                await self._arrives(engine, f"honest.{turn % _KEYS}")
                await asyncio.sleep(0.1)
                self._choose()
        finally:
            asking.cancel()
            await asyncio.wait((asking,))
        if not asking.cancelled() and asking.exception() is not None:
            self._found(f"a caller got {asking.exception()!r}")
        lasted = loop.time() - began
        for name, count in self._commands().items():
            if count - seen[name] > COMMANDS_PER_SEC * max(seconds, lasted):
                self._found(f"{name!r} was asked {count - seen[name]} times in {lasted:.1f} s")

    def _choose(self) -> None:
        for distorter in self._distorters.values():
            distorter.choose()

    def _commands(self) -> dict[str, int]:
        return {name: sum(one.seen.values()) for name, one in self._distorters.items()}

    def _lies(self) -> int:
        return sum(one.counts.total() for one in self._distorters.values())

    async def _write(self, store: RedisSyncEngine, key: str) -> bytes:
        content = b"%d" % self._rng.getrandbits(200) * self._rng.choice((1, 1, 20))
        if self._rng.random() < 0.1:
            await store.delete(key)
        await store.put(key, content)
        return content

    async def _arrives(self, engine: ReplicationEngine, key: str) -> None:
        """Write at the honest peer and see it arrive, over a link that tails."""
        loop = asyncio.get_running_loop()
        content, began = await self._write(self._servers.honest_store, key), loop.time()
        while True:
            item, took = (await self._store.get_many([key]))[0], loop.time() - began
            if item is not None and item.content == content:
                break
            if took > self._arrival_sec:
                self._found(f"a change of the honest peer did not arrive within {took:.1f} s")
                return
            await asyncio.sleep(0.005)
        self.slowest_sec = max(self.slowest_sec, took)
        if engine.peers["honest"] is not PeerState.TAILING:
            self._found(f"the link to the honest peer is {engine.peers['honest']}")

    async def _ask(self, engine: ReplicationEngine) -> None:
        """Do what people do meanwhile: nothing but the library's own errors may come of it."""
        names, rng = list(_PEERS), self._rng
        while True:
            name, key = rng.choice(names), f"k.{rng.randrange(_KEYS)}"
            with suppress(ReplicationError, TimeoutError):
                if rng.random() < 0.5:
                    await engine.explain(key)
                elif rng.random() < 0.5:
                    await engine.repair(name)
                elif rng.random() < 0.8:
                    async for _ in engine.differences(name):
                        pass
                else:
                    await engine.dead_letters.retry()
            await asyncio.sleep(0.02)

    async def _recover(self, engine: ReplicationEngine) -> None:
        """Let every peer tell the truth, and wait until its link tails and has what it holds."""
        for name, proxy in self.proxies.items():
            proxy.tell(_PEERS[name])
        if self.findings or not engine.is_running:
            return
        for name in _PEERS:
            try:
                async with asyncio.timeout(RECOVERY_ARRIVALS * self._arrival_sec):
                    await self._tails(engine, name)
            except TimeoutError:
                moves = [move for move in engine.journal if move.machine == f"link:{name}"]
                told = "".join(f"\n    -> {move.dest}: {move.why[:200]}" for move in moves[-12:])
                self._found(f"the link to {name!r} does not come back:{told}")

    @staticmethod
    async def _tails(engine: ReplicationEngine, name: str) -> None:
        """Wait until a link tails now, or has failed since the marker told of another node or format.

        That it tailed once says nothing; and what a marker tells is for a person to mend.
        """
        rests = (PeerState.TAILING, PeerState.FAILED)
        for _ in iter(lambda: engine.peers[name] in rests, True):
            await asyncio.sleep(0.02)


def _by_command(counts: Iterable[Counter[bytes]]) -> Counter[str]:
    """Add what was distorted of several peers."""
    added: Counter[str] = Counter()
    for one in counts:
        added.update({name.decode("ascii", "replace"): number for name, number in one.items()})
    return added


class _Servers:
    """Two real servers, with a node on each; use it as an async context manager."""

    def __init__(self) -> None:
        self.honest, self.lied_about = RedisServer(), RedisServer()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> _Servers:
        stack = self._stack
        for server in (self.honest, self.lied_about):
            stack.enter_context(server)
        self.honest_store = await stack.enter_async_context(
            RedisSyncEngine(self.honest.url, node_id="honest", timeout_sec=60)
        )
        plain = f"redis://127.0.0.1:{self.lied_about.port}"
        connection = await RedisTransport().connect(plain, timeout_sec=5, name="fuzzer")
        await connection.call("CONFIG", "SET", "requirepass", _PASSWORD)
        connection.close()
        await connection.wait_closed()
        self.liar = await stack.enter_async_context(
            RedisSyncEngine(
                f"redis://:{_PASSWORD}@127.0.0.1:{self.lied_about.port}/1",
                node_id="liar",
                layouts=("own", "dotted"),
                timeout_sec=60,
            )
        )
        for number in range(_KEYS):
            await self.liar.put(f"k.{number}", b"%d" % number)
            # A stream that was never empty: its first entries are in no doubt on any server.
            await self.honest_store.put(f"honest.{number}", b"%d" % number)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._stack.aclose()


async def fuzz(
    seconds: float,
    seed: int,
    *,
    round_sec: float = ROUND_SEC,
    arrival_sec: float = ARRIVAL_SEC,
    findings_max: int = 1,
    on_round: Callable[[Fuzzed], None] = lambda _done: None,
) -> Fuzzed:
    """Run rounds for so long, or until so much was found.

    ``arrival_sec`` is how long a change of the honest peer may take: more on a busy machine.

    :raises RedisServerNotFoundError: if this machine has no server.
    """
    done = Fuzzed()
    async with _Servers() as servers:
        resident, began = 0, time.monotonic()
        tallies: _Tallies = {name: (Counter(), Counter()) for name in _PEERS}
        while time.monotonic() - began < seconds and len(done.findings) < findings_max:
            one = _Round(done.rounds, seed, servers, arrival_sec, tallies)
            await one.run(min(round_sec, seconds))
            done.rounds += 1
            done.distorted = _by_command(counts for _, counts in tallies.values())
            done.slowest_arrival_sec = max(done.slowest_arrival_sec, one.slowest_sec)
            done.findings += one.findings
            # What is loaded and cached in the first round is there to stay.
            resident = resident or _resident_bytes()
            done.grown_bytes = max(done.grown_bytes, _resident_bytes() - resident)
            if done.grown_bytes > GROWTH_BYTES:
                what = f"memory has grown by {done.grown_bytes / 2**20:.0f} MiB"
                done.findings.append(Finding(done.rounds, what, ()))
            on_round(done)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; returns 0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m fsm_replication.testing.reply_fuzzer")
    parser.add_argument("--minutes", type=float, default=1.0, help="for how long (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="what is distorted (default 0)")
    parser.add_argument("--findings", type=int, default=1, help="stop after so many (default 1)")
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    told = 0

    def show(done: Fuzzed) -> None:
        nonlocal told
        for finding in done.findings[told:]:
            say(f"FOUND in {finding}")
        told = len(done.findings)

    logging.getLogger("fsm_replication").propagate = False
    done = asyncio.run(
        fuzz(chosen.minutes * 60, chosen.seed, findings_max=chosen.findings, on_round=show)
    )
    commands = ", ".join(f"{name} {count:,}" for name, count in done.distorted.most_common())
    say(f"{done.rounds} rounds, {done.distorted.total():,} distorted replies: {commands}")
    say(
        f"slowest change of the honest peer {done.slowest_arrival_sec:.2f} s, memory grown by"
        f" {done.grown_bytes / 2**20:.0f} MiB"
    )
    say("nothing was found" if not done.findings else f"{len(done.findings)} FINDINGS")
    return 1 if done.findings else 0


if __name__ == "__main__":
    sys.exit(main())
