"""A Redis in a dictionary: in process, synchronous, and the same on every run.

It speaks the dialect that is given to it: Redis 7.0 if nothing is. It knows the commands that nodes send to their peers, and those that tests write with; anything else
is an unknown command, as it would be to a real server. Time is a function given to it. What it
does not have: databases but 0, scripts, persistence, memory limits, encodings and their orders
(hashes and sets keep the order of insertion).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from fsm_replication.errors import PeerReplyError
from fsm_replication.testing.sim_dialects import REDIS_7_0, Dialect
from fsm_replication.testing.sim_streams import Stream, Wait
from fsm_replication.testing.sim_values import (
    COMMANDS,
    NOT_INTEGER,
    OK,
    OVERFLOW,
    SYNTAX,
    Keyspace,
    Status,
    String,
    command,
    glob,
    integer,
    wrong_arity,
)

__all__ = ("Session", "SimRedis", "SimState")

STRING_MAX: Final = 512 * 1024 * 1024
INTEGER_MAX: Final = 2**63 - 1
PARENTS: Final = (b"XINFO", b"CLIENT")
AT_ONCE: Final = ("MULTI", "EXEC", "DISCARD")

_Bound = Callable[[list[bytes]], Any]


class SimState:
    """Everything a :class:`SimRedis` held at one moment."""

    __slots__ = ("_db",)

    def __init__(self, db: Keyspace) -> None:
        self._db = db.copy()

    def put_into(self, db: Keyspace) -> None:
        """Make ``db`` hold this."""
        db.take(self._db)


class SimRedis:
    """One server. ``now_ms`` is its time of day; with ``password`` sessions must give it first.

    ``dialect`` says which kind and version of server it is like.

    Replies are what hiredis makes of RESP2: bytes, int, None, lists; an error reply is returned as
    a PeerReplyError object.
    """

    def __init__(
        self,
        *,
        now_ms: Callable[[], int],
        password: str | None = None,
        dialect: Dialect = REDIS_7_0,
    ) -> None:
        self.dialect = dialect
        self.db = Keyspace(now_ms, dialect)
        self.password = password
        self._waits: list[Wait] = []
        self._own = Session(self, trusted=True)

    def session(self) -> Session:
        """Return what one connection is to the server: transactions and credentials."""
        return Session(self)

    def execute(self, *args: bytes | str | float) -> Any:
        """Run one command; nothing blocks: a read that would is answered with None."""
        return self._own.execute(*args)

    def dump(self) -> SimState:
        """Return all keys as they are now."""
        return SimState(self.db)

    def load(self, state: SimState) -> None:
        """Hold what was held when ``state`` was taken: a server that was started again from it.

        Who waits for entries goes on waiting; a real server would have lost its connections too.
        """
        state.put_into(self.db)
        self.db.runs += 1

    def replicate(self, state: SimState) -> None:
        """Hold what another server holds, as after REPLICAOF and REPLICAOF NO ONE, in the same run."""
        state.put_into(self.db)
        self.db.histories += 1

    def flush(self) -> None:
        """Remove all keys."""
        self.db.clear()

    # Reads that block

    def wait(self, wait: Wait) -> None:
        """Answer a read as soon as there is something, by calling ``wait.wake`` once."""
        self._waits.append(wait)

    def forget(self, wait: Wait) -> None:
        """Answer a read no more."""
        if wait in self._waits:
            self._waits.remove(wait)

    def serve(self) -> None:
        """Answer the reads whose streams have got entries, in the order in which they came."""
        while self.db.ready:
            key = self.db.ready.pop(0)
            for wait in [wait for wait in self._waits if wait.waits_for(key)]:
                reply = wait.answer(self.db, key)
                if reply is not None:
                    self._waits.remove(wait)
                    wait.wake(reply)


class Session:
    """One connection's side of the server."""

    def __init__(self, server: SimRedis, *, trusted: bool = False) -> None:
        self.name = b""
        self._server = server
        self._trusted = trusted
        self._queue: list[tuple[_Bound, list[bytes]]] | None = None
        self._spoilt = False
        # Name: arity and function, as in the table of commands that need no session.
        self._table: dict[bytes, tuple[int, _Bound]] = {
            b"MULTI": (1, self._multi),
            b"EXEC": (1, self._exec),
            b"DISCARD": (1, self._discard),
            b"AUTH": (-2, self._auth),
            b"SELECT": (2, _select),
            b"CLIENT|SETNAME": (3, self._set_name),
        }
        if not server.dialect.subcommands_in_table:
            self._table |= {name: (-2, partial(self._subcommand, name)) for name in PARENTS}

    def execute(self, *args: bytes | str | float, wake: Callable[[Any], None] | None = None) -> Any:
        """Run one command and return its reply.

        A read that blocks returns a :class:`Wait` where ``wake`` is given: the reply goes there,
        unless ``server.forget`` comes first. Without ``wake`` it is answered with None.
        """
        argv = [arg if isinstance(arg, bytes) else str(arg).encode() for arg in args]
        reply = _attempt(self._run, argv)
        if isinstance(reply, Wait):
            if wake is None:
                return None
            reply.wake = wake
            self._server.wait(reply)
        self._server.serve()
        return reply

    def _run(self, argv: list[bytes]) -> Any:
        try:
            name, run, args = self._resolve(argv)
        except PeerReplyError as error:
            self._spoilt = True
            if argv[0].upper() == b"EXEC":
                self._queue = None
                raise PeerReplyError(
                    f"EXECABORT Transaction discarded because of: {error}"
                ) from None
            raise
        if self._queue is not None and name.decode() not in AT_ONCE:
            self._queue.append((run, args))
            return Status(b"QUEUED")
        return run(args)

    def _resolve(self, argv: list[bytes]) -> tuple[bytes, _Bound, list[bytes]]:
        name, args = argv[0].upper(), argv[1:]
        if name in PARENTS and name not in self._table:
            if not args:
                raise wrong_arity(name.decode())
            name, args = name + b"|" + args[0].upper(), args[1:]
        run = self._look_up(name, argv)
        if self._server.password is not None and not self._trusted and name != b"AUTH":
            raise PeerReplyError("NOAUTH Authentication required.")
        return name, run, args

    def _look_up(self, name: bytes, argv: list[bytes]) -> _Bound:
        run: _Bound
        if name in self._table:
            arity, run = self._table[name]
        elif name in COMMANDS:
            found = COMMANDS[name]
            arity, run = found.arity, partial(found.run, self._server.db)
        elif b"|" in name:
            raise PeerReplyError(f"ERR unknown subcommand '{argv[1].decode('utf-8', 'replace')}'.")
        else:
            raise PeerReplyError(f"ERR unknown command '{argv[0].decode('utf-8', 'replace')}'")
        if len(argv) < -arity or (arity > 0 and len(argv) != arity):
            raise wrong_arity(name.decode())
        return run

    def _subcommand(self, parent: bytes, args: list[bytes]) -> Any:
        """Run what a table without subcommands knows by the parent's name alone."""
        if parent == b"XINFO" and len(args) > 1 and self._server.db.get(args[1], Stream) is None:
            raise PeerReplyError("ERR no such key")
        run = self._look_up(parent + b"|" + args[0].upper(), [parent, *args])
        return run(args[1:])

    def _multi(self, _: list[bytes]) -> bytes:
        if self._queue is not None:
            self._spoilt |= self._server.dialect.nested_multi_spoils
            raise PeerReplyError("ERR MULTI calls can not be nested")
        self._queue, self._spoilt = [], False
        return OK

    def _exec(self, _: list[bytes]) -> list[Any]:
        if self._queue is None:
            raise PeerReplyError("ERR EXEC without MULTI")
        queue, self._queue = self._queue, None
        if self._spoilt:
            raise PeerReplyError("EXECABORT Transaction discarded because of previous errors.")
        replies = [_attempt(run, args) for run, args in queue]
        return [None if isinstance(reply, Wait) else reply for reply in replies]

    def _discard(self, _: list[bytes]) -> bytes:
        if self._queue is None:
            raise PeerReplyError("ERR DISCARD without MULTI")
        self._queue = None
        return OK

    def _auth(self, args: list[bytes]) -> bytes:
        if len(args) > 2:
            raise PeerReplyError(SYNTAX)
        password = self._server.password
        if password is None and len(args) == 1:
            raise PeerReplyError(
                "ERR AUTH <password> called without any password configured for the default user."
            )
        user = args[0] if len(args) == 2 else b"default"
        if user != b"default" or (password is not None and args[-1] != password.encode()):
            raise PeerReplyError("WRONGPASS invalid username-password pair or user is disabled.")
        self._trusted = True
        return OK

    def _set_name(self, args: list[bytes]) -> bytes:
        if any(not 33 <= byte <= 126 for byte in args[0]):
            raise PeerReplyError(
                "ERR Client names cannot contain spaces, newlines or special characters."
            )
        self.name = args[0]
        return OK


def _attempt(run: _Bound, args: list[bytes]) -> Any:
    try:
        return run(args)
    except PeerReplyError as error:
        # A fresh one holds no traceback, and with it no frames.
        return PeerReplyError(str(error))


def _select(args: list[bytes]) -> bytes:
    if integer(args[0], "ERR invalid DB index"):
        raise PeerReplyError("ERR DB index is out of range")
    return OK


# The server -------------------------------------------------------------------------------------


@command("PING", -1)
def _ping(_: Keyspace, args: list[bytes]) -> bytes:
    if len(args) > 1:
        raise wrong_arity("ping")
    return args[0] if args else Status(b"PONG")


@command("ECHO", 2)
def _echo(_: Keyspace, args: list[bytes]) -> bytes:
    return args[0]


@command("INFO", -1)
def _info(db: Keyspace, args: list[bytes]) -> bytes:
    wanted = {name.lower() for name in args} or {b"default"}
    told = ""
    if wanted & {b"server", b"default", b"all"}:
        told += f"# Server\r\n{db.dialect.info}redis_mode:standalone\r\nrun_id:{db.runs:040x}\r\n"
    if wanted & {b"replication", b"default", b"all"}:
        history = f"{db.runs:020x}{db.histories:020x}"
        told += f"# Replication\r\nrole:master\r\nmaster_replid:{history}\r\n"
    return told.encode()


@command("TIME", 1)
def _time(db: Keyspace, _: list[bytes]) -> list[bytes]:
    seconds, ms = divmod(db.now_ms(), 1000)
    return [b"%d" % seconds, b"%d" % (ms * 1000)]


@command("FLUSHALL", -1)
def _flushall(db: Keyspace, args: list[bytes]) -> bytes:
    if args and [name.upper() for name in args] not in ([b"SYNC"], [b"ASYNC"]):
        raise PeerReplyError(SYNTAX)
    db.clear()
    return OK


# Keys -------------------------------------------------------------------------------------------


@command("EXISTS", -2)
def _exists(db: Keyspace, args: list[bytes]) -> int:
    return sum(db.find(key) is not None for key in args)


@command("UNLINK", -2)
@command("DEL", -2)
def _del(db: Keyspace, args: list[bytes]) -> int:
    count = 0
    for key in args:
        if db.find(key) is not None:
            db.drop(key)
            count += 1
    return count


@command("TYPE", 2)
def _type(db: Keyspace, args: list[bytes]) -> bytes:
    found = db.find(args[0])
    return Status(b"none" if found is None else found.kind)


@command("PTTL", 2)
def _pttl(db: Keyspace, args: list[bytes]) -> int:
    if db.find(args[0]) is None:
        return -2
    expiry = db.expiry(args[0])
    return -1 if expiry is None else max(0, expiry - db.now_ms())


@command("SCAN", -2)
def _scan(db: Keyspace, args: list[bytes]) -> list[Any]:
    # Keys come by a hash of theirs and a cursor is such a hash, so a key that is there all the
    # time is found whatever else comes and goes.
    if not args[0].isdigit() or int(args[0]) >= 2**64:
        raise PeerReplyError("ERR invalid cursor")
    rest, count, match = args[1:], 10, None
    while rest:
        option = rest.pop(0).upper()
        if option == b"COUNT" and rest:
            count = integer(rest.pop(0))
            if count < 1:
                raise PeerReplyError(SYNTAX)
        elif option == b"MATCH" and rest:
            match = glob(rest.pop(0))
        else:
            raise PeerReplyError(SYNTAX)
    begin = int(args[0])
    hashed = sorted((place, key) for key in db.names() if (place := zlib.crc32(key) + 1) >= begin)
    end = min(count, len(hashed))
    while 0 < end < len(hashed) and hashed[end][0] == hashed[end - 1][0]:
        end += 1
    found = [key for _, key in hashed[:end] if match is None or match.fullmatch(key)]
    return [b"%d" % hashed[end][0] if end < len(hashed) else b"0", found]


# Strings ----------------------------------------------------------------------------------------


@command("GET", 2)
def _get(db: Keyspace, args: list[bytes]) -> bytes | None:
    found = db.get(args[0], String)
    return None if found is None else found.data


@command("MGET", -2)
def _mget(db: Keyspace, args: list[bytes]) -> list[bytes | None]:
    found = (db.find(key) for key in args)
    return [held.data if isinstance(held, String) else None for held in found]


@command("SET", -3)
def _set(db: Keyspace, args: list[bytes]) -> bytes | None:
    key, data, *rest = args
    flags: set[bytes] = set()
    unit, raw = b"", b""
    while rest:
        option = rest.pop(0).upper()
        if option in (b"NX", b"XX") and not flags:
            flags.add(option)
        elif option in (b"EX", b"PX", b"PXAT") and rest and not unit:
            unit, raw = option, rest.pop(0)
        elif option not in flags:
            raise PeerReplyError(SYNTAX)
    expiry = _expiry(unit, raw, db.now_ms()) if unit else None
    held = db.find(key) is not None
    if (b"NX" in flags and held) or (b"XX" in flags and not held):
        return None
    db.put(key, String(data), expiry)
    return OK


def _expiry(unit: bytes, raw: bytes, now_ms: int) -> int:
    value = integer(raw)
    expiry = value * 1000 if unit == b"EX" else value
    if unit != b"PXAT":
        expiry += now_ms
    if value <= 0 or expiry > INTEGER_MAX:
        raise PeerReplyError("ERR invalid expire time in 'set' command")
    return expiry


@command("STRLEN", 2)
def _strlen(db: Keyspace, args: list[bytes]) -> int:
    found = db.get(args[0], String)
    return 0 if found is None else len(found.data)


@command("GETRANGE", 4)
def _getrange(db: Keyspace, args: list[bytes]) -> bytes:
    key, *bounds = args
    start, end = (integer(raw) for raw in bounds)
    found = db.get(key, String)
    if found is None or (start < 0 and end < 0 and start > end):
        return b""
    size = len(found.data)
    start, end = (max(0, bound + size if bound < 0 else bound) for bound in (start, end))
    return found.data[start : end + 1]


@command("SETRANGE", 4)
def _setrange(db: Keyspace, args: list[bytes]) -> int:
    key, raw, part = args
    offset = integer(raw)
    if offset < 0:
        raise PeerReplyError("ERR offset is out of range")
    found = db.get(key, String)
    if not part:
        return 0 if found is None else len(found.data)
    if offset + len(part) > STRING_MAX:
        raise PeerReplyError("ERR string exceeds maximum allowed size (proto-max-bulk-len)")
    held = db.make(key, String)
    held.data = held.data[:offset].ljust(offset, b"\0") + part + held.data[offset + len(part) :]
    return len(held.data)


@command("INCRBY", 3)
def _incrby(db: Keyspace, args: list[bytes]) -> int:
    key, raw = args
    step = integer(raw)
    found = db.get(key, String)
    value = integer(found.data if found is not None else b"0", NOT_INTEGER) + step
    if not -INTEGER_MAX - 1 <= value <= INTEGER_MAX:
        raise PeerReplyError(OVERFLOW)
    db.make(key, String).data = b"%d" % value
    return value
