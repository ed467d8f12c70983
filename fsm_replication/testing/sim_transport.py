"""A network in process between the engine's connections and simulated servers.

Theory of operation. A connection is the real :class:`RedisConnection`, so what it promises about
order, limits, skimming and closing is not written a second time; only the socket below it is
simulated. A :class:`_Wire` reads the commands from the bytes, takes them to the server after half
of the delay, and brings the bytes of the replies back after the other half.

When a line is closed or cut, commands on their way have or have not run: a number of the oldest,
chosen by the given source of chance, still reach the server.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import hiredis

from fsm_replication.errors import ConnectionLostError, PeerRefusedError, PeerReplyError
from fsm_replication.ports import Clock
from fsm_replication.testing.sim_redis import SimRedis
from fsm_replication.testing.sim_streams import Wait
from fsm_replication.testing.sim_values import Status
from fsm_replication.testing.spin_watch import Given, SpinWatch
from fsm_replication.transport import Command, RedisConnection, RedisTransport

__all__ = ("SimConnection", "SimTransport")

CHUNK_BYTES: Final = 64 * 1024
# How often a garbled array is one of which only an element is garbled.
_DEEPER: Final = 0.7
FLOOD_TIMES: Final = 40
DRIPS_PER_SEC: Final = 4


class SimConnection(RedisConnection):
    """A connection that counts: ``flights`` sent, and the ``commands`` in them."""

    def __init__(self, where: str, clock: Clock, transport: SimTransport) -> None:
        super().__init__(where, clock)
        self.flights = 0
        self.commands = 0
        self._counters = transport

    def _count(self, commands: int) -> None:
        self.flights += 1
        self.commands += commands
        self._counters.flights += 1
        self._counters.commands += commands

    def send(self, *commands: Command) -> asyncio.Future[list[Any]]:
        """Send now; the future gives the replies, error replies as exception objects."""
        if not self.closed:
            self._count(len(commands))
        return super().send(*commands)

    async def skim(self, *args: bytes | str | int, timeout_sec: float) -> Any:
        """Send one command and keep no long string of its reply."""
        if not self.closed:
            self._count(1)
        return await super().skim(*args, timeout_sec=timeout_sec)


class _Batch:
    """Commands that were written together, and the bytes of their replies."""

    __slots__ = ("commands", "delay", "replies")

    def __init__(self, commands: Sequence[list[bytes]], delay: float) -> None:
        self.commands = deque(commands)
        self.delay = delay
        self.replies = bytearray()


class _Lane:
    """One direction of a line: what is put in comes out after its delay, in order."""

    def __init__(self, arrive: Callable[[Any], None]) -> None:
        self.moving: deque[Any] = deque()
        self._arrive = arrive
        self._loop = asyncio.get_running_loop()
        self._last_at = 0.0

    def put(self, thing: Any, delay: float) -> None:
        """Let a thing arrive after ``delay`` seconds, and after all that was put in before."""
        self.moving.append(thing)
        now = self._loop.time()
        at = self._last_at = max(self._last_at, now + delay)
        if at <= now:
            self._loop.call_soon(self._next)
        else:
            self._loop.call_at(at, self._next)

    def _next(self) -> None:
        if self.moving:
            self._arrive(self.moving.popleft())


class _Wire(asyncio.Transport):
    """Both ends of one line, below a connection."""

    def __init__(self, transport: SimTransport, host: str, name: str) -> None:
        super().__init__()
        self.host = host
        self._name = name
        self._network = transport
        self._server = transport.servers[host]
        self._session = self._server.session()
        self._protocol: asyncio.Protocol | None = None
        self._parser = hiredis.Reader()
        self._going = _Lane(self._reach_server)
        self._coming = _Lane(self._reach_client)
        self._inbox: deque[_Batch] = deque()
        self._held_back: deque[bytes] = deque()
        self._dripping = bytearray()
        self._wait: Wait | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._still_to_run: int | None = None
        # Of a transaction whose replies come with EXEC.
        self._queued: list[list[bytes]] = []
        self._given: Given = set()

    # The client's end

    def carry(self, protocol: asyncio.Protocol) -> None:
        """Begin to serve a connection."""
        self._protocol = protocol
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take the bytes of whole commands."""
        if self._protocol is None:
            return
        self._parser.feed(bytes(data))
        commands: list[list[bytes]] = []
        while (parsed := self._parser.gets()) is not False:
            commands.append(parsed)
        if not self._network.may_send(self.host, commands):
            return
        delay = self._network.delay(self._name, self.host)
        self._going.put(_Batch(commands, delay), delay / 2)

    def is_closing(self) -> bool:
        """Whether the client is gone."""
        return self._protocol is None

    def pause_reading(self) -> None:
        """Do nothing: what comes meanwhile is a simulated server's, and bounded."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close at once."""
        self.abort()

    def abort(self) -> None:
        """Close at once; the connection hears of it a little later."""
        if self._protocol is not None:
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)
            self._abandon()

    def cut(self) -> None:
        """Lose the line: the connection hears of it now."""
        protocol = self._protocol
        if protocol is not None:
            self._abandon()
            protocol.connection_lost(ConnectionResetError("the line was cut"))

    def _reach_client(self, data: bytes) -> None:
        if self.host in self._network.hung:
            self._held_back.append(data)
            return
        if self._dripping:
            self._dripping += data
        elif self.host in self._network.dripping:
            self._dripping += data
            self._drip()
        else:
            self._hand_on(data)

    def _drip(self) -> None:
        """Hand on the next few bytes, or all of them once the line is well again."""
        rate = self._network.dripping.get(self.host)
        most = len(self._dripping) if rate is None else max(1, rate // DRIPS_PER_SEC)
        data = bytes(self._dripping[:most])
        del self._dripping[:most]
        self._hand_on(data)
        if self._protocol is None:
            self._dripping.clear()
        elif self._dripping:
            asyncio.get_running_loop().call_later(1 / DRIPS_PER_SEC, self._drip)

    def _hand_on(self, data: bytes) -> None:
        for begin in range(0, len(data), CHUNK_BYTES):
            if self._protocol is not None:
                self._protocol.data_received(data[begin : begin + CHUNK_BYTES])

    # The server's end

    def _reach_server(self, batch: _Batch) -> None:
        self._inbox.append(batch)
        self._work()

    def _work(self) -> None:
        while self._inbox and self._wait is None and self.host not in self._network.hung:
            batch = self._inbox[0]
            while batch.commands and self._wait is None:
                if self._still_to_run is not None:
                    if not self._still_to_run:
                        self._stop()
                        return
                    self._still_to_run -= 1
                self._run(batch, batch.commands.popleft())
            if self._wait is None:
                self._inbox.popleft()
            if batch.replies:
                self._coming.put(bytes(batch.replies), batch.delay / 2)
                batch.replies.clear()
        self._network.note(self, over=self._protocol is None and not self._has_commands())

    def _run(self, batch: _Batch, command: list[bytes]) -> None:
        reply = self._session.execute(*command, wake=partial(self._wake, command))
        if not isinstance(reply, Wait):
            self._show(command, reply)
            batch.replies += self._say(reply)
        elif self._protocol is None:
            self._server.forget(reply)
        else:
            self._wait = reply
            if reply.timeout_ms:
                loop = asyncio.get_running_loop()
                self._alarm = loop.call_later(reply.timeout_ms / 1000, self._time_out)

    def _time_out(self) -> None:
        assert self._wait is not None
        self._server.forget(self._wait)
        self._wait.wake(None)

    def _wake(self, command: list[bytes], reply: Any) -> None:
        self._end_wait()
        self._show(command, reply)
        self._inbox[0].replies += self._say(reply)
        self._work()

    def _show(self, command: list[bytes], reply: Any) -> None:
        """Show replies to who watches the reader, each with its command."""
        watch = self._network.watch
        if watch is None:
            return
        if reply == b"QUEUED" and isinstance(reply, Status):
            self._queued.append(command)
        elif command[0].upper() in (b"EXEC", b"DISCARD", b"MULTI"):
            queued, self._queued = self._queued, []
            if isinstance(reply, list):
                for one, its_reply in zip(queued, reply, strict=True):
                    watch.replied(self.host, one, its_reply, self._given)
        else:
            watch.replied(self.host, command, reply, self._given)

    def _say(self, reply: Any) -> bytes:
        if self.host in self._network.garbling:
            reply = _garbled(reply, self._network.rng)
        if self.host in self._network.flooding:
            reply = _flooded(reply, self._network.rng)
        return _encode(reply)

    def _end_wait(self) -> None:
        self._wait = None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def go_on(self) -> None:
        """Go on after the server hung."""
        held, self._held_back = self._held_back, deque()
        for data in held:
            self._reach_client(data)
        self._work()

    # The end

    def _has_commands(self) -> bool:
        return any(batch.commands for batch in (*self._inbox, *self._going.moving))

    def _abandon(self) -> None:
        self._protocol = None
        self._held_back.clear()
        self._dripping.clear()
        if self._wait is not None:
            # A server forgets what stands behind a read that blocks.
            self._server.forget(self._wait)
            self._end_wait()
            self._stop()
            return
        count = sum(len(batch.commands) for batch in (*self._inbox, *self._going.moving))
        self._still_to_run = self._network.rng.randint(0, count) if count else 0
        if not self._still_to_run:
            self._stop()

    def _stop(self) -> None:
        self._inbox.clear()
        self._going.moving.clear()
        self._network.note(self, over=True)


def _garbled(reply: Any, rng: random.Random) -> Any:
    """Return a reply of which one part, or the whole, is of a kind that no command answers with."""
    if isinstance(reply, list) and reply and rng.random() < _DEEPER:
        at = rng.randrange(len(reply))
        return [*reply[:at], _garbled(reply[at], rng), *reply[at + 1 :]]
    if isinstance(reply, int):
        return rng.choice((b"\xb2", b",inf", [reply]))
    if isinstance(reply, list):
        return rng.choice((len(reply), b"\xff\xfe"))
    return rng.choice((-1, [[]], [b"\xff", 7]))


def _flooded(reply: Any, rng: random.Random) -> Any:
    """Return a reply of which the whole, or one part, has many times the elements asked for."""
    if not isinstance(reply, list) or not reply:
        return reply
    at = rng.randrange(len(reply))
    if isinstance(reply[at], list) and rng.random() < _DEEPER:
        return [*reply[:at], _flooded(reply[at], rng), *reply[at + 1 :]]
    return reply * FLOOD_TIMES


def _encode(reply: Any) -> bytes:
    """Return a reply as RESP2."""
    parts: list[bytes] = []
    _encode_into(parts, reply)
    return b"".join(parts)


def _encode_into(parts: list[bytes], reply: Any) -> None:
    if reply is None:
        parts.append(b"$-1\r\n")
    elif isinstance(reply, Status):
        parts.append(b"+%b\r\n" % reply)
    elif isinstance(reply, bytes):
        parts.append(b"$%d\r\n%b\r\n" % (len(reply), reply))
    elif isinstance(reply, int):
        parts.append(b":%d\r\n" % reply)
    elif isinstance(reply, PeerReplyError):
        text = " ".join(str(reply).splitlines())
        parts.append(b"-%b\r\n" % text.encode("utf-8", "replace"))
    else:
        parts.append(b"*%d\r\n" % len(reply))
        for element in reply:
            _encode_into(parts, element)


class SimTransport(RedisTransport):
    """Connects to simulated servers by the host part of a URL, such as ``redis://node-a``.

    One for all nodes is one network; one for each node lets each lose its own lines. ``delay`` is
    called with the connection's name and the host for each flight, and returns the seconds that it
    takes there and back; while nothing was set, replies come after a turn of the loop or two.
    ``flights`` and ``commands`` count what all connections have sent, greetings included. ``watch``
    sees what is sent and replied; once it has failed nothing that is sent arrives any more.
    """

    def __init__(self, servers: Mapping[str, SimRedis], clock: Clock, rng: random.Random) -> None:
        super().__init__(clock)
        self.servers = servers
        self.rng = rng
        self.delay: Callable[[str, str], float] = lambda _name, _host: 0.0
        self.watch: SpinWatch | None = None
        self.flights = 0
        self.commands = 0
        self.down: set[str] = set()
        self.hung: set[str] = set()
        self.dripping: dict[str, int] = {}
        self.rejecting: set[str] = set()
        self.garbling: set[str] = set()
        self.flooding: set[str] = set()
        # In the order in which they were opened.
        self._wires: dict[_Wire, None] = {}

    def cut(self, host: str) -> None:
        """Lose all lines to a host, and refuse new ones until :meth:`heal`."""
        self.down.add(self._known(host))
        for wire in list(self._wires):
            if wire.host == host:
                wire.cut()

    def hang(self, host: str) -> None:
        """Let a host answer nothing until :meth:`heal`, as if its process were stopped."""
        self.hung.add(self._known(host))

    def drip(self, host: str, bytes_per_sec: int) -> None:
        """Let replies of a host come at this rate until :meth:`heal`, four times a second."""
        self.dripping[self._known(host)] = bytes_per_sec

    def reject(self, host: str) -> None:
        """Let a host reject the credentials of new lines until :meth:`heal`."""
        self.rejecting.add(self._known(host))

    def garble(self, host: str) -> None:
        """Let a host answer with replies of the wrong kind until :meth:`heal`."""
        self.garbling.add(self._known(host))

    def flood(self, host: str) -> None:
        """Let a host answer with many times what was asked for until :meth:`heal`."""
        self.flooding.add(self._known(host))

    def heal(self, host: str) -> None:
        """End what was done to the lines to a host; commands that waited are then run."""
        self.down.discard(self._known(host))
        for trouble in (self.rejecting, self.hung, self.garbling, self.flooding):
            trouble.discard(host)
        self.dripping.pop(host, None)
        for wire in list(self._wires):
            if wire.host == host:
                wire.go_on()

    def _known(self, host: str) -> str:
        if host not in self.servers:
            raise KeyError(f"there is no server {host!r}")
        return host

    def may_send(self, host: str, commands: Sequence[list[bytes]]) -> bool:
        """Show a flight to who watches; whether it goes on its way."""
        if self.watch is None:
            return True
        if not self.watch.failed:
            self.watch.sending(host, commands)
        return not self.watch.failed

    def note(self, wire: _Wire, *, over: bool) -> None:
        """Forget a line when it is over."""
        if over:
            self._wires.pop(wire, None)

    async def connect(self, url: str, *, timeout_sec: float, name: str) -> SimConnection:
        """Connect and authenticate, within ``timeout_sec``.

        :raises PeerRefusedError: if the URL cannot be used or the credentials are rejected.
        :raises ConnectionLostError: if the server cannot be reached in time.
        :raises PeerReplyError: if the server answers with an error that may pass.
        """
        connection = await super().connect(url, timeout_sec=timeout_sec, name=name)
        assert isinstance(connection, SimConnection)
        return connection

    async def _open(self, options: dict[str, Any], where: str, name: str) -> SimConnection:
        host = str(options.get("host", "localhost"))
        if self.watch is not None:
            self.watch.connecting(host)
        await self._clock.sleep(self.delay(name, host))
        if host not in self.servers or host in self.down:
            raise ConnectionLostError(f"{where} cannot be reached: connection refused")
        if host in self.rejecting:
            raise PeerRefusedError(f"{where}: the credentials are rejected", credentials=True)
        connection = SimConnection(where, self._clock, self)
        wire = _Wire(self, host, name)
        self._wires[wire] = None
        wire.carry(connection)
        return connection
