"""What stands in a configuration: durations, sizes, counts, node ids, URLs, and how each is checked."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from typing import Annotated, Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import BeforeValidator, Field

__all__ = (
    "BlockDuration",
    "Count",
    "CountOrZero",
    "Duration",
    "FileName",
    "Flag",
    "Milliseconds",
    "NodeId",
    "PositiveDuration",
    "Prefix",
    "Priority",
    "Rate",
    "Share",
    "Size",
    "Url",
    "parse_duration",
    "parse_size",
)

_UNITS_SEC: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_UNITS_BYTES: Final = {"": 1, "b": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_NUMBER_AND_UNIT: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)
SECONDS_MAX: Final = 10 * 365 * 86_400.0
SIZE_BYTES_MAX: Final = 2**40
COUNT_MAX: Final = 10**9
NODE_ID_BYTES_MAX: Final = 255
_URL_KINDS: Final = "redis://host:port/db, rediss://host:port/db or unix:///path"
# What the transport takes from a URL's query; anything else would silently do nothing.
_URL_OPTIONS: Final = (
    *("db", "username", "password", "ssl_ca_certs", "ssl_ca_path", "ssl_ca_data"),
    *("ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs"),
)


def parse_duration(value: Any) -> float:
    """Return seconds from "250ms", "5s", "2m", "3h", "7d" or a number of seconds.

    :raises ValueError: if it is none of these, negative, not finite, or over ten years.
    """
    hint = 'a duration is "250ms", "5s", "2m", "3h", "7d" or a number of seconds'
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(hint)  # noqa: TRY004 - pydantic reports ValueError as a problem
    if isinstance(value, str):
        match = _NUMBER_AND_UNIT.fullmatch(value)
        if match is None or (match[2] or "s") not in _UNITS_SEC:
            raise ValueError(hint)
        seconds = float(match[1]) * _UNITS_SEC[match[2] or "s"]
    else:
        seconds = float(value) if abs(value) <= SECONDS_MAX else math.inf
    if not 0 <= seconds <= SECONDS_MAX:
        raise ValueError("a duration is between 0 and ten years")
    return seconds


def _block_duration(value: Any) -> float:
    seconds = parse_duration(value)
    # Redis takes milliseconds, and waits for ever when told 0 of them.
    if seconds < 0.001:
        raise ValueError("it is at least 1 ms: at 0 Redis would wait for ever")
    return seconds


def parse_size(value: Any) -> int:
    """Return bytes from a whole number or "16 MiB", "64KiB", "1GiB".

    :raises ValueError: if it is none of these, not positive, or over 1 TiB.
    """
    hint = 'a size is a number of bytes or "64 KiB", "16 MiB", "1 GiB"'
    size: float
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(hint)  # noqa: TRY004 - pydantic reports ValueError as a problem
    if isinstance(value, str):
        match = _NUMBER_AND_UNIT.fullmatch(value)
        if match is None or match[2].lower() not in _UNITS_BYTES:
            raise ValueError(hint)
        size = float(match[1]) * _UNITS_BYTES[match[2].lower()]
    else:
        size = value
    if not 0 < size <= SIZE_BYTES_MAX or size != int(size):
        raise ValueError("a size is a whole number of bytes, at least 1 and at most 1 TiB")
    return int(size)


def _number(value: Any) -> Any:
    # pydantic alone would take true for 1 and "5" for 5.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number is expected")  # noqa: TRY004 - pydantic wants ValueError
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is text; put it in quotes")  # noqa: TRY004 - as above
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be encodable as UTF-8") from None
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in value):
        raise ValueError(f"{what} holds no control characters")
    return value


def _check_node_id(value: Any) -> str:
    text = _text(value, "a node id")
    if not 0 < len(text.encode()) <= NODE_ID_BYTES_MAX:
        raise ValueError(f"a node id has 1 to {NODE_ID_BYTES_MAX} bytes")
    if text.strip() != text:
        raise ValueError("a node id has no space around it")
    return text


def _check_prefix(value: Any) -> str:
    text = "" if value is None else _text(value, "a prefix")
    if text and not text.endswith(":"):
        raise ValueError(f'a prefix carries its own trailing colon: did you mean "{text}:"?')
    return text


def _check_file(value: Any) -> str:
    text = _text(os.fspath(value) if isinstance(value, os.PathLike) else value, "a file name")
    if not text:
        raise ValueError("a file name is not empty")
    return text


def _check_url(value: Any) -> str:
    """Accept what the transport can use; the value itself never stands in a message."""
    text = _text(value, "a URL")
    try:
        parts = urlsplit(text)
        port = parts.port
        query = parse_qs(parts.query, keep_blank_values=True)
    except ValueError:
        raise ValueError(
            f"the URL cannot be read; use {_URL_KINDS}, with a port from 1 to 65535, and write"
            ' "/", "#", "?" and "@" in a password as %2F, %23, %3F and %40'
        ) from None
    if not text.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError(f"the URL must be {_URL_KINDS}")
    if parts.fragment or re.search(r"\s", text):
        raise ValueError('a URL holds no "#" and no space; in a password write %23 and %20')
    if set(query) - set(_URL_OPTIONS):
        raise ValueError(f"the options a URL may have are {', '.join(_URL_OPTIONS)}")
    if "***" in (parts.username, parts.password, *query.get("password", [])):
        raise ValueError("the credentials in this URL are masked; write the real ones")
    if parts.scheme == "unix":
        _check_socket(parts.hostname, unquote(parts.path))
    else:
        _check_server(parts.hostname, port, parts.path)
    for number in query.get("db", []):
        _check_database(number)
    return text


def _check_socket(host: str | None, path: str) -> None:
    if host or len(path) < 2:
        raise ValueError("the URL names no socket; use unix:///path/to/redis.sock")
    _text(path, "a socket's path")


def _check_server(host: str | None, port: int | None, path: str) -> None:
    if not host:
        raise ValueError(f"the URL names no host; use {_URL_KINDS}")
    if port == 0:
        raise ValueError("a port is 1 to 65535")
    if path.strip("/"):
        _check_database(path.strip("/"))


def _check_database(text: str) -> None:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError("the database in a URL is a number, such as redis://host:6379/0")


Duration = Annotated[float, BeforeValidator(parse_duration)]
PositiveDuration = Annotated[float, Field(gt=0), BeforeValidator(parse_duration)]
BlockDuration = Annotated[float, BeforeValidator(_block_duration)]
Milliseconds = Annotated[float, Field(gt=0, le=SECONDS_MAX * 1000), BeforeValidator(_number)]
Rate = Annotated[float, Field(gt=0, le=COUNT_MAX), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
Size = Annotated[int, BeforeValidator(parse_size)]
Count = Annotated[int, Field(ge=1, le=COUNT_MAX, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, le=COUNT_MAX, strict=True)]
Priority = Annotated[int, Field(ge=-COUNT_MAX, le=COUNT_MAX, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
NodeId = Annotated[str, BeforeValidator(_check_node_id)]
Prefix = Annotated[str, BeforeValidator(_check_prefix)]
FileName = Annotated[str, BeforeValidator(_check_file)]
Url = Annotated[str, BeforeValidator(_check_url)]
