"""Structured logging through the standard library, which the host configures and we never do.

Events are structlog's: a name and fields. They arrive at the logger ``fsm_replication`` of the
standard library as records whose message is a sentence in plain English (see
:mod:`fsm_replication.sentences`), and whose attributes (``extra``) are ``event``, the name, and the
fields. So any handler or formatter of the host works: a plain one shows the sentence, one for
machines takes the attributes. An unconfigured host sees warnings only.

Credentials of URLs are masked in every field. Much of what is logged comes from peers, servers and
keys: texts are cut at 1,000 characters, and a message is one line of printable characters, whatever
it tells of.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, cast

import structlog

from fsm_replication.errors import redact
from fsm_replication.printable import printable
from fsm_replication.sentences import sentence

__all__ = ("TEXT_MAX", "get_logger", "one_line")

TEXT_MAX: Final = 1000
LINE_MAX: Final = 4 * TEXT_MAX

# ``event`` is ours: the event's name.
_RESERVED = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "event"}
_Event = MutableMapping[str, Any]


def one_line(text: str, characters_max: int = TEXT_MAX) -> str:
    r"""Return a text so that it can be shown in one line of a terminal or a log, and does nothing.

    What is not printable (line ends, escape sequences, marks that turn the direction of writing)
    is shown as ``\n``, ``\x1b``, ``\u202e``; what is too long is cut, and says so.
    """
    return printable(_cut(text, characters_max))


def _cut(text: str, characters_max: int = TEXT_MAX) -> str:
    left = len(text) - characters_max
    return f"{text[:characters_max]}... ({left} more characters)" if left > 0 else text


def _mask(_logger: Any, _method: str, event: _Event) -> _Event:
    for name, value in event.items():
        if name != "exc_info":
            event[name] = _masked(value)
    return event


def _masked(value: Any) -> Any:
    # Masked first: half a URL is not known as one.
    if isinstance(value, str):
        return _cut(redact(value))
    if isinstance(value, BaseException):
        return _cut(redact(f"{type(value).__name__}: {value}"))
    if isinstance(value, Mapping):
        return {_masked(name): _masked(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked(one) for one in value]
    return value


def _to_record(_logger: Any, _method: str, event: _Event) -> _Event:
    """Turn an event into a message and ``extra``.

    Fields whose name a record has already get a trailing underscore.
    """
    name = event.pop("event")
    exc_info = event.pop("exc_info", None)
    extra = {f"{k}_" if k in _RESERVED else k: v for k, v in event.items()}
    record: dict[str, Any] = {
        "msg": one_line(sentence(name, _for_reading(event, exc_info)), LINE_MAX),
        "extra": {"event": name, **extra},
    }
    if exc_info is not None:
        record["exc_info"] = exc_info
    return record


def _for_reading(fields: Mapping[str, Any], exc_info: object) -> dict[str, Any]:
    """Return fields as a sentence shows them: every text safe, an exception under ``error``."""
    shown = {
        name: value if isinstance(value, int | float | None) else _as_text(value)
        for name, value in fields.items()
    }
    if isinstance(exc_info, BaseException):
        shown.setdefault("error", one_line(redact(f"{type(exc_info).__name__}: {exc_info}")))
    return shown


def _as_text(value: object) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {count}" for name, count in value.items())
    elif isinstance(value, list):
        value = ", ".join(map(str, value))
    return one_line(str(value), LINE_MAX)


def get_logger(part: str = "", **fields: Any) -> structlog.stdlib.BoundLogger:
    """Return a logger for one part of the library, with ``fields`` in each of its events."""
    name = f"fsm_replication.{part}" if part else "fsm_replication"
    logger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, _mask, _to_record],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
        **fields,
    )
    return cast("structlog.stdlib.BoundLogger", logger)
