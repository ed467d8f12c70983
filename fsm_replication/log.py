"""Structured logging through the standard library, which the host configures and we never do.

Events are structlog's (a name and fields); they arrive at the logger ``fsm_replication`` of the
standard library as records whose fields are record attributes (``extra``), so any handler or
formatter of the host works, and an unconfigured host sees warnings only. Credentials of URLs are
masked in every field.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any, cast

import structlog

from fsm_replication.errors import redact

__all__ = ("get_logger",)

_RESERVED = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


def _mask(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if name != "exc_info":
            event[name] = _masked(value)
    return event


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, BaseException):
        return redact(f"{type(value).__name__}: {value}")
    if isinstance(value, Mapping):
        return {_masked(name): _masked(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked(one) for one in value]
    return value


def _to_record(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Turn fields into ``extra``; names that a record has already get a trailing underscore."""
    message = event.pop("event")
    exc_info = event.pop("exc_info", None)
    extra = {f"{k}_" if k in _RESERVED else k: v for k, v in event.items()}
    record: dict[str, Any] = {"msg": message, "extra": extra}
    if exc_info is not None:
        record["exc_info"] = exc_info
    return record


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
