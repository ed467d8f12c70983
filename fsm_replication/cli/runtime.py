"""What a process of our own may do and the library never does: logging, gc, the event loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, MutableMapping
from enum import StrEnum
from typing import Any, Final, TypeVar

import structlog

from fsm_replication.printable import printable

__all__ = (
    "LogFormat",
    "configure_logging",
    "log_formatter",
    "run_async",
    "tune_gc",
    "uvloop_factory",
)

# The engine allocates many short-lived containers and almost no cycles: collecting less often
# saves up to a third of the time, and costs a few megabytes.
GC_THRESHOLDS: Final = (50_000, 20, 50)
_T = TypeVar("_T")


class LogFormat(StrEnum):
    """How log lines look."""

    CONSOLE = "console"
    JSON = "json"


def configure_logging(level: str, form: LogFormat) -> None:
    """Send the library's log events to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_formatter(form))
    root = logging.getLogger("fsm_replication")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level.upper())


def log_formatter(form: LogFormat) -> logging.Formatter:
    """Return what makes a line of a log record: its sentence, or a JSON object.

    The object has the sentence as ``message``, the event's name as ``event``, and every field.
    """
    fields: list[Any] = []
    render: list[Any]
    if form is LogFormat.JSON:
        fields = [_keep_message, structlog.stdlib.ExtraAdder()]
        render = [structlog.processors.JSONRenderer(default=str)]
    else:
        render = [_escape, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            *fields,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
        ],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )


def _keep_message(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Keep the sentence, since the event's name takes its place among the fields."""
    event["message"] = event["event"]
    return event


def _escape(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Keep what comes from data from commanding a terminal, or passing for a line of its own."""
    for name, value in event.items():
        if isinstance(value, str):
            # A traceback has lines, and no other field has.
            lines = value.split("\n") if name == "exception" else [value]
            event[name] = "\n".join(map(printable, lines))
    return event


def uvloop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop factory where it is installed."""
    try:
        import uvloop  # noqa: PLC0415 - part of the extra, and not on every platform
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def tune_gc() -> None:
    """Set this process's own gc thresholds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def run_async(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine with the command line's settings.

    :raises KeyboardInterrupt: after SIGINT or SIGTERM, once the coroutine has cleaned up.
    """
    tune_gc()
    with asyncio.Runner(loop_factory=uvloop_factory()) as runner:
        return runner.run(_ended_by_sigterm(main))


async def _ended_by_sigterm(main: Coroutine[Any, Any, _T]) -> _T:
    """Let SIGTERM end a coroutine as Ctrl-C does; one that handles signals itself overrides it."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    asked = False

    def ask() -> None:
        nonlocal asked
        asked = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, ask)
    try:
        return await main
    except asyncio.CancelledError:
        if asked:
            raise KeyboardInterrupt from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
