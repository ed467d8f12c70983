"""Keys, values and arguments of the simulated Redis, and its hashes, sets and sorted sets.

A command is a function of the keyspace and the arguments after its name; it returns the reply, or
raises PeerReplyError for an error reply. Orders of checks are those of Redis 7.0, because the first
thing that is wrong decides which error is answered; where other servers differ is said by the
keyspace's ``dialect``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Final, Protocol, TypeVar

from fsm_replication.errors import PeerReplyError
from fsm_replication.testing.sim_dialects import REDIS_7_0, Dialect

__all__ = (
    "COMMANDS",
    "NOT_INTEGER",
    "OK",
    "OVERFLOW",
    "SYNTAX",
    "Command",
    "Hash",
    "Keyspace",
    "Members",
    "Sorted",
    "Status",
    "String",
    "Value",
    "command",
    "glob",
    "integer",
    "wrong_arity",
)

NOT_INTEGER: Final = "ERR value is not an integer or out of range"
SYNTAX: Final = "ERR syntax error"
OVERFLOW: Final = "ERR increment or decrement would overflow"
WRONG_TYPE: Final = "WRONGTYPE Operation against a key holding the wrong kind of value"
INTEGER_MAX: Final = 2**63 - 1
_INTEGER: Final = re.compile(rb"0|-?[1-9][0-9]*")
_DECIMAL: Final = re.compile(
    rb"[+-]?(?:inf|infinity|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)", re.IGNORECASE
)


class Status(bytes):
    """A reply that is sent as a status line; otherwise like any string."""

    __slots__ = ()


OK: Final = Status(b"OK")


# Values ---------------------------------------------------------------------------------------


class Value(Protocol):
    """What a key holds."""

    kind: ClassVar[bytes]

    def copy(self) -> Any:
        """Return a value that changes on its own."""

    def is_gone(self) -> bool:
        """Whether the key goes when it holds this."""


_V = TypeVar("_V", bound=Value)


@dataclass(slots=True)
class String:
    """A string."""

    kind: ClassVar[bytes] = b"string"
    data: bytes = b""

    def copy(self) -> String:
        """Return a value that changes on its own."""
        return String(self.data)

    def is_gone(self) -> bool:
        """Return False: empty strings stay."""
        return False


class _Container:
    """A value that goes with its last element; insertion order, so that runs are alike."""

    __slots__ = ("held",)
    kind: ClassVar[bytes]

    def __init__(self, held: dict[bytes, Any] | None = None) -> None:
        self.held: dict[bytes, Any] = {} if held is None else held

    def copy(self) -> Any:
        """Return a value that changes on its own."""
        return type(self)(dict(self.held))

    def is_gone(self) -> bool:
        """Whether nothing is left in it."""
        return not self.held


class Hash(_Container):
    """Fields and their strings."""

    __slots__ = ()
    kind = b"hash"


class Members(_Container):
    """A set."""

    __slots__ = ()
    kind = b"set"


class Sorted(_Container):
    """Members and their scores."""

    __slots__ = ()
    kind = b"zset"

    def in_order(self) -> list[tuple[bytes, float]]:
        """Return the members by score, then by bytes."""
        return sorted(self.held.items(), key=lambda pair: (pair[1], pair[0]))


# The keyspace -----------------------------------------------------------------------------------


class Keyspace:
    """Keys with their values and times of expiry; ``ready`` names streams that got an entry.

    ``runs`` counts how often the server was started again, ``histories`` how often it took the data
    of another in one run.
    """

    def __init__(self, now_ms: Callable[[], int], dialect: Dialect = REDIS_7_0) -> None:
        self.now_ms = now_ms
        self.dialect = dialect
        self.ready: list[bytes] = []
        self.runs = 0
        self.histories = 0
        self._values: dict[bytes, Value] = {}
        self._expiries: dict[bytes, int] = {}

    def find(self, key: bytes) -> Value | None:
        """Return what is at a key; what has expired goes now."""
        expiry = self._expiries.get(key)
        if expiry is not None and self.now_ms() > expiry:
            self.drop(key)
        return self._values.get(key)

    def get(self, key: bytes, kind: type[_V]) -> _V | None:
        """Return what is at a key, which must be of a kind.

        :raises PeerReplyError: if it is of another.
        """
        found = self.find(key)
        if found is not None and not isinstance(found, kind):
            raise PeerReplyError(WRONG_TYPE)
        return found

    def make(self, key: bytes, kind: type[_V]) -> _V:
        """Return what is at a key, made if there is nothing."""
        found = self.get(key, kind)
        if found is None:
            found = self._values[key] = kind()
        return found

    def put(self, key: bytes, value: Value, expiry: int | None) -> None:
        """Replace what is at a key, and when it expires."""
        self._values[key] = value
        if expiry is None:
            self._expiries.pop(key, None)
        else:
            self._expiries[key] = expiry

    def expiry(self, key: bytes) -> int | None:
        """Return when a key expires, in ms since the epoch."""
        return self._expiries.get(key)

    def drop(self, key: bytes) -> None:
        """Remove a key."""
        self._values.pop(key, None)
        self._expiries.pop(key, None)

    def tidy(self, key: bytes) -> None:
        """Remove a key that holds nothing any more."""
        found = self._values.get(key)
        if found is not None and found.is_gone():
            self.drop(key)

    def names(self) -> Iterator[bytes]:
        """Yield the keys that have not expired."""
        return (key for key in list(self._values) if self.find(key) is not None)

    def clear(self) -> None:
        """Remove everything."""
        self._values.clear()
        self._expiries.clear()

    def copy(self) -> Keyspace:
        """Return the same keys with values that change on their own."""
        twin = Keyspace(self.now_ms, self.dialect)
        twin.take(self)
        return twin

    def take(self, other: Keyspace) -> None:
        """Hold what another holds, and nothing else."""
        self._values = {key: value.copy() for key, value in other._values.items()}
        self._expiries = dict(other._expiries)
        self.ready.clear()


# The table of commands --------------------------------------------------------------------------

Run = Callable[[Keyspace, list[bytes]], Any]


@dataclass(frozen=True, slots=True)
class Command:
    """One command; ``arity`` as Redis states it: with the name, negative for "at least"."""

    name: str
    arity: int
    run: Run


COMMANDS: Final[dict[bytes, Command]] = {}


def command(name: str, arity: int) -> Callable[[Run], Run]:
    """Enter a function into the table; a subcommand's name is "PARENT|CHILD"."""

    def enter(run: Run) -> Run:
        COMMANDS[name.encode()] = Command(name, arity, run)
        return run

    return enter


def wrong_arity(name: str) -> PeerReplyError:
    """Return the error for too few or too many arguments."""
    return PeerReplyError(f"ERR wrong number of arguments for '{name.lower()}' command")


# Arguments --------------------------------------------------------------------------------------


def integer(raw: bytes, message: str = NOT_INTEGER) -> int:
    """Parse a signed 64-bit number, as strictly as Redis does.

    :raises PeerReplyError: with ``message`` if it is none.
    """
    if _INTEGER.fullmatch(raw):
        value = int(raw)
        if -INTEGER_MAX - 1 <= value <= INTEGER_MAX:
            return value
    raise PeerReplyError(message)


def _bound(raw: bytes) -> float:
    if not _DECIMAL.fullmatch(raw):
        raise PeerReplyError("ERR min or max is not a float")
    return float(raw)


def _given_score(raw: bytes) -> float:
    if _DECIMAL.fullmatch(raw):
        value = float(raw)
        if not math.isinf(value) or b"i" in raw.lower():
            return value
    raise PeerReplyError("ERR value is not a valid float")


def _score(value: float, dialect: Dialect) -> bytes:
    if not dialect.short_scores or math.isinf(value):
        return format(value, ".17g").encode()
    if abs(value) <= INTEGER_MAX // 2 and value.is_integer():
        return b"%d" % int(value)
    return _short(value).encode()


def _short(value: float) -> str:
    # What grisu2 writes, as servers have it, but for the few numbers of which it finds one digit
    # more than are needed.
    sign, parts, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int), "neither infinite nor no number"
    digits, minus = "".join(map(str, parts)), "-" if sign else ""
    power = exponent + len(digits) - 1
    if exponent >= 0 and abs(power) < len(digits) + 7:
        return minus + digits + "0" * exponent
    if exponent < 0 and (exponent > -7 or abs(power) < 4):
        digits = digits.rjust(1 - exponent, "0")
        return f"{minus}{digits[:exponent]}.{digits[exponent:]}"
    digits = digits[: 18 - sign]
    rest = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{minus}{digits[0]}{rest}e{power:+d}"


def glob(pattern: bytes) -> re.Pattern[bytes]:
    """Translate a pattern of Redis: ``* ? [a-c] [^a]`` and a backslash before any of them."""
    out, at = b"", 0
    while at < len(pattern):
        char = pattern[at : at + 1]
        at += 1
        if char == b"*":
            out += b".*"
        elif char == b"?":
            out += b"."
        elif char == b"[":
            chosen, at = _glob_class(pattern, at)
            out += chosen
        else:
            if char == b"\\" and at < len(pattern):
                char = pattern[at : at + 1]
                at += 1
            out += re.escape(char)
    return re.compile(out, re.DOTALL)


def _glob_class(pattern: bytes, at: int) -> tuple[bytes, int]:
    negated = pattern[at : at + 1] == b"^"
    at += negated
    chosen = b""
    while at < len(pattern) and pattern[at : at + 1] != b"]":
        if pattern[at : at + 1] == b"\\" and at + 1 < len(pattern):
            at += 1
            low = high = pattern[at]
        elif pattern[at + 1 : at + 2] == b"-" and at + 2 < len(pattern):
            low, high = sorted((pattern[at], pattern[at + 2]))
            at += 2
        else:
            low = high = pattern[at]
        chosen += re.escape(bytes([low])) + b"-" + re.escape(bytes([high]))
        at += 1
    if not chosen:
        return (b"." if negated else b"(?!)"), at + 1
    return b"[" + (b"^" if negated else b"") + chosen + b"]", at + 1


# Hashes -------------------------------------------------------------------------------------------


@command("HSET", -4)
def _hset(db: Keyspace, args: list[bytes]) -> int:
    key, *pairs = args
    if len(pairs) % 2:
        raise wrong_arity("hset")
    held = db.make(key, Hash).held
    before = len(held)
    held.update(zip(pairs[::2], pairs[1::2], strict=True))
    return len(held) - before


@command("HSETNX", 4)
def _hsetnx(db: Keyspace, args: list[bytes]) -> int:
    key, name, value = args
    held = db.make(key, Hash).held
    if name in held:
        return 0
    held[name] = value
    return 1


@command("HGET", 3)
def _hget(db: Keyspace, args: list[bytes]) -> bytes | None:
    found = db.get(args[0], Hash)
    return None if found is None else found.held.get(args[1])


@command("HMGET", -3)
def _hmget(db: Keyspace, args: list[bytes]) -> list[bytes | None]:
    found = db.get(args[0], Hash) or Hash()
    return [found.held.get(name) for name in args[1:]]


@command("HGETALL", 2)
def _hgetall(db: Keyspace, args: list[bytes]) -> list[bytes]:
    found = db.get(args[0], Hash) or Hash()
    return [part for pair in found.held.items() for part in pair]


@command("HLEN", 2)
def _hlen(db: Keyspace, args: list[bytes]) -> int:
    return len((db.get(args[0], Hash) or Hash()).held)


@command("HINCRBY", 4)
def _hincrby(db: Keyspace, args: list[bytes]) -> int:
    key, name, raw = args
    step = integer(raw)
    found = db.get(key, Hash) or Hash()
    value = integer(found.held.get(name, b"0"), "ERR hash value is not an integer") + step
    if not -INTEGER_MAX - 1 <= value <= INTEGER_MAX:
        raise PeerReplyError(OVERFLOW)
    db.make(key, Hash).held[name] = b"%d" % value
    return value


# Sets ---------------------------------------------------------------------------------------------


@command("SADD", -3)
def _sadd(db: Keyspace, args: list[bytes]) -> int:
    held = db.make(args[0], Members).held
    before = len(held)
    held.update(dict.fromkeys(args[1:]))
    return len(held) - before


@command("SMEMBERS", 2)
def _smembers(db: Keyspace, args: list[bytes]) -> list[bytes]:
    return list((db.get(args[0], Members) or Members()).held)


def _remove(db: Keyspace, args: list[bytes], kind: type[_Container]) -> int:
    found = db.get(args[0], kind)
    if found is None:
        return 0
    before = len(found.held)
    for name in args[1:]:
        found.held.pop(name, None)
    db.tidy(args[0])
    return before - len(found.held)


@command("HDEL", -3)
def _hdel(db: Keyspace, args: list[bytes]) -> int:
    return _remove(db, args, Hash)


@command("SREM", -3)
def _srem(db: Keyspace, args: list[bytes]) -> int:
    return _remove(db, args, Members)


@command("ZREM", -3)
def _zrem(db: Keyspace, args: list[bytes]) -> int:
    return _remove(db, args, Sorted)


# Sorted sets --------------------------------------------------------------------------------------


@command("ZADD", -4)
def _zadd(db: Keyspace, args: list[bytes]) -> int:
    key, *rest = args
    options: set[bytes] = set()
    while rest and rest[0].upper() in (b"NX", b"XX", b"CH"):
        options.add(rest.pop(0).upper())
    if not rest or len(rest) % 2:
        raise PeerReplyError(SYNTAX)
    if {b"NX", b"XX"} <= options:
        raise PeerReplyError("ERR XX and NX options at the same time are not compatible")
    # Adding 0 makes 0 of -0.
    zero = -0.0 if db.dialect.minus_zero else 0.0
    scores = [_given_score(raw) + zero for raw in rest[::2]]
    if db.get(key, Sorted) is None and b"XX" in options:
        return 0
    held = db.make(key, Sorted).held
    added = changed = 0
    for member, score in zip(rest[1::2], scores, strict=True):
        if member not in held:
            if b"XX" not in options:
                held[member] = score
                added += 1
        elif b"NX" not in options and held[member] != score:
            held[member] = score
            changed += 1
    return added + (changed if b"CH" in options else 0)


@command("ZSCORE", 3)
def _zscore(db: Keyspace, args: list[bytes]) -> bytes | None:
    found = db.get(args[0], Sorted)
    score = None if found is None else found.held.get(args[1])
    return None if score is None else _score(score, db.dialect)


@command("ZCARD", 2)
def _zcard(db: Keyspace, args: list[bytes]) -> int:
    return len((db.get(args[0], Sorted) or Sorted()).held)


def _listed(db: Keyspace, pairs: Sequence[tuple[bytes, float]], with_scores: bool) -> list[bytes]:
    if with_scores:
        return [part for member, score in pairs for part in (member, _score(score, db.dialect))]
    return [member for member, _ in pairs]


@command("ZRANGE", -4)
def _zrange(db: Keyspace, args: list[bytes]) -> list[bytes]:
    key, *bounds = args[:3]
    if any(option.upper() != b"WITHSCORES" for option in args[3:]):
        raise PeerReplyError(SYNTAX)
    start, stop = (integer(raw) for raw in bounds)
    pairs = (db.get(key, Sorted) or Sorted()).in_order()
    start = max(0, start + len(pairs) if start < 0 else start)
    stop = stop + len(pairs) if stop < 0 else stop
    return _listed(db, pairs[start : max(0, stop + 1)], with_scores=len(args) > 3)


@command("ZRANGEBYSCORE", -4)
def _zrangebyscore(db: Keyspace, args: list[bytes]) -> list[bytes]:
    key, *bounds = args[:3]
    with_scores, offset, count, rest = False, 0, -1, args[3:]
    while rest:
        option = rest.pop(0).upper()
        if option == b"WITHSCORES":
            with_scores = True
        elif option == b"LIMIT" and len(rest) >= 2:
            offset, count = integer(rest.pop(0)), integer(rest.pop(0))
        else:
            raise PeerReplyError(SYNTAX)
    low, high = ((_bound(raw.removeprefix(b"(")), raw[:1] == b"(") for raw in bounds)
    pairs = [
        pair
        for pair in (db.get(key, Sorted) or Sorted()).in_order()
        if (low[0] < pair[1] or (low[0] == pair[1] and not low[1]))
        and (pair[1] < high[0] or (pair[1] == high[0] and not high[1]))
    ]
    if offset < 0:
        return []
    return _listed(db, pairs[offset : None if count < 0 else offset + count], with_scores)
