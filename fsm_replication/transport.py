"""The Redis transport: connections of our own on asyncio and hiredis.

Theory of operation. The hot path is bound by what a client spends per entry, so a reply goes from
the socket into hiredis's reader and out as plain lists, with nothing in between. Three things are
needed that a general client does not give: a request can be sent before the last reply has been
worked on; the bytes of a reply are counted while they arrive, so that a peer cannot make us hold
more than we agreed to; and a single entry too large to hold can be skimmed for its id.

There is no retry here: a connection that has failed in any way is closed, and the link's machine
decides what happens next. A cancelled call closes the connection too, since a reply that nobody
waits for would be taken for the next one's.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, cast

import hiredis
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection, parse_url

from fsm_replication.errors import (
    ConnectionLostError,
    PeerRefusedError,
    PeerReplyError,
    ProtocolError,
    ReplicationError,
    ReplyTooLargeError,
)
from fsm_replication.ports import Clock, Oversize, PackedArguments, SystemClock
from fsm_replication.redaction import NO_SECRETS, Secrets, mask_url

__all__ = ("RedisConnection", "RedisTransport", "pack_arguments")

_CREDENTIAL_CODES: Final = frozenset({"NOAUTH", "WRONGPASS", "NOPERM"})
_TLS_FILES: Final = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_NOTHING: Final = object()
Command = Sequence[bytes | str | int]
SEND_BUFFER_BYTES: Final = 512 * 1024
_T = TypeVar("_T")
# The stub of hiredis types the argument as a tuple of one element.
_pack: Final[Callable[[tuple[bytes | str | int, ...]], bytes]] = hiredis.pack_command  # type: ignore[assignment]


def pack_arguments(args: Sequence[bytes | str | int]) -> PackedArguments:
    """Return arguments as they go over the wire."""
    packed = _pack(tuple(args))
    return PackedArguments(len(args), packed[packed.index(b"\r\n") + 2 :])


class _Flight:
    """Commands sent together and the replies that have come for them."""

    __slots__ = ("future", "limit_bytes", "received_bytes", "replies", "wanted")

    def __init__(
        self, wanted: int, future: asyncio.Future[list[Any]], limit_bytes: int | None
    ) -> None:
        self.wanted = wanted
        self.future = future
        self.limit_bytes = limit_bytes
        self.replies: list[Any] = []
        self.received_bytes = 0


class RedisConnection(asyncio.Protocol):
    """One connection; see the port of the same name for what its calls promise.

    ``secrets`` are taken out of every text of the server, which may quote what it was sent.
    """

    def __init__(self, where: str, clock: Clock, secrets: Secrets = NO_SECRETS) -> None:
        self.where = where
        self._clock = clock
        self._secrets = secrets
        self._reader = self._new_reader(secrets)
        self._flights: deque[_Flight] = deque()
        self._transport: asyncio.Transport | None = None
        self._error: ReplicationError | None = None
        self._limit_bytes: int | None = None
        self._skim: _Skimmer | None = None
        self._held_back: list[tuple[_Flight, bytes]] = []
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received_bytes = 0

    @staticmethod
    def _new_reader(secrets: Secrets) -> hiredis.Reader:
        def reply_error(text: str) -> PeerReplyError:
            return PeerReplyError(secrets.scrub(text))

        return hiredis.Reader(
            protocolError=ProtocolError, replyError=reply_error, notEnoughData=_NOTHING
        )

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport over."""
        # uvloop's transports have the methods of asyncio.Transport without being one.
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            # What does not fit is sent when the event loop comes round, and until then Redis cannot
            # begin with a command that it has not whole.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        """Parse what came, count it, and complete the flights it completes."""
        self._received_bytes += len(data)
        if self._skim is not None:
            self._feed_skimmer(self._skim, data)
            return
        if not self._flights:
            self._fail(ProtocolError(f"{self.where} sent data that nobody asked for"))
            return
        flight = self._flights[0]
        flight.received_bytes += len(data)
        if flight.limit_bytes is not None and flight.received_bytes > flight.limit_bytes:
            self._fail(ReplyTooLargeError(flight.limit_bytes))
            return
        try:
            self._reader.feed(data)
            reply = self._reader.gets()
            while reply is not _NOTHING:
                self._deliver(reply)
                reply = self._reader.gets()
        except ProtocolError as error:
            self._fail(ProtocolError(f"{self.where} does not speak the Redis protocol: {error}"))

    def _deliver(self, reply: Any) -> None:
        if not self._flights:
            raise ProtocolError("a reply that nobody asked for")
        flight = self._flights[0]
        flight.replies.append(reply)
        if len(flight.replies) == flight.wanted:
            self._flights.popleft()
            if not flight.future.done():
                flight.future.set_result(flight.replies)

    def _feed_skimmer(self, skim: _Skimmer, data: bytes) -> None:
        try:
            done = skim.feed(data)
        except ProtocolError as error:
            self._fail(error)
            return
        if done:
            self._skim = None
            assert self._transport is not None
            for flight, packed in self._held_back:
                self._flights.append(flight)
                self._transport.write(packed)
            self._held_back.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail whoever waits."""
        self._fail(ConnectionLostError(f"{self.where} closed the connection{_because(exc)}"))
        if not self._gone.done():
            self._gone.set_result(None)

    def _fail(self, error: ReplicationError) -> None:
        if self._error is None:
            self._error = error
        waiting: list[asyncio.Future[Any]] = [flight.future for flight in self._flights]
        waiting += [flight.future for flight, _ in self._held_back]
        if self._skim is not None:
            waiting.append(self._skim.future)
            self._skim = None
        self._flights.clear()
        self._held_back.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(self._error)
                # Whoever sent and then went away without waiting has nobody to tell.
                future.exception()
        if self._transport is not None:
            self._transport.abort()
        if not self._lost.done():
            self._lost.set_result(None)

    # The port

    @property
    def closed(self) -> bool:
        """Whether it can no longer be used."""
        return self._error is not None

    @property
    def lost(self) -> asyncio.Future[None]:
        """Done as soon as the connection is closed, for whatever reason."""
        return self._lost

    @property
    def received_bytes(self) -> int:
        """Bytes received since it was opened."""
        return self._received_bytes

    def limit_reply(self, limit_bytes: int) -> None:
        """Drop the connection when a later flight's replies exceed this many bytes."""
        self._limit_bytes = limit_bytes

    def send(self, *commands: Command) -> asyncio.Future[list[Any]]:
        """Send now; the future gives the replies, error replies as exception objects."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if self._error is not None or self._transport is None:
            error = self._error or ConnectionLostError(f"{self.where} is not connected")
            future.set_exception(error)
            future.exception()
            return future
        self._send(
            _Flight(len(commands), future, self._limit_bytes),
            b"".join(_pack(tuple(command)) for command in commands),
        )
        return future

    def _send(self, flight: _Flight, packed: bytes) -> None:
        assert self._transport is not None
        if self._skim is None:
            self._flights.append(flight)
            self._transport.write(packed)
        else:
            self._held_back.append((flight, packed))

    def _send_one(self, args: Command, tail: PackedArguments | None) -> asyncio.Future[list[Any]]:
        """Send one command whose last arguments may be packed already."""
        if tail is None or self._error is not None or self._transport is None:
            return self.send(args)
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        head = _pack(tuple(args))
        packed = b"*%d%b%b" % (len(args) + tail.number, head[head.index(b"\r\n") :], tail.data)
        self._send(_Flight(1, future, self._limit_bytes), packed)
        return future

    async def pipeline(
        self, commands: Sequence[Command], timeout_sec: float | None = None
    ) -> list[Any]:
        """Send several commands in one flight and wait for their replies."""
        if not commands:
            return []
        return await self._wait(self.send(*commands), timeout_sec)

    async def _wait(self, future: asyncio.Future[_T], timeout_sec: float | None) -> _T:
        """Wait as long as bytes keep coming, with at most ``timeout_sec`` between them."""
        received = self._received_bytes
        try:
            while not future.done():
                try:
                    async with self._clock.timeout(timeout_sec):
                        await asyncio.wait((future,))
                except TimeoutError:
                    before, received = received, self._received_bytes
                    if before == received:
                        error = ConnectionLostError(
                            f"{self.where} gave no answer within {timeout_sec:g} s"
                        )
                        self._fail(error)
                        raise error from None
        except asyncio.CancelledError:
            self._fail(ConnectionLostError(f"a call to {self.where} was cancelled"))
            raise
        return future.result()

    async def call(
        self,
        *args: bytes | str | int,
        timeout_sec: float | None = None,
        tail: PackedArguments | None = None,
    ) -> Any:
        """Send one command and return its reply; ``tail`` are arguments that come after ``args``.

        :raises PeerReplyError: if the server answers with an error.
        :raises ConnectionLostError: if it does not answer.
        """
        (reply,) = await self._wait(self._send_one(args, tail), timeout_sec)
        if isinstance(reply, PeerReplyError):
            raise PeerReplyError(str(reply), peer=self.where)
        return reply

    async def skim(self, *args: bytes | str | int, timeout_sec: float) -> Any:
        """Send one command and keep no long string of its reply.

        Flights that are under way are waited for first, and what is sent meanwhile is held back.

        :raises PeerReplyError: if the server answers with an error.
        :raises ConnectionLostError: if it does not answer.
        """
        while self._flights or self._skim is not None:
            last = self._skim.future if self._skim is not None else self._flights[-1].future
            await asyncio.wait((last, self._lost), return_when=asyncio.FIRST_COMPLETED)
        if self._error is not None or self._transport is None:
            raise self._error or ConnectionLostError(f"{self.where} is not connected")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._skim = _Skimmer(future, self._secrets)
        self._transport.write(_pack(args))
        reply = await self._wait(future, timeout_sec)
        if isinstance(reply, PeerReplyError):
            raise PeerReplyError(str(reply), peer=self.where)
        return reply

    def close(self) -> None:
        """Close at once; whoever waits gets ConnectionLostError."""
        self._fail(ConnectionLostError(f"the connection to {self.where} was closed"))

    async def wait_closed(self) -> None:
        """Return when the socket is closed."""
        if self._transport is not None:
            await asyncio.shield(self._gone)

    def __repr__(self) -> str:
        return f"<RedisConnection {self.where}{' closed' if self.closed else ''}>"


class _Skimmer:
    """Reads one RESP2 reply of any size.

    Strings over 256 bytes become :class:`Oversize`, and so does what an array holds beyond its
    first 256 elements, all in one.
    """

    KEPT_BYTES: Final = 256
    KEPT_ELEMENTS: Final = 256
    ELEMENTS_MAX: Final = 10_000_000

    def __init__(self, future: asyncio.Future[Any], secrets: Secrets) -> None:
        self.future = future
        self._secrets = secrets
        self._line = b""
        self._skip = 0
        self._size = 0
        self._kept: bytearray | None = None
        self._elements = 0
        # Arrays that are not complete, each with the number of elements it still lacks.
        self._open: list[tuple[list[Any], int]] = []

    def feed(self, data: bytes) -> bool:
        """Take bytes in; True when the reply is complete, and the future has it."""
        at = 0
        while at < len(data):
            if self._skip:
                at = self._pass_string(data, at)
                continue
            end = data.find(b"\n", at)
            self._line += data[at:] if end < 0 else data[at:end]
            if len(self._line) > 4096:
                raise ProtocolError("a line of a reply is too long")
            if end < 0:
                break
            line, self._line = self._line.rstrip(b"\r"), b""
            at = end + 1
            self._take_line(line)
        return self.future.done()

    def _pass_string(self, data: bytes, at: int) -> int:
        taken = min(self._skip, len(data) - at)
        if self._kept is not None:
            self._kept += data[at : at + taken]
        self._skip -= taken
        if not self._skip:
            self._put(Oversize(self._size) if self._kept is None else bytes(self._kept[:-2]))
            self._kept = None
        return at + taken

    def _take_line(self, line: bytes) -> None:
        kind, rest = line[:1], line[1:]
        if kind in (b"$", b"*", b":") and not rest.removeprefix(b"-").isdigit():
            raise ProtocolError("a length that is no number")
        if kind == b"$" and int(rest) >= 0:
            self._size = int(rest)
            self._skip = self._size + 2
            self._kept = bytearray() if self._size <= self.KEPT_BYTES else None
        elif kind == b"*" and int(rest) > 0:
            self._open.append(([], int(rest)))
        elif kind == b"*":
            self._put([] if rest == b"0" else None)
        elif kind == b"$":
            self._put(None)
        elif kind == b":":
            self._put(int(rest))
        elif kind == b"+":
            self._put(rest)
        elif kind == b"-":
            self._put(PeerReplyError(self._secrets.scrub(rest.decode("utf-8", "replace"))))
        else:
            raise ProtocolError(f"unexpected byte {kind!r} in a reply")

    def _put(self, value: Any) -> None:
        self._elements += 1
        if self._elements > self.ELEMENTS_MAX:
            raise ProtocolError("a reply has too many elements")
        while self._open:
            array, lacking = self._open.pop()
            if len(array) < self.KEPT_ELEMENTS:
                array.append(value)
            else:
                # What is asked for stands first; of the rest only the size is kept.
                size = _size_of(value)
                if isinstance(array[-1], Oversize):
                    array[-1] = Oversize(array[-1].size + size)
                else:
                    array[-1] = Oversize(_size_of(array[-1]) + size)
            if lacking > 1:
                self._open.append((array, lacking - 1))
                return
            value = array
        if not self.future.done():
            self.future.set_result(value)


def _size_of(value: Any) -> int:
    if isinstance(value, Oversize):
        return value.size
    return len(value) if isinstance(value, bytes) else 0


class RedisTransport:
    """Opens connections by URL: redis://, rediss:// (certificates checked) and unix://."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()

    async def connect(self, url: str, *, timeout_sec: float, name: str) -> RedisConnection:
        """Connect, authenticate and select the database, within ``timeout_sec``.

        :raises PeerRefusedError: if the URL cannot be used or the credentials are rejected.
        :raises ConnectionLostError: if the server cannot be reached in time.
        :raises PeerReplyError: if the server answers with an error that may pass.
        """
        where = mask_url(url)
        options = _options(url)
        if options is None:
            raise PeerRefusedError(f"{where} cannot be used: it is not a Redis URL")
        connection: RedisConnection | None = None
        try:
            async with self._clock.timeout(timeout_sec):
                connection = await self._open(options, where, name)
                await self._greet(connection, options, name)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, TimeoutError):
                raise ConnectionLostError(
                    f"{where} did not answer within {timeout_sec:g} s"
                ) from None
            if isinstance(error, ssl.SSLCertVerificationError):
                # It may be renewed over there, so this too may pass.
                raise ConnectionLostError(
                    f"{where} shows a certificate that is not accepted: {error.verify_message};"
                    " where its authority is not one of this machine's, name that with"
                    " ?ssl_ca_certs=FILE in the URL"
                ) from None
            if isinstance(error, ssl.SSLError | OSError):
                raise ConnectionLostError(f"{where} cannot be reached: {error}") from None
            raise
        return connection

    async def _open(self, options: dict[str, Any], where: str, _name: str) -> RedisConnection:
        """Open the line; a simulated network does this and nothing else in its own way."""
        loop = asyncio.get_running_loop()
        secrets: Secrets = options["secrets"]

        def factory() -> RedisConnection:
            return RedisConnection(where, self._clock, secrets)

        kind = options.get("connection_class")
        if kind is UnixDomainSocketConnection:
            _, connection = await loop.create_unix_connection(factory, options.get("path", ""))
            return connection
        context = _tls_context(options, where) if kind is SSLConnection else None
        host, port = options.get("host", "localhost"), options.get("port", 6379)
        _, connection = await loop.create_connection(factory, host, port, ssl=context)
        return connection

    async def _greet(self, connection: RedisConnection, options: dict[str, Any], name: str) -> None:
        commands: list[Command] = []
        username, password = options.get("username"), options.get("password")
        if password is not None:
            commands.append(["AUTH", username, password] if username else ["AUTH", password])
        if options.get("db"):
            commands.append(["SELECT", int(options["db"])])
        commands.append(["PING"])
        for command, reply in zip(commands, await connection.pipeline(commands), strict=True):
            if not isinstance(reply, PeerReplyError):
                continue
            text = str(reply)
            # A server that does not know AUTH may name it in whatever spelling, or not at all.
            no_auth = command[0] == "AUTH" and "unknown command" in text.lower()
            if text.split(" ", 1)[0] in _CREDENTIAL_CODES or "AUTH" in text or no_auth:
                raise PeerRefusedError(
                    f"{connection.where} rejected the credentials: {text}", credentials=True
                )
            if "DB index" in text:
                raise PeerRefusedError(f"{connection.where}: {text}")
            raise PeerReplyError(text, peer=connection.where)
        # A name helps whoever looks at CLIENT LIST over there; a user who may only read may be
        # refused it, which does not matter.
        await connection.pipeline([["CLIENT", "SETNAME", name]])


def _options(url: str) -> dict[str, Any] | None:
    """Return what a URL says, and its secrets; None if it is no Redis URL."""
    try:
        return dict(parse_url(url)) | {"secrets": Secrets.of(url)}
    except ValueError:
        # What it says quotes the part it could not read, which may be a part of the password: so
        # nothing is raised in here, that would hang on to it as its context.
        return None


def _tls_context(options: dict[str, Any], where: str) -> ssl.SSLContext:
    """Return a context that checks the server's certificate unless the URL says otherwise."""
    try:
        context = ssl.create_default_context(
            cafile=options.get("ssl_ca_certs"),
            capath=options.get("ssl_ca_path"),
            cadata=options.get("ssl_ca_data"),
        )
        if str(options.get("ssl_check_hostname", "true")).lower() in ("false", "0", "no"):
            context.check_hostname = False
        if str(options.get("ssl_cert_reqs", "required")).lower() == "none":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if options.get("ssl_certfile"):
            context.load_cert_chain(
                options["ssl_certfile"], options.get("ssl_keyfile"), _no_passphrase
            )
    except (OSError, ssl.SSLError, ValueError) as error:
        files = [f"{name}={options[name]}" for name in _TLS_FILES if name in options]
        raise PeerRefusedError(
            f"{where}: the TLS settings cannot be used: {error} ({', '.join(files)})"
        ) from None
    return context


def _no_passphrase() -> str:
    """Keep the TLS library from asking for one at the terminal."""
    raise ValueError("the private key is encrypted; a key without a passphrase is needed")


def _because(error: Exception | None) -> str:
    return f": {error}" if error is not None else ""
