"""A proxy that stands before a real Redis and breaks what goes through it.

Theory of operation. Each client connection has a line of its own to the server, and each direction
of a line has two tasks: one takes what comes, the other gives it on when its time has come. So a
delay moves everything by the same time and slows nothing down, and a silence holds back what is
under way as a network does that drops packets and sends them again. Requests and replies are
followed only as far as is needed to tell where each ends: then a reply can be cut in its middle,
and an error can stand in the place of one without disturbing its neighbours.

The port stays reserved while nobody listens on it, so a client that is refused there is refused by
nobody else, and the proxy can always come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

__all__ = ("FaultProxy", "until_first_ends")

READ_BYTES: Final = 64 * 1024
# Of each direction of a line; a sender that is ahead by more waits.
CHUNKS_HELD: Final = 64
BACKLOG: Final = 128
_SPOILED: Final = b"-EXECABORT Transaction discarded because of previous errors.\r\n"
_DISCARD: Final = b"*1\r\n$7\r\nDISCARD\r\n"
# A direction hands on (when, bytes), and None at its end.
_Queue = asyncio.Queue[tuple[float, bytes] | None]
OnRequest = Callable[[Sequence[bytes]], None]


@dataclass(slots=True)
class _Faults:
    """What is broken now; every line looks here before each step."""

    flowing: asyncio.Event
    to_server_sec: float = 0.0
    to_client_sec: float = 0.0
    drip_sec: float = 0.0
    cut_after_bytes: int | None = None
    error: bytes | None = None
    commands: frozenset[bytes] = field(default=frozenset())

    def error_for(self, name: bytes) -> bytes | None:
        """Return the error reply this command gets, None where it gets its own."""
        if self.error is None or (self.commands and name not in self.commands):
            return None
        return self.error


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and passes everything to the Redis at ``port``.

    Use it as an async context manager, or call ``start`` and ``stop``. The calls that break
    something may be combined; ``heal`` ends them all. Connections must be of the kind that gets
    one RESP2 reply for each request (no subscriptions, no MONITOR). ``on_request`` is called with
    the arguments of every command that arrives, before it is passed on or answered.
    """

    def __init__(
        self, port: int, host: str = "127.0.0.1", *, on_request: OnRequest | None = None
    ) -> None:
        self._to = (host, port)
        self._on_request = on_request
        self._faults = _Faults(asyncio.Event())
        self._faults.flowing.set()
        self._reserved: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._lines: dict[asyncio.Task[None], _Line] = {}

    # What may be asked of it.

    @property
    def port(self) -> int:
        """The port it listens on, or refuses connections at; another one after ``move``."""
        assert self._reserved is not None, "the proxy was not started"
        port: int = self._reserved.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """The address to give to clients."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many client connections are open."""
        return len(self._lines)

    async def start(self) -> Self:
        """Reserve a port and listen.

        :raises OSError: if there is no free port.
        """
        self._reserve()
        await self._listen()
        return self

    async def stop(self) -> None:
        """Close everything and wait until it is closed; a second call does nothing."""
        await self._close()
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    async def refuse(self) -> None:
        """Drop all connections and refuse new ones: a dead port."""
        await self._close()

    async def move(self) -> str:
        """Drop all connections and listen at another port; returns the new URL.

        The old port is dead from now on, and nobody keeps it free any more.
        """
        await self._close()
        old, self._reserved = self._reserved, None
        self._reserve()
        if old is not None:
            old.close()
        await self._listen()
        return self.url

    def silence(self) -> None:
        """Accept connections and bytes and pass nothing on: no answer, no refusal, no end."""
        self._faults.flowing.clear()

    def delay(self, to_server_sec: float = 0.0, to_client_sec: float = 0.0) -> None:
        """Give everything on later by this many seconds, each direction by its own."""
        self._faults.to_server_sec = to_server_sec
        self._faults.to_client_sec = to_client_sec

    def drip(self, pause_sec: float) -> None:
        """Give replies on byte by byte with a pause after each: bytes keep coming, answers hardly do."""
        self._faults.drip_sec = pause_sec

    def cut(self, after_bytes: int) -> None:
        """Cut every connection in the middle of a reply, after about this many bytes of replies.

        Each connection counts for itself, from now or from when it is opened; at least 1.
        """
        self._faults.cut_after_bytes = after_bytes
        for line in self._lines.values():
            line.passed_bytes = 0

    def answer(self, error: str, commands: Iterable[str] = ()) -> None:
        """Answer these commands, or with none named all, by an error such as "LOADING wait".

        They do not reach the server. In a transaction such an error spoils the whole, as with Redis.
        """
        self._faults.error = f"-{error}\r\n".encode()
        self._faults.commands = frozenset(name.upper().encode() for name in commands)

    async def heal(self) -> None:
        """End every fault; connections that were silent go on, where the client has waited.

        :raises OSError: if it cannot listen again.
        """
        faults = self._faults
        faults.to_server_sec = faults.to_client_sec = faults.drip_sec = 0.0
        faults.cut_after_bytes = faults.error = None
        faults.flowing.set()
        if self._server is None:
            await self._listen()

    # How it works.

    def _reserve(self) -> None:
        # Bound and never listening: whoever connects is refused, and nobody else gets the port.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._accept,
            "127.0.0.1",
            self.port,
            reuse_address=True,
            backlog=BACKLOG,
            start_serving=False,
        )
        await self._server.start_serving()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            # It was on its way in when the proxy closed.
            writer.transport.abort()
            return
        line = _Line(self._faults, self._on_request, reader, writer)
        task = asyncio.get_running_loop().create_task(line.run(self._to), name="fault-proxy-line")
        self._lines[task] = line
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._lines.pop(task).abort()

    async def _close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        tasks = tuple(self._lines)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if server is not None:
            await server.wait_closed()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def __repr__(self) -> str:
        where = "stopped" if self._reserved is None else f"port {self.port}"
        return f"<FaultProxy {where} -> {self._to[0]}:{self._to[1]}>"


@dataclass(frozen=True, slots=True)
class _Awaited:
    """The next reply: the server's where ``forwarded``, and ``instead`` in its place if set."""

    forwarded: bool
    instead: bytes | None = None


class _Line:
    """One client connection and its line to the server."""

    def __init__(
        self,
        faults: _Faults,
        on_request: OnRequest | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.passed_bytes = 0
        self._faults = faults
        self._on_request = on_request
        self._client = (reader, writer)
        self._requests: _Queue = asyncio.Queue(CHUNKS_HELD)
        self._replies: _Queue = asyncio.Queue(CHUNKS_HELD)
        self._request_scanner = _RequestScanner()
        self._reply_scanner = _ReplyScanner()
        self._awaited: deque[_Awaited] = deque()
        self._in_transaction = False
        self._spoiled = False

    async def run(self, to: tuple[str, int]) -> None:
        """Pass on until either side ends or the proxy does; then both sides are closed."""
        client_reader, client_writer = self._client
        server_writer: asyncio.StreamWriter | None = None
        try:
            server_reader, server_writer = await asyncio.open_connection(*to)
            await until_first_ends(
                self._take(client_reader, self._requests, self._take_requests),
                self._take(server_reader, self._replies, self._take_replies),
                self._give(self._requests, server_writer),
                self._give(self._replies, client_writer),
            )
        except (OSError, ValueError):
            # The server is down, or no Redis: to the client that is a connection which ends.
            return
        finally:
            await _abort(client_writer)
            if server_writer is not None:
                await _abort(server_writer)

    def abort(self) -> None:
        """Drop the client; one that was accepted just before the end has nobody else to do it."""
        self._client[1].transport.abort()

    async def _take(
        self,
        reader: asyncio.StreamReader,
        queue: _Queue,
        take: Callable[[bytes], Coroutine[Any, Any, bool]],
    ) -> None:
        """Take what comes until the end, or until ``take`` wants no more."""
        try:
            while data := await reader.read(READ_BYTES):
                if not await take(data):
                    break
        except OSError:
            pass  # A reset is an end like any other.
        await queue.put(None)
        # The line ends when what was taken has been given on, and not before.
        await asyncio.get_running_loop().create_future()

    async def _give(self, queue: _Queue, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while (piece := await queue.get()) is not None:
            due, data = piece
            await asyncio.sleep(max(0.0, due - loop.time()))
            await self._faults.flowing.wait()
            while self._faults.drip_sec and queue is self._replies and len(data) > 1:
                writer.write(data[:1])
                await writer.drain()
                data = data[1:]
                await asyncio.sleep(self._faults.drip_sec)
            writer.write(data)
            await writer.drain()

    # From the client to the server.

    async def _take_requests(self, data: bytes) -> bool:
        for raw, args in self._request_scanner.feed(data):
            if self._on_request is not None:
                self._on_request(args)
            name = args[0].upper() if args else b""
            error = self._faults.error_for(name)
            if name == b"EXEC" and self._in_transaction and (self._spoiled or error is not None):
                await self._forward(_DISCARD, instead=error or _SPOILED)
            elif error is None:
                await self._forward(raw)
            else:
                self._spoiled = self._in_transaction
                await self._answer(error)
                continue
            if name == b"MULTI":
                self._in_transaction, self._spoiled = True, False
            elif name in (b"EXEC", b"DISCARD"):
                self._in_transaction = self._spoiled = False
        return True

    async def _forward(self, raw: bytes, instead: bytes | None = None) -> None:
        self._awaited.append(_Awaited(True, instead))
        due = asyncio.get_running_loop().time() + self._faults.to_server_sec
        await self._requests.put((due, raw))

    async def _answer(self, error: bytes) -> None:
        if self._awaited:
            self._awaited.append(_Awaited(False, error))
        else:
            await self._reply(error)

    # From the server to the client.

    async def _take_replies(self, data: bytes) -> bool:
        limit = self._faults.cut_after_bytes
        cut = limit is not None and self.passed_bytes + len(data) >= limit
        if cut and limit is not None:
            data = data[: max(1, limit - self.passed_bytes)]
        ends = self._reply_scanner.feed(data)
        self.passed_bytes += len(data)
        if cut and ends and ends[-1] == len(data):
            # Between two replies is no middle.
            await self._reply(self._replace(data, ends)[:-1])
        else:
            await self._reply(self._replace(data, ends))
        return not cut

    def _replace(self, data: bytes, ends: Sequence[int]) -> bytes:
        passed, begin = bytearray(), 0
        for end in ends:
            if not self._awaited:
                passed += data[begin:end]  # The server speaks first only to say goodbye.
            else:
                instead = self._awaited.popleft().instead
                passed += data[begin:end] if instead is None else instead
            while self._awaited and not self._awaited[0].forwarded:
                passed += self._awaited.popleft().instead or b""
            begin = end
        if not self._awaited or self._awaited[0].instead is None:
            passed += data[begin:]
        return bytes(passed)

    async def _reply(self, data: bytes) -> None:
        if data:
            due = asyncio.get_running_loop().time() + self._faults.to_client_sec
            await self._replies.put((due, data))


async def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def until_first_ends(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all of them until one ends, and wait for the end of all."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


class _RequestScanner:
    """Cuts what a client sends into commands."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
        """Yield each command that is complete: its bytes, and its arguments."""
        self._buffer += data
        while self._buffer:
            found = self._next()
            if found is None:
                return
            end, args = found
            raw = bytes(self._buffer[:end])
            del self._buffer[:end]
            yield raw, args

    def _next(self) -> tuple[int, list[bytes]] | None:
        at = self._buffer.find(b"\r\n")
        if at < 0:
            return None
        if self._buffer[:1] != b"*":
            return at + 2, bytes(self._buffer[:at]).split()
        lacking, at = int(self._buffer[1:at]), at + 2
        args: list[bytes] = []
        while lacking > 0:
            end = self._buffer.find(b"\r\n", at)
            if end < 0:
                return None
            size, at = int(self._buffer[at + 1 : end]), end + 2
            if len(self._buffer) < at + size + 2:
                return None
            args.append(bytes(self._buffer[at : at + size]))
            at += size + 2
            lacking -= 1
        return at, args


class _ReplyScanner:
    """Finds where replies end in what a server sends; RESP2, and RESP3 without pushes."""

    def __init__(self) -> None:
        self._line = b""
        self._skip = 0
        # Arrays that are not complete, each with the number of elements it still lacks.
        self._open: list[int] = []

    def feed(self, data: bytes) -> list[int]:
        """Return the places in ``data`` just behind the end of a reply."""
        ends: list[int] = []
        at = 0
        while at < len(data):
            if self._skip:
                taken = min(self._skip, len(data) - at)
                self._skip -= taken
                at += taken
                complete = not self._skip
            else:
                end = data.find(b"\n", at)
                if end < 0:
                    self._line += data[at:]
                    break
                line, self._line = self._line + data[at:end], b""
                at = end + 1
                complete = self._takes_line(line.rstrip(b"\r"))
            if complete and self._closes():
                ends.append(at)
        return ends

    def _takes_line(self, line: bytes) -> bool:
        """Say whether a value ends with this line."""
        kind = line[:1]
        if kind in (b"$", b"=", b"!") and int(line[1:]) >= 0:
            self._skip = int(line[1:]) + 2
            return False
        if kind in (b"*", b"~", b"%") and int(line[1:]) > 0:
            self._open.append(int(line[1:]) * (2 if kind == b"%" else 1))
            return False
        return True

    def _closes(self) -> bool:
        """Count a value that has ended; whether nothing around it is open any more."""
        while self._open:
            self._open[-1] -= 1
            if self._open[-1]:
                return False
            self._open.pop()
        return True
