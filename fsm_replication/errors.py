"""Every error the library raises, in three branches and a few twigs.

A reader of a traceback wants to know whose fault it is:

* :class:`UsageError` -- *you* called something that cannot be done now or ever;
* :class:`PeerError` -- *they* sent something that no reader should accept;
* :class:`NetworkError` -- nobody is to blame; the way between us failed.

Beside them stand the errors of what this node owns: :class:`StoreError` (the sync engine),
:class:`CursorStoreError` (the file of cursors), :class:`StartupError` and
:class:`DrainTimeoutError` (the engine's own beginning and end).

Each class says in ``retryable`` whether the same call may succeed later without anybody changing
anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from fsm_replication.redaction import redact

__all__ = (
    "AlreadyRunningError",
    "BadEntryError",
    "CircuitOpenError",
    "ConfigError",
    "ConnectionLostError",
    "CursorStoreError",
    "DrainTimeoutError",
    "EngineStoppedError",
    "InvalidKeyError",
    "InvalidStateError",
    "LettersFullError",
    "MergeError",
    "NetworkError",
    "NoPeerError",
    "PeerError",
    "PeerRefusedError",
    "PeerReplacedError",
    "PeerReplyError",
    "ProtocolError",
    "ReplicationError",
    "ReplyTooLargeError",
    "StampAheadError",
    "StartupError",
    "StoreError",
    "StoreTimeoutError",
    "UnreachableStateError",
    "UsageError",
    "WaitTimeoutError",
    "WatcherLagged",
    "WorkerCrashedError",
    "redact",
    "shorten",
)

TEXT_CHARS_MAX = 1000
"""Of an error: what others wrote may stand in it, and it is kept in logs, journal and health."""
ERROR_CHARS_MAX = 500
"""Of an error that a server answers with."""


def shorten(text: str, chars: int = TEXT_CHARS_MAX) -> str:
    """Return ``text``, cut in its middle where it is longer than so many characters."""
    if len(text) <= chars:
        return text
    half = chars // 2
    return f"{text[:half]}[... {len(text) - 2 * half} characters ...]{text[-half:]}"


class ReplicationError(Exception):
    """Base of everything this library raises on purpose."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


# You ----------------------------------------------------------------------------------------


class UsageError(ReplicationError):
    """The caller asked for something that cannot be done."""


class InvalidStateError(UsageError):
    """A call or trigger is not legal in the machine's present state; nothing has changed.

    ``expected`` names the states in which it would have been legal, ``actual`` the present one,
    ``legal`` the triggers that the present state does allow.
    """

    def __init__(
        self,
        *,
        machine: str,
        trigger: str,
        expected: str,
        actual: str,
        legal: Sequence[str] = (),
    ) -> None:
        self.machine = machine
        self.trigger = trigger
        self.expected = expected
        self.actual = actual
        self.state = actual
        self.legal = tuple(legal)
        allowed = ", ".join(self.legal) or "nothing: the state is final"
        super().__init__(
            f"{machine}: {trigger!r} is legal in {expected or 'no state'}, not in {actual}"
            f" (legal there: {allowed})"
        )


class InvalidKeyError(UsageError):
    """A key is empty, longer than 1,024 bytes of UTF-8, not encodable, or reserved."""


class StampAheadError(UsageError, ValueError):
    """A key is held with a stamp more than a day ahead of the clock: no write can replace it.

    A write over it would have to be stamped later still, and every peer would refuse that. ``key``
    and ``updated_at`` (milliseconds since the epoch) say what is held. ``fsm-replication restamp``
    shows what the peers hold, and gives it a stamp of now.
    """

    def __init__(self, key: str, updated_at: int | None = None) -> None:
        self.key = key
        self.updated_at = updated_at
        at = "" if updated_at is None else f" ({updated_at} ms)"
        super().__init__(
            f"{key!r} is held with a stamp more than a day ahead of the clock{at}, and peers refuse"
            " whatever would be written over it: see what they hold, and give it a stamp of now, by"
            " fsm-replication restamp CONFIG KEY"
        )


class ConfigError(UsageError):
    """The configuration is wrong; ``problems`` lists every fault as ``path: what``."""

    def __init__(self, problems: Iterable[str], *, source: str | None = None) -> None:
        self.problems = tuple(redact(problem) for problem in problems)
        self.source = source
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in {source or 'the configuration'}"
        super().__init__(head + "".join(f"\n  {problem}" for problem in self.problems))


class EngineStoppedError(UsageError):
    """``start()`` was interrupted by ``shutdown()``, or a call came after the engine's end."""


class UnreachableStateError(UsageError):
    """``wait_for_state`` waits for states that can no longer come."""


class WaitTimeoutError(ReplicationError, TimeoutError):
    """What was waited for did not come in time; the message says how things stand."""

    retryable = True


class WatcherLagged(ReplicationError):  # noqa: N818 - it reports a fact, and is raised once
    """A watcher fell behind; ``missed`` records were dropped before the oldest one kept."""

    retryable = True

    def __init__(self, missed: int) -> None:
        self.missed = missed
        super().__init__(f"this watcher was too slow: {missed} records were dropped")


# They ---------------------------------------------------------------------------------------


class PeerError(ReplicationError):
    """A peer answered with something it should not have sent; of a long text a part is kept."""

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message))


class PeerReplyError(PeerError):
    """The peer's Redis answered a command with an error (LOADING, READONLY, OOM, ...)."""

    retryable = True

    def __init__(self, message: str, *, peer: str = "") -> None:
        message = shorten(message, ERROR_CHARS_MAX)
        self.code = message.split(" ", 1)[0]
        self.peer = peer
        super().__init__(f"{peer}: {message}" if peer else message)


class PeerRefusedError(PeerError):
    """Waiting cannot mend this link.

    An unusable URL, rejected credentials, our own node id, a newer format, another tombstone ttl
    or resolver. ``credentials`` is true where the peer rejected who we say we are. ``mendable`` says
    that it may be mended at the peer, so that the link tries again after ``reconnect.rejected``.
    """

    def __init__(self, message: str, *, credentials: bool = False, mendable: bool = False) -> None:
        self.credentials = credentials
        self.mendable = mendable or credentials
        super().__init__(message)


class ProtocolError(PeerError):
    """Bytes that are not the Redis protocol, or a reply of an unexpected shape."""

    retryable = True


class ReplyTooLargeError(PeerError):
    """A reply went over its limit in bytes; the connection was dropped to stop it."""

    retryable = True

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        super().__init__(f"a reply went over the limit of {limit_bytes} bytes")


class BadEntryError(PeerError):
    """One stream entry or item cannot be used; it becomes a dead letter with ``reason``."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = shorten(detail)
        super().__init__(f"{reason}: {self.detail}")


# The way between ------------------------------------------------------------------------------


class NetworkError(ReplicationError):
    """A connection could not be made or did not last."""

    retryable = True


class ConnectionLostError(NetworkError):
    """A connection was refused, reset, closed by the other side, or gave no answer in time."""


class PeerReplacedError(NetworkError):
    """Over a connection that lives on another store is found than when it was made."""


# What this node owns --------------------------------------------------------------------------


class StoreError(ReplicationError):
    """The local sync engine failed."""

    retryable = True


class MergeError(StoreError):
    """A resolver could not make one item of two: the one that arrives is refused."""

    retryable = False


class StoreTimeoutError(StoreError):
    """A call into the local sync engine took longer than ``timeouts.store_call``."""


class StoreReopenedError(ReplicationError):
    """The local store was lost and found again; it may be as it was at an earlier time.

    No StoreError: the store is well, and trying the same call again would be wrong.
    """

    retryable = True


class CircuitOpenError(StoreError):
    """A circuit breaker refused the call without making it; ``cause`` is what opened it."""

    def __init__(self, circuit: str, cause: str = "") -> None:
        self.circuit = circuit
        super().__init__(f"circuit {circuit!r} is open" + (f": {cause}" if cause else ""))


class CursorStoreError(ReplicationError):
    """The cursor database cannot be used; the message names the file and says what to do."""

    def __init__(self, message: str, *, path: str, retryable: bool = False) -> None:
        self.path = path
        self.may_pass = retryable
        super().__init__(message)


class LettersFullError(ReplicationError):
    """There is no room for further dead letters of a peer, and none may be dropped.

    ``letters`` and ``held_bytes`` are what is kept, ``needed_bytes`` what more was to be.
    """

    def __init__(self, letters: int, held_bytes: int, needed_bytes: int) -> None:
        self.letters = letters
        self.held_bytes = held_bytes
        self.needed_bytes = needed_bytes
        super().__init__(f"{letters} dead letters of {held_bytes} bytes are kept")


class AlreadyRunningError(CursorStoreError):
    """Another engine holds the lock of this cursor file."""


class StartupError(ReplicationError):
    """The engine could not start."""


class NoPeerError(StartupError):
    """No peer could be reached within ``startup.timeout`` and ``when_no_peer`` is ``fail``."""

    retryable = True


class WorkerCrashedError(ReplicationError):
    """A worker died of unexpected errors more often than its supervisor puts up with."""


class DrainTimeoutError(ReplicationError):
    """``shutdown()`` reached its deadline; ``left_behind`` names what would not end.

    Where that is nothing, everything has ended, but only after ``took_sec``.
    """

    def __init__(
        self, left_behind: Sequence[str], *, timeout_sec: float, took_sec: float | None = None
    ) -> None:
        self.left_behind = tuple(left_behind)
        self.took_sec = took_sec
        text = f"drain took longer than {timeout_sec:g} s"
        if took_sec is not None:
            text += f": {took_sec:.2f} s"
        names = ", ".join(self.left_behind) or "nothing"
        super().__init__(f"{text}; left behind: {names}")
