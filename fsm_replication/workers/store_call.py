"""One call into the node's own store: through its circuit, within a time, and with errors of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fsm_replication.circuits import Circuit
from fsm_replication.errors import (
    ReplicationError,
    StoreError,
    StoreReopenedError,
    StoreTimeoutError,
)
from fsm_replication.ports import Clock

__all__ = ("call_store",)

_T = TypeVar("_T")


@contextmanager
def _cancellation_passes() -> Iterator[None]:
    """Raise :exc:`asyncio.CancelledError` at the end if a cancellation was swallowed inside.

    A user's store may do so, and a worker that goes on then works for an owner that has given it
    up: beside the application, or beside the engine that comes next.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


async def call_store(
    circuit: Circuit, function: Callable[[], Awaitable[_T]], clock: Clock, limit_sec: float
) -> _T:
    """Call the store once.

    :raises CircuitOpenError: if the circuit does not let the call through.
    :raises StoreReopenedError: if the store may have lost what came before.
    :raises StoreError: if it fails in any other way, or takes longer than ``limit_sec`` seconds.
    """
    with _cancellation_passes():
        return await _call_guarded(circuit, function, clock, limit_sec)


async def _call_guarded(
    circuit: Circuit, function: Callable[[], Awaitable[_T]], clock: Clock, limit_sec: float
) -> _T:
    reopened: StoreReopenedError
    with circuit.guard():
        try:
            async with clock.timeout(limit_sec):
                return await function()
        except StoreReopenedError as error:
            # To the circuit this is a success: the store answers.
            reopened = error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Something inside the store was cancelled, and not this task.
            raise StoreError("the store failed: a call inside it was cancelled") from None
        except TimeoutError:
            raise StoreTimeoutError(
                f"a call into the store took longer than {limit_sec:g} s"
            ) from None
        except ReplicationError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"the store failed: {error}") from error
        except Exception as error:
            # A user's store may raise anything; to the link it is a failure like any other.
            raise StoreError(f"the store failed: {type(error).__name__}: {error}") from error
    raise reopened
