"""The Redis transport: connections of our own on asyncio and hiredis.

Theory of operation. The hot path is bound by what a client spends per entry, so a reply goes from
the socket into hiredis's reader and out as plain lists, with nothing in between. Three things are
needed that a general client does not give: a request can be sent before the last reply has been
worked on; the bytes of a reply are counted while they arrive, so that a peer cannot make us hold
more than we agreed to; and a single entry too large to hold can be skimmed for its id.

There is no retry here: a connection that has failed in any way is closed, and the link's machine
decides what happens next. A cancelled call closes the connection too, since a reply that nobody
waits for would be taken for the next one's.

Every flight has a limit from its first byte: what is small by its nature (a status, a number, a piece
of a string) may take no more than that, the greeting 2 KiB for each command, and all else what the caller allows. The
number of elements is bounded with the bytes, since an empty array takes four bytes on the way here and
eighty in memory.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from fsm_replication.ports import (
    LEAST_BYTES_PER_SEC,
    Clock,
    Oversize,
    PackedArguments,
    SystemClock,
)
from fsm_replication.redaction import NO_SECRETS, Secrets, mask_url
from fsm_replication.replies import status

__all__ = ("RedisConnection", "RedisTransport", "pack_arguments", "too_slow")

_CREDENTIAL_CODES: Final = frozenset({"NOAUTH", "WRONGPASS", "NOPERM"})
_TLS_FILES: Final = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_NOTHING: Final = object()
_ONE_OF_MANY: Final = PeerReplyError("ERR and so on: one of very many errors in one reply")
Command = Sequence[bytes | str | int]
GREETING_BYTES: Final = 64 * 1024
"""What the replies to a greeting may take; a server that is none of ours may be chatty."""
MARKER_FIELDS_BYTES: Final = 64 * 1024
"""What some fields of a marker key may take; nothing else is read by HMGET."""
UNCOUNTED_BYTES: Final = 1024 * 1024
"""A flight of no more is not looked at for its elements: counting them costs time."""
BYTES_PER_ELEMENT: Final = 24
"""A flight may hold one element, or line of an uncompressed content, for each so many bytes."""
ERRORS_MAX: Final = 64
"""Different texts of errors in one flight; what comes beyond them is one and the same object."""
DECLARED_MAX: Final = 3_000_000
"""Parts that the arrays of one flight may declare together, small arrays not counted."""
# The head of an array, map, set or push of ten thousand parts or more. The parser makes the list before a
# single part has come, and letting go of it again stops the event loop for seconds. A content may hold
# such a line too, which the parser can tell: it has something in hand then.
_HEAD: Final = re.compile(rb"\r\n[*%~>|]([0-9]{5,})(?=\r\n)")
_ARRAYS: Final = (b"*", b"%", b"~", b">", b"|")
# What may be the beginning of one, at the end of what came.
_PART_OF_HEAD: Final = re.compile(rb"(?:(?:\A|\r\n)[*%~>|][0-9]*\r?|\r)\Z")
_HEAD_BYTES: Final = 32
_SMALL_BYTES: Final = 2048
# Statuses, numbers, errors: nothing in these replies grows with what a server holds.
_SMALL: Final = frozenset(
    {"PING", "EXISTS", "STRLEN", "HLEN", "ZCARD", "MEMORY", "CLIENT", "SELECT", "AUTH", "TIME"}
)
# How much of the time for connecting a TLS handshake may take: who is silent is told apart then.
_HANDSHAKE_SHARE: Final = 0.5
# How others begin who are no Redis, and what is said of them.
_STRANGERS: Final = (
    (b"\x15\x03", "it answers in TLS, for which the URL begins with rediss://"),
    (b"HTTP/", "it answers as an HTTP server: check the port"),
    (b"SSH-", "it answers as an SSH server: check the port"),
)
_NO_TLS: Final = "is this a port without TLS? Then the URL begins with redis://"
SEND_BUFFER_BYTES: Final = 512 * 1024
# Skimmed in one turn of the loop: 10 ms where they are tiny elements, nothing where they are long.
SKIM_BYTES: Final = 32 * 1024
_T = TypeVar("_T")
# The stub of hiredis types the argument as a tuple of one element.
_pack: Final[Callable[[tuple[bytes | str | int, ...]], bytes]] = hiredis.pack_command  # type: ignore[assignment]


def _bound(command: Command) -> int | None:
    """Return how many bytes the reply to a command takes at most, None where nobody can say."""
    name = command[0]
    if name in _SMALL:
        return _SMALL_BYTES
    if name == "HMGET":
        return MARKER_FIELDS_BYTES
    if name == "GETRANGE":
        begin, end = int(command[2]), int(command[3])
        # Below zero they count from the end, wherever that is.
        return None if min(begin, end) < 0 else max(0, end - begin) + _SMALL_BYTES
    return None


def _bound_all(commands: Sequence[Command], limit_bytes: int | None) -> int | None:
    """Return what the replies to a flight may take, ``limit_bytes`` at most."""
    whole = 0
    for command in commands:
        one = _bound(command)
        if one is None:
            return limit_bytes
        whole += one
    return whole if limit_bytes is None else min(whole, limit_bytes)


def pack_arguments(args: Sequence[bytes | str | int]) -> PackedArguments:
    """Return arguments as they go over the wire."""
    packed = _pack(tuple(args))
    return PackedArguments(len(args), packed[packed.index(b"\r\n") + 2 :])


class _Flight:
    """Commands sent together and the replies that have come for them."""

    __slots__ = (
        "declared",
        "elements",
        "errors",
        "future",
        "limit_bytes",
        "received_bytes",
        "replies",
        "wanted",
    )

    def __init__(
        self, wanted: int, future: asyncio.Future[list[Any]], limit_bytes: int | None
    ) -> None:
        self.wanted = wanted
        self.future = future
        self.limit_bytes = limit_bytes
        self.replies: list[Any] = []
        self.received_bytes = 0
        # An upper bound of those that came after the first UNCOUNTED_BYTES.
        self.elements = 0
        self.declared = 0
        # The errors that have come, by what the server said.
        self.errors: dict[str, PeerReplyError] = {}

    def take(self, data: bytes) -> bool:
        """Count what came; False once it is more than was agreed to."""
        limit = self.limit_bytes
        self.received_bytes += len(data)
        if limit is None:
            return True
        if self.received_bytes > UNCOUNTED_BYTES:
            # Contents may hold line ends too, but hardly one in so few bytes.
            self.elements += data.count(b"\n")
        return (
            self.received_bytes <= limit
            and self.elements <= self.wanted + limit // BYTES_PER_ELEMENT
        )


class RedisConnection(asyncio.Protocol):
    """One connection; see the port of the same name for what its calls promise.

    ``secrets`` are taken out of every text of the server, which may quote what it was sent.
    """

    def __init__(self, where: str, clock: Clock, secrets: Secrets = NO_SECRETS) -> None:
        self.where = where
        self._clock = clock
        self._secrets = secrets
        self._reader = self._new_reader()
        self._flights: deque[_Flight] = deque()
        self._transport: asyncio.Transport | None = None
        self._error: ReplicationError | None = None
        self._limit_bytes: int | None = GREETING_BYTES
        self._skim: _Skimmer | None = None
        self._unskimmed = b""
        self._held_back: list[tuple[_Flight, bytes]] = []
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received_bytes = 0
        # What came last, where it may be the beginning of an array's head.
        self._part_of_head = b""

    def _new_reader(self) -> hiredis.Reader:
        return hiredis.Reader(
            protocolError=ProtocolError, replyError=self._error_reply, notEnoughData=_NOTHING
        )

    def _error_reply(self, text: str) -> PeerReplyError:
        """Make an error of one that the server answers; of very many only one object is made."""
        flight = self._flights[0] if self._flights else None
        if flight is None:
            return _ONE_OF_MANY
        # To take secrets out of a text takes milliseconds where it was made for that.
        told = flight.errors.get(text)
        if told is None:
            if len(flight.errors) >= ERRORS_MAX:
                return _ONE_OF_MANY
            told = flight.errors[text] = PeerReplyError(self._secrets.scrub(text))
        return told

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
        # Where others wait behind it, some of this may be theirs.
        alone = len(self._flights) == 1
        within = not alone or flight.take(data)
        try:
            for piece, declared in self._pieces(data):
                self._reader.feed(piece)
                reply = self._reader.gets()
                while within and reply is not _NOTHING:
                    self._deliver(reply)
                    reply = self._reader.gets()
                # Whosever it is: once the parser has made the list it is too late.
                if declared and not self._reader.has_data() and not self._may_declare(declared):
                    self._fail(ReplyTooLargeError(flight.limit_bytes or 0))
                    return
        except ProtocolError as error:
            known = (told for begin, told in _STRANGERS if data.startswith(begin))
            told = next(known, str(error))
            self._fail(ProtocolError(f"{self.where} does not speak the Redis protocol: {told}"))
        except (MemoryError, OverflowError, TypeError, ValueError) as error:
            # An array that no memory holds, a map with an array for a key.
            what = type(error).__name__
            self._fail(ProtocolError(f"{self.where} sent a reply that is none: {what}"))
        else:
            if not alone and self._flights and self._flights[0] is flight:
                within = flight.take(data)
            if not within:
                self._fail(ReplyTooLargeError(flight.limit_bytes or 0))

    def _pieces(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Cut what came before each line that looks like the head of a large array.

        With each piece comes how many parts that line declares, 0 at the end. What may be the beginning
        of a head is kept for the next time; no reply ends with it.
        """
        data = self._part_of_head + data
        part = _PART_OF_HEAD.search(data, max(0, len(data) - _HEAD_BYTES))
        if part is None:
            self._part_of_head = b""
        else:
            begin = part.start() + (2 if part[0].startswith(b"\r\n") else 0)
            self._part_of_head, data = data[begin:], data[:begin]
        at, shift = 0, 2
        if data.startswith(_ARRAYS):
            # Perhaps a reply begins here; before one there is the end of another.
            lines, shift = b"\r\n" + data, 0
        else:
            lines = data
        for head in _HEAD.finditer(lines):
            begin = head.start() + shift
            yield data[at:begin], int(head[1][:20])
            at = begin
        yield data[at:] if at else data, 0

    def _may_declare(self, parts: int) -> bool:
        flight = self._flights[0] if self._flights else None
        if flight is None or flight.limit_bytes is None:
            return True
        flight.declared += parts
        return flight.declared <= DECLARED_MAX

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
        data = self._unskimmed + data
        self._unskimmed = data[SKIM_BYTES:]
        try:
            done = skim.feed(data[:SKIM_BYTES])
        except ProtocolError as error:
            self._fail(error)
            return
        if not done and self._unskimmed:
            assert self._transport is not None
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._skim_on)
        elif done and self._unskimmed:
            self._fail(ProtocolError(f"{self.where} sent data that nobody asked for"))
        elif done:
            self._skim = None
            assert self._transport is not None
            for flight, packed in self._held_back:
                self._flights.append(flight)
                self._transport.write(packed)
            self._held_back.clear()

    def _skim_on(self) -> None:
        """Skim the next piece of what has come."""
        if self._transport is None or self._error is not None:
            return
        self._transport.resume_reading()
        if self._skim is not None:
            self._feed_skimmer(self._skim, b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail whoever waits."""
        told = f"{self.where} closed the connection{_because(exc)}"
        if not self._received_bytes and self.where.startswith("redis://"):
            told += " (before it answered anything: if it is a port with TLS, the URL begins with"
            told += " rediss://)"
        self._fail(ConnectionLostError(told))
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
        # It refers to this connection, and would keep half a reply until the collector comes round.
        self._reader = hiredis.Reader()
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

    def limit_reply(self, limit_bytes: int | None) -> None:
        """Drop the connection when a later flight's replies exceed this many bytes (None: never)."""
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
            _Flight(len(commands), future, _bound_all(commands, self._limit_bytes)),
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
        """Wait as long as bytes keep coming, and not just a few of them."""
        received, least = self._received_bytes, 1
        try:
            while not future.done():
                try:
                    async with self._clock.timeout(timeout_sec):
                        await asyncio.wait((future,))
                except TimeoutError:
                    assert timeout_sec is not None
                    before, received = received, self._received_bytes
                    if received - before < least:
                        error = too_slow(self.where, received - before, timeout_sec)
                        self._fail(error)
                        raise error from None
                    least = int(timeout_sec * LEAST_BYTES_PER_SEC)
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
    first 256 elements, all in one. Of the whole reply some 4,000 elements are kept, and arrays stand
    at most 8 deep in each other.
    """

    KEPT_BYTES: Final = 256
    KEPT_ELEMENTS: Final = 256
    KEPT_IN_ALL: Final = 4096
    DEPTH_MAX: Final = 8
    ELEMENTS_MAX: Final = 10_000_000
    LINE_BYTES_MAX: Final = 4096
    NUMBER_BYTES_MAX: Final = 20

    def __init__(self, future: asyncio.Future[Any], secrets: Secrets) -> None:
        self.future = future
        self._secrets = secrets
        self._line = b""
        self._skip = 0
        self._size = 0
        self._kept: bytearray | None = None
        self._elements = 0
        self._kept_elements = 0
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
            until = min(len(data) if end < 0 else end, at + self.LINE_BYTES_MAX + 1)
            self._line += data[at:until]
            if len(self._line) > self.LINE_BYTES_MAX:
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
        if kind in (b"$", b"*", b":") and not (
            len(rest) <= self.NUMBER_BYTES_MAX and rest.removeprefix(b"-").isdigit()
        ):
            raise ProtocolError("a length that is no number")
        if kind == b"$" and int(rest) >= 0:
            self._size = int(rest)
            self._skip = self._size + 2
            self._kept = bytearray() if self._size <= self.KEPT_BYTES else None
        elif kind == b"*" and int(rest) > 0:
            if int(rest) > self.ELEMENTS_MAX:
                raise ProtocolError("a reply has too many elements")
            if len(self._open) == self.DEPTH_MAX:
                raise ProtocolError("the arrays of a reply are nested too deeply")
            self._open.append(([], int(rest)))
        elif kind == b"*":
            self._put([] if rest == b"0" else None)
        elif kind == b"$":
            self._put(None)
        elif kind == b":":
            self._put(int(rest))
        elif kind == b"+":
            self._put(rest if len(rest) <= self.KEPT_BYTES else Oversize(len(rest)))
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
            if not array or (
                len(array) < self.KEPT_ELEMENTS and self._kept_elements < self.KEPT_IN_ALL
            ):
                self._kept_elements += 1
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
        options["handshake_sec"] = _HANDSHAKE_SHARE * timeout_sec
        if not options.get("host") and not options.get("path"):
            raise PeerRefusedError(f"{where} cannot be used: it names no host")
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
            if options.get("connection_class") is SSLConnection and _is_no_tls(error):
                raise ConnectionLostError(f"{where} does not answer in TLS: {_NO_TLS}") from None
            if isinstance(error, ssl.SSLError | OSError):
                raise ConnectionLostError(f"{where} cannot be reached: {error}") from None
            raise
        # What may come from now on is for the caller to say.
        connection.limit_reply(None)
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
        patience = options["handshake_sec"] if context is not None else None
        _, connection = await loop.create_connection(
            factory, host, port, ssl=context, ssl_handshake_timeout=patience
        )
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
                wanted = b"PONG" if command[0] == "PING" else b"OK"
                status(reply, f"{connection.where}: {command[0]!s}", wanted)
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


def too_slow(where: str, received_bytes: int, within_sec: float) -> ConnectionLostError:
    """Return the error for a peer that did not answer, or whose answer just drips."""
    if not received_bytes:
        return ConnectionLostError(f"{where} gave no answer within {within_sec:g} s")
    return ConnectionLostError(
        f"{where} answers too slowly: {received_bytes} bytes within {within_sec:g} s, at least"
        f" {LEAST_BYTES_PER_SEC} a second are expected"
    )


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


def _is_no_tls(error: BaseException) -> bool:
    """Say whether a handshake failed as it does with a server that speaks no TLS.

    Redis waits for the end of a line and says nothing, which asyncio tells as an aborted connection;
    others close it, or answer in their own way.
    """
    ended = ConnectionAbortedError | ConnectionResetError | ssl.SSLEOFError
    if isinstance(error, ended):
        return True
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return reason in ("WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE")


def _no_passphrase() -> str:
    """Keep the TLS library from asking for one at the terminal."""
    raise ValueError("the private key is encrypted; a key without a passphrase is needed")


def _because(error: Exception | None) -> str:
    return f": {error}" if error is not None else ""
