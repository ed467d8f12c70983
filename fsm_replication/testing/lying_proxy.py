"""A proxy that lies: what a Redis answers, told otherwise, with every command noted.

Commands go on as they come, but for what ``ask`` makes of them, and each reply is what ``lie`` makes
of the server's. A reply inside EXEC is lied about with the command it belongs to. What no Redis would
say is said with :class:`Raw`: bytes that go over the wire as they are. How a connection breaks is not
its business: put a ``FaultProxy`` before it for that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import hiredis

from fsm_replication.testing.fault_proxy import until_first_ends

__all__ = ("Command", "HangUpError", "LyingProxy", "Raw", "Seen", "pack_reply", "truth")

Command = Sequence[bytes]
Ask = Callable[[Command], Command]
Lie = Callable[[Command, Any], Any]
READ_BYTES = 64 * 1024


class HangUpError(Exception):
    """Raised by a lie: the connection ends instead of an answer."""


class Seen(NamedTuple):
    """A command that came, and when, by the loop's time."""

    at: float
    command: Command


class Raw(NamedTuple):
    """Bytes in the place of a reply, or of a part of one; ``piece`` follows ``times`` times."""

    wire: bytes
    piece: bytes = b""
    times: int = 0


def truth(_command: Command, reply: Any) -> Any:
    """Return the server's reply as it is."""
    return reply


def _as_it_is(command: Command) -> Command:
    return command


def pack_reply(reply: Any) -> bytes:
    """Return a reply as it goes over the wire, in RESP2; statuses go as strings."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, Raw):
        return reply.wire + reply.piece * reply.times
    if isinstance(reply, Exception):
        return b"-%b\r\n" % str(reply).encode()
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    return b"*%d\r\n%b" % (len(reply), b"".join(map(pack_reply, reply)))


def _pack_command(command: Command) -> bytes:
    return pack_reply(list(command))


class LyingProxy:
    """Stands before the Redis at ``port``; use it as an async context manager.

    ``seen`` has every command of every connection, in order. Whoever reads through it is its only
    client, so that these are the commands of one link.
    """

    def __init__(self, port: int) -> None:
        self.ask: Ask = _as_it_is
        self.lie: Lie = truth
        self.seen: list[Seen] = []
        self._to = port
        self._server: asyncio.Server | None = None
        self._lines: set[asyncio.Task[None]] = set()

    def tell(self, lie: Lie = truth, ask: Ask = _as_it_is) -> None:
        """Lie from now on, or without arguments tell the truth."""
        self.lie, self.ask = lie, ask

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """The address to give to a link."""
        return f"redis://127.0.0.1:{self.port}"

    async def count(self, seconds: float) -> int:
        """Return how many commands come within some seconds from now."""
        before = len(self.seen)
        await asyncio.sleep(seconds)
        return len(self.seen) - before

    def times(self, *begin: bytes) -> list[float]:
        """Return when commands came that begin with these words."""
        return [seen.at for seen in self.seen if tuple(seen.command[: len(begin)]) == begin]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        server, self._server = self._server, None
        assert server is not None
        server.close()
        for line in self._lines:
            line.cancel()
        if self._lines:
            await asyncio.wait(self._lines)
        await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            # It was on its way in when the proxy closed.
            writer.transport.abort()
            return
        line = asyncio.create_task(self._run(reader, writer), name="lying-proxy-line")
        self._lines.add(line)
        line.add_done_callback(self._lines.discard)
        # One that is cancelled before it has begun closes nothing itself.
        line.add_done_callback(lambda _line: writer.transport.abort())

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._to)
            writers.append(server_writer)
            line = _Line(self)
            await until_first_ends(
                _pass_on(reader, server_writer, line.requests),
                _pass_on(server_reader, writer, line.replies),
            )
        except (OSError, HangUpError):
            return  # To the client that is a connection which ends.
        finally:
            # All of them first: whoever cancels this may do so while it waits for one.
            for each in writers:
                each.transport.abort()
            for each in writers:
                with contextlib.suppress(OSError):
                    await each.wait_closed()


class _Line:
    """What is awaited on one connection."""

    def __init__(self, proxy: LyingProxy) -> None:
        self._proxy = proxy
        self._requests = hiredis.Reader()
        self._replies = hiredis.Reader(notEnoughData=Ellipsis)
        self._awaited: deque[Command] = deque()
        self._queued: list[Command] | None = None

    def requests(self, data: bytes) -> Iterator[bytes]:
        """Yield what goes on to the server."""
        self._requests.feed(data)
        at = asyncio.get_running_loop().time()
        while (command := self._requests.gets()) is not False:
            self._proxy.seen.append(Seen(at, command))
            self._awaited.append(command)
            yield _pack_command(self._proxy.ask(command))

    def replies(self, data: bytes) -> Iterator[bytes]:
        """Yield what goes on to the client."""
        self._replies.feed(data)
        while (reply := self._replies.gets()) is not Ellipsis:
            told = self._told(self._awaited.popleft(), reply)
            if not isinstance(told, Raw):
                yield pack_reply(told)
                continue
            # Piece by piece: what is sent may be more than memory holds.
            yield told.wire
            for _ in range(told.times):
                yield told.piece

    def _told(self, command: Command, reply: Any) -> Any:
        name = command[0].upper()
        queued, lie = self._queued, self._proxy.lie
        if name == b"MULTI":
            self._queued = []
        elif name == b"EXEC" and queued is not None:
            self._queued = None
            if isinstance(reply, list):
                return [lie(one, told) for one, told in zip(queued, reply, strict=True)]
        elif queued is not None:
            queued.append(command)
            return reply
        return lie(command, reply)


async def _pass_on(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    take: Callable[[bytes], Iterator[bytes]],
) -> None:
    while data := await reader.read(READ_BYTES):
        for piece in take(data):
            writer.write(piece)
            await writer.drain()
