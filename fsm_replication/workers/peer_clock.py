"""How a peer's clock stands to ours.

Theory of operation. Which of two changes is later is decided by the clocks of the nodes, so a clock
that is wrong does harm. The peer is asked for its TIME, and what is kept of the answer is how far it
lies from our *monotonic* clock: so a jump of our own wall clock shows at once, and one of the peer's
as soon as it is asked again. Before anything that lies far ahead is settled the peer is asked, unless
it was since that arrived. Where ours and its clock are more than a day apart, nobody can tell what is
far ahead from what is merely told by another clock, and the link waits until they agree.

A user that may not ask for the TIME makes the skew unknown, and nothing else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from structlog.stdlib import BoundLogger

from fsm_replication.errors import ConnectionLostError, PeerReplyError, ProtocolError
from fsm_replication.items import DAY_MS
from fsm_replication.ports import Clock, Connection, WallClock

__all__ = ("ASK_TIME", "WARN_FROM_SEC", "PeerClock")

ASK_TIME: Final = ("TIME",)
WARN_FROM_SEC: Final = 1.0
# Once warned of, it is well again below this share: one that is about as large is told once.
_WELL_SHARE: Final = 0.5
# A server that answers so may tell its time later; any other error means that it never will.
_PASSING: Final = frozenset({"BUSY", "LOADING", "MASTERDOWN"})
_DIGITS_MAX: Final = 15


class _Condition(StrEnum):
    """What there is to tell of a skew; a line is logged where it changes."""

    UNKNOWN = "unknown"
    AGREES = "agrees"
    OFF = "off"
    DAY_OFF = "a day off"


class PeerClock:
    """What is known of one peer's clock.

    ``connection`` is the latest one over which it may be asked, ``asked_at`` the monotonic time of its
    last answer; both are None before the first.
    """

    def __init__(self, clock: Clock, wall_clock: WallClock, log: BoundLogger) -> None:
        self.connection: Connection | None = None
        self.asked_at: float | None = None
        self._clock = clock
        self._wall_clock = wall_clock
        self._log = log
        # The peer's time of day when our monotonic clock was at 0.
        self._origin_ms: float | None = None
        self._condition = _Condition.AGREES

    # What is known, without I/O.

    @property
    def skew_sec(self) -> float | None:
        """The peer's clock minus ours in seconds, None where the peer does not tell its time.

        It rests on the last answer.
        """
        return self._skew_sec(self._wall_clock.now_ms())

    def is_day_off(self, ours_ms: int | None = None) -> bool:
        """Say whether the clocks are more than a day apart; ``ours_ms`` is by default now."""
        skew = self._skew_sec(self._wall_clock.now_ms() if ours_ms is None else ours_ms)
        return skew is not None and abs(skew) * 1000 > DAY_MS

    def _skew_sec(self, ours_ms: int) -> float | None:
        if self._origin_ms is None:
            return None
        return (self._origin_ms + self._clock.monotonic() * 1000 - ours_ms) / 1000

    def tell(self) -> str:
        """Return how the clocks stand to each other, for people."""
        skew = self.skew_sec
        if skew is None:
            return "the peer does not tell its time"
        return f"its clock is {abs(skew):,.1f} s {'ahead of' if skew > 0 else 'behind'} ours"

    def now_ms(self) -> int:
        """Return the peer's time of day; ours, where it does not tell it."""
        ours_ms = self._wall_clock.now_ms()
        return ours_ms + round((self._skew_sec(ours_ms) or 0.0) * 1000)

    # Asking.

    def now(self) -> float:
        """Return the monotonic time, at which a question is sent."""
        return self._clock.monotonic()

    async def ask(self, timeout_sec: float) -> None:
        """Ask the peer for its time.

        :raises NetworkError: if there is no connection.
        :raises PeerError: if the peer is not well, or its answer is no time.
        """
        if self.connection is None:
            raise ConnectionLostError("the peer was never connected")
        began = self._clock.monotonic()
        try:
            reply = await self.connection.call(*ASK_TIME, timeout_sec=timeout_sec)
        except PeerReplyError as error:
            reply = error
        self.take(reply, began)

    async def ask_since(self, seen_at: float, timeout_sec: float) -> None:
        """Ask the peer for its time, unless it has told it since a moment of the monotonic clock.

        It raises as :meth:`ask` does.
        """
        if self.asked_at is None or self.asked_at < seen_at:
            await self.ask(timeout_sec)

    def take(self, reply: object, began: float) -> None:
        """Take in the reply to a question that was sent at ``began`` of the monotonic clock.

        :raises PeerReplyError: if it is an error that will pass.
        :raises ProtocolError: if it is no time.
        """
        now = self._clock.monotonic()
        if not isinstance(reply, PeerReplyError):
            # Whether the way there or the way back took longer cannot be known.
            self._origin_ms = _time_ms(reply) - (began + now) / 2 * 1000
        elif reply.code in _PASSING:
            raise reply
        else:
            self._origin_ms = None
        self.asked_at = now
        self._note_condition(now - began)

    def _note_condition(self, round_trip_sec: float) -> None:
        skew, before = self.skew_sec, self._condition
        found = self._condition = self._find_condition(skew)
        if found is before:
            return
        if skew is None:
            self._log.info("peer_clock_unknown", why="this user may not ask for the TIME")
            return
        told = {"skew_sec": round(skew, 3), "round_trip_sec": round(round_trip_sec, 3)}
        if found is _Condition.AGREES:
            self._log.info("peer_clock_agrees", **told)
        else:
            self._log.warning("peer_clock_off", **told)

    def _find_condition(self, skew: float | None) -> _Condition:
        if skew is None:
            return _Condition.UNKNOWN
        if self.is_day_off():
            return _Condition.DAY_OFF
        was_off = self._condition in (_Condition.OFF, _Condition.DAY_OFF)
        limit = WARN_FROM_SEC * (_WELL_SHARE if was_off else 1)
        return _Condition.OFF if abs(skew) >= limit else _Condition.AGREES

    def __repr__(self) -> str:
        return f"<PeerClock: {self.tell()}>"


def _time_ms(reply: object) -> float:
    """Return the milliseconds since the epoch that a reply to TIME tells.

    :raises ProtocolError: if it is none.
    """
    match reply:
        case [bytes(seconds), bytes(micros)] if all(
            part.isdigit() and len(part) <= _DIGITS_MAX for part in (seconds, micros)
        ):
            return int(seconds) * 1000 + int(micros) / 1000
    raise ProtocolError("TIME: unexpected reply")
