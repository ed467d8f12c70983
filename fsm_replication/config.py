"""The configuration of a node, from YAML or from Python.

Every problem is reported at once, with its path, in one :class:`ConfigError`, however a model was
built. Durations are written as "250ms", "5s", "2m", "3h", "7d" or seconds as a number, and are
held as float seconds in the field of the same name; sizes are written as bytes or "16 MiB", and
held as bytes. No error, repr or JSON dump shows the credentials of a URL.

The text below a field is its description: unit, what zero means, how it stands to other fields,
and what to choose.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
import typing
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TypeVar, cast
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from fsm_replication.errors import ConfigError, redact

__all__ = (
    "ColdPathConfig",
    "CursorConfig",
    "DeadLettersConfig",
    "HotPathConfig",
    "LimitsConfig",
    "PeerConfig",
    "PeerHealthConfig",
    "ReconnectConfig",
    "RepairConfig",
    "ReplicationConfig",
    "Settings",
    "SloConfig",
    "StartupConfig",
    "StoreConfig",
    "TimeoutsConfig",
    "TombstonesConfig",
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
FILE_BYTES_MAX: Final = 16 * 1024**2
_URL_KINDS: Final = "redis://host:port/db, rediss://host:port/db or unix:///path"
# What the transport takes from a URL's query; anything else would silently do nothing.
_URL_OPTIONS: Final = (
    *("db", "username", "password", "ssl_ca_certs", "ssl_ca_path", "ssl_ca_data"),
    *("ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs"),
)
_T = TypeVar("_T")


# Values ---------------------------------------------------------------------------------------


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


# How problems are told ----------------------------------------------------------------------------

Location = tuple[int | str, ...]
_MESSAGES: Final = {
    "missing": "this key is required",
    "model_type": "a mapping of keys to values is expected",
    "model_attributes_type": "a mapping of keys to values is expected",
    "dict_type": "a mapping of keys to values is expected",
    "invalid_key": "a key is text",
    "bool_type": "true or false is expected",
    "int_type": "a whole number is expected",
    "sequence_type": "a list is expected",
    "sequence_str": "a list is expected",
    "tuple_type": "a list is expected",
}


def _problem(type_: str, location: Location, message: str) -> InitErrorDetails:
    """Return a problem in pydantic's form, without the input that caused it."""
    custom = PydanticCustomError(cast("Any", type_), "{message}", {"message": message})
    return InitErrorDetails(type=custom, loc=location, input=None)


def _told(model: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        path, message = _path(detail["loc"]), detail["msg"]
        if detail["type"] == "extra_forbidden":
            message = f"unknown key{_did_you_mean(model, detail['loc'])}"
        yield f"{path}: {_MESSAGES.get(detail['type'], message)}"


def _path(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{_key_text(part)}"
    return text.lstrip(".") or "configuration"


def _key_text(key: str) -> str:
    if re.fullmatch(r"[\w-]{1,80}", key):
        return key
    # Credentials are masked before the text is cut, or half of a URL would pass for no URL.
    masked = repr(redact(key))
    return masked if len(masked) <= 80 else f"{masked[:76]}...'"


def _did_you_mean(model: type[BaseModel], location: Location) -> str:
    """Return a guess what a key was meant to be: a name alike, or the place where it belongs."""
    for part in location[:-1]:
        if isinstance(part, str):
            model = _submodel(model, part) or model
    key = str(location[-1]).lower().replace("-", "_")
    near = difflib.get_close_matches(key, list(model.model_fields), 1)
    for name in model.model_fields:
        inner = _submodel(model, name)
        if inner is not None and key in inner.model_fields:
            near.append(f"{name}.{key}")
    return f"; did you mean {near[0]!r}?" if near else ""


def _submodel(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    here = model.model_fields[name].annotation if name in model.model_fields else None
    for candidate in (here, *typing.get_args(here)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _reporting(model: type[BaseModel], make: Callable[[], _T]) -> _T:
    """Return what ``make`` builds.

    :raises ConfigError: instead of pydantic's error.
    """
    try:
        return make()
    except ValidationError as error:
        problems = tuple(_told(model, error))
    # Raised out here, so that no pydantic error hangs on to ours as its context.
    raise ConfigError(problems)


if TYPE_CHECKING:
    _Base = BaseModel
else:

    class _Reporting(type(BaseModel)):
        """Turns pydantic's error into ours, where a model is built and not where one is nested."""

        def __call__(cls, /, **data: Any) -> Any:
            make = super().__call__
            return _reporting(cls, lambda: make(**data))

    class _Base(BaseModel, metaclass=_Reporting):
        """What type checkers need not see: to them a model is built like any other."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name in type(self).model_fields:
                raise ConfigError([f"{name}: cannot be set; use model_copy(update=...)"])
            super().__setattr__(name, value)

        def __delattr__(self, name: str) -> None:
            if name in type(self).model_fields:
                raise ConfigError([f"{name}: cannot be deleted"])
            super().__delattr__(name)

        @classmethod
        def model_validate(cls, obj: Any, **options: Any) -> Self:
            make = super().model_validate
            return _reporting(cls, lambda: make(obj, **options))

        @classmethod
        def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
            make = super().model_validate_json
            return _reporting(cls, lambda: make(json_data, **options))

        @classmethod
        def model_validate_strings(cls, obj: Any, **options: Any) -> Self:
            make = super().model_validate_strings
            return _reporting(cls, lambda: make(obj, **options))


class _Model(_Base):
    """Immutable, strict about keys; any way to build a wrong one raises ConfigError."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _judge(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Look at each field, and then at what can be judged together, even if a field is wrong.

        pydantic's own model validators do not run where a field failed.
        """
        if isinstance(data, cls):
            return data
        problems: list[InitErrorDetails] = []
        built: Self | None = None
        try:
            built = handler(data)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False):
                message = detail["msg"].removeprefix("Value error, ")
                problems.append(_problem(detail["type"], detail["loc"], message))
        if isinstance(data, Mapping):
            problems += [_problem("together", where, why) for where, why in cls._together(data)]
        if built is None or problems:
            raise ValidationError.from_exception_data(cls.__name__, problems, hide_input=True)
        built._notice(data)
        return built

    @classmethod
    def _together(cls, _data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        """Yield where and why fields do not fit each other."""
        yield from ()

    def _notice(self, data: Any) -> None:
        """Note what is odd about the data, though no problem."""

    @classmethod
    def _known(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the fields that are right in themselves."""
        known = {name: field.default for name, field in cls.model_fields.items()}
        for name in known.keys() & data.keys():
            try:
                known[name] = _adapter(cls, name).validate_python(data[name])
            except ValidationError:
                del known[name]
        return known

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed, checked like a new one.

        ``deep`` changes nothing, since all of it is immutable.

        :raises ConfigError: if a change is wrong.
        """
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**kept, **(update or {})})


@functools.cache
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    """Return what checks one field by itself."""
    form: Any = model.model_fields[name].annotation
    for mark in model.model_fields[name].metadata:
        form = Annotated[form, mark]
    return TypeAdapter(form)


def _over(known: Mapping[str, Any], low: str, high: str) -> Iterator[tuple[Location, str]]:
    if low in known and high in known and known[low] > known[high]:
        yield (high,), f"it is {known[high]}, below {low}, which is {known[low]}"


# Settings ---------------------------------------------------------------------------------------


class HotPathConfig(_Model):
    """Tailing the peers' streams."""

    enabled: Flag = True
    """False: links stand by, and only the cold path brings changes. Leave it on."""
    batch_size: Count = 100
    """Entries per read at the head, at first where it adapts; at least 1. 100 keeps a quiet
    link quick while another catches up."""
    block_timeout: BlockDuration = 5.0
    """Seconds a read waits at the head, at least 1 ms: Redis would wait for ever at 0. Longer
    means fewer round trips; an event ends the wait at once. 1 to 10 s."""
    adaptive_batch_size: Flag = False
    """True: a full read doubles the size up to ``max_batch_size``, an empty one takes off a
    tenth or 10 down to ``min_batch_size``. For streams that come in bursts."""
    min_batch_size: Count = 50
    """Entries; the smallest size it adapts to. Not over ``max_batch_size``."""
    max_batch_size: Count = 1000
    """Entries; the largest size it adapts to, and what a read in bulk asks for. Over 1000
    gains little and makes other links wait."""
    rate_limit_enabled: Flag = False
    """True: one token bucket slows all peers together."""
    rate_limit_per_sec: Rate = 10_000
    """Events per second for all peers together, over 0. What the local store can bear."""
    rate_limit_burst: Count = 1000
    """Events let through at once after a rest, at least 1. About ``max_batch_size``."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        known = cls._known(data)
        yield from _over(known, "min_batch_size", "max_batch_size")
        size, adapts = known.get("batch_size"), known.get("adaptive_batch_size")
        if not adapts or size is None:
            return
        low, high = known.get("min_batch_size"), known.get("max_batch_size")
        if low is not None and size < low:
            yield ("batch_size",), f"it adapts, and {size} is below min_batch_size, {low}"
        if high is not None and size > high:
            yield ("batch_size",), f"it adapts, and {size} is over max_batch_size, {high}"


class ColdPathConfig(_Model):
    """Comparing trees with the peers, now and then."""

    enabled: Flag = True
    """False: what the hot path missed stays missed. Leave it on."""
    interval_sec: PositiveDuration = 60.0
    """Seconds between two cycles, over 0. 60; a comparison of equal trees is one round trip."""
    max_items_per_cycle: Count = 1000
    """Items fetched in one cycle, shared by all peers; what is left waits for the next one."""
    backoff_base_sec: PositiveDuration = 5.0
    """Seconds a peer rests after a failure, doubled with each one. Not over
    ``backoff_max_sec``."""
    backoff_max_sec: PositiveDuration = 300.0
    """Seconds; the longest rest of a peer."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        yield from _over(cls._known(data), "backoff_base_sec", "backoff_max_sec")


class PeerHealthConfig(_Model):
    """Pinging peers that say nothing."""

    enabled: Flag = True
    """False: a dead peer shows only when a read fails or times out."""
    ping_interval_sec: PositiveDuration = 30.0
    """Seconds between two looks for idle peers, over 0."""
    idle_threshold_sec: Duration = 60.0
    """Seconds without an answer after which a peer is pinged; 0 pings every peer every time.
    Twice ``ping_interval_sec`` is a good choice."""


class SloConfig(_Model):
    """Limits over which a metric counts and a warning is logged; nothing else depends on them."""

    max_stream_read_latency_ms: Milliseconds = 100.0
    """Milliseconds of one read, over 0; time spent blocked at the head does not count."""
    max_peer_op_latency_ms: Milliseconds = 500.0
    """Milliseconds of any other command to a peer, over 0."""
    max_batch_flush_latency_ms: Milliseconds = 200.0
    """Milliseconds of applying one batch, over 0. Well under ``timeouts.store_call``."""
    max_replication_lag_sec: PositiveDuration = 30.0
    """Seconds a link may be behind its peer's head, over 0."""


class StartupConfig(_Model):
    """Starting."""

    timeout: PositiveDuration = 30.0
    """Seconds until the first peer must be up, over 0. Several times ``timeouts.connect``."""
    when_no_peer: Literal["fail", "run"] = "fail"
    """"fail": a start without any peer raises; "run": it goes on, and links keep trying."""


class ReconnectConfig(_Model):
    """How long a link waits before it tries its peer again; it never gives up.

    The peer's circuit may make it wait longer: see ``peers[].circuit_reset_timeout_sec``.
    """

    first: PositiveDuration = 1.0
    """Seconds after the first failure, over 0, doubled with each further one; up to half of it
    is left out at random, so that nodes do not come back in step. Not over ``longest``."""
    longest: PositiveDuration = 300.0
    """Seconds; no wait is longer. How long a peer may be back without being read."""
    rejected: PositiveDuration = 300.0
    """Seconds until rejected credentials are tried again, over 0. Minutes, so that a server that
    locks users out after some failures does not."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        yield from _over(cls._known(data), "first", "longest")


class TimeoutsConfig(_Model):
    """How long a call may take. None may be 0: every wait on something outside has an end."""

    connect: PositiveDuration = 10.0
    """Seconds to connect to a peer and log in. Below ``startup.timeout``."""
    command: PositiveDuration = 5.0
    """Seconds for a command to a peer; a blocking read gets ``hot_path.block_timeout`` more."""
    store_call: PositiveDuration = 10.0
    """Seconds for one call into the local store."""
    ping: PositiveDuration = 5.0
    """Seconds for a ping; one that takes longer is a lost connection."""
    cursor: PositiveDuration = 5.0
    """Seconds for a call to the cursor store."""
    drain: PositiveDuration = 10.0
    """Seconds for the whole shutdown, of which a fifth is kept for closing. Below what your
    service manager grants before it kills."""


class LimitsConfig(_Model):
    """Bounds on memory; sizes are bytes or text like "16 MiB"."""

    payload_bytes: Size = 16 * 1024**2
    """Bytes of one content after decompression. Not over ``batch_bytes``."""
    batch_bytes: Size = 64 * 1024**2
    """Bytes of one batch; a link holds at most two and one entry. The memory you can spare,
    divided by twice the number of peers."""
    dead_letters: Count = 10_000
    """Dead letters kept per peer, at least 1; see ``dead_letters.when_full``."""
    journal: Count = 1000
    """Moves of machines kept in memory, at least 1."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        yield from _over(cls._known(data), "payload_bytes", "batch_bytes")


class DeadLettersConfig(_Model):
    """Entries that could not be applied."""

    when_full: Literal["pause", "drop_oldest"] = "pause"
    """At ``limits.dead_letters`` of one peer: "pause" its link, or "drop_oldest" and count it."""


class TombstonesConfig(_Model):
    """How long deletes are remembered."""

    ttl: PositiveDuration = 7 * 86_400.0
    """Seconds, over 0, and the same at every node: links between others are refused. Longer
    than any outage after which a node shall come back."""
    grace: Duration = 86_400.0
    """Seconds more that the store keeps an expired one; 0 keeps none. A day outlasts slow
    links."""


class RepairConfig(_Model):
    """The interlock: a link pauses when replication would delete too many live keys in an hour.

    Too many is more than the larger of the two bounds.
    """

    interlock_share: Share = 0.2
    """Share of the live keys, 0 to 1. At 0 ``interlock_min`` decides alone; at 1 it never
    trips."""
    interlock_min: CountOrZero = 1000
    """Keys, for small stores; at 0 ``interlock_share`` decides alone."""


class Settings(_Model):
    """Everything that is the same for all peers."""

    hot_path: HotPathConfig = HotPathConfig()
    """Tailing the peers' streams."""
    cold_path: ColdPathConfig = ColdPathConfig()
    """Comparing trees."""
    peer_health: PeerHealthConfig = PeerHealthConfig()
    """Pinging idle peers."""
    slo: SloConfig = SloConfig()
    """When a metric counts."""
    startup: StartupConfig = StartupConfig()
    """Starting."""
    reconnect: ReconnectConfig = ReconnectConfig()
    """How long to wait between attempts to connect."""
    timeouts: TimeoutsConfig = TimeoutsConfig()
    """How long calls may take."""
    limits: LimitsConfig = LimitsConfig()
    """Bounds on memory."""
    dead_letters: DeadLettersConfig = DeadLettersConfig()
    """Entries that could not be applied."""
    tombstones: TombstonesConfig = TombstonesConfig()
    """How long deletes are remembered."""
    repair: RepairConfig = RepairConfig()
    """What the cold path must not do."""


class _HasUrl(_Model):
    @property
    def display_url(self) -> str:
        """The URL without credentials, for logs and screens; "" where there is none."""
        return redact(getattr(self, "redis_url", None) or "")

    @field_serializer("redis_url", when_used="json", check_fields=False)
    def _mask(self, value: str | None) -> str | None:
        # JSON is what gets shown and sent; model_dump() keeps the URL as it is.
        return None if value is None else redact(value)


class PeerConfig(_HasUrl):
    """One peer."""

    node_id: NodeId
    """The peer's own ``local_node_id``: 1 to 255 bytes of UTF-8 without control characters."""
    redis_url: Url = Field(repr=False)
    """redis://, rediss:// (TLS) or unix://, with user and password; a name that may only read
    is enough. Never shown: see ``display_url``. With TLS the certificate is checked against the
    authorities of this machine, or those in the file of ``?ssl_ca_certs=FILE`` (PEM) or the
    folder of ``ssl_ca_path``; ``ssl_certfile`` and ``ssl_keyfile`` (without passphrase) are shown
    to a server that asks; ``ssl_check_hostname=false`` and ``ssl_cert_reqs=none`` give the
    checks up, for tests."""
    priority: Priority = 0
    """Lower is served first in start and repair; equal ones in the order they stand here."""
    circuit_failure_threshold: Count = 5
    """Failures in a row that open the peer's circuit, at least 1."""
    circuit_reset_timeout_sec: PositiveDuration = 30.0
    """Seconds an open circuit waits for a probe, over 0."""
    redis_prefix: Prefix = ""
    """What the peer's keys begin with, colon included: "site-a:". "" or nothing: no prefix."""
    allow_echo: Flag = False
    """True: read a foreign node that also reads us, with fewer promises."""


class CursorConfig(_Model):
    """The file that remembers how far each peer was read."""

    sqlite_path: FileName = "replication_cursors.db"
    """A file on a local disk, one per engine. ":memory:" forgets, for tests."""
    wal_mode: Flag = True
    """False: for file systems without shared memory; slower."""


class StoreConfig(_HasUrl):
    """The node's own store, for ``fsm-replication run``."""

    kind: Literal["redis", "memory", "noop"]
    """"redis" needs ``redis_url``; "memory" forgets at the end; "noop" keeps nothing."""
    redis_url: Url | None = Field(default=None, repr=False)
    """The node's own Redis, as in ``peers[].redis_url``, with the right to write."""
    redis_prefix: Prefix = ""
    """As in ``peers[].redis_prefix``."""
    stream_maxlen: Count = 100_000
    """Entries the node's stream keeps, about; at least 1. More than come in the longest outage
    of a reader, or that reader copies everything anew."""
    layouts: tuple[Literal["own", "dotted"], ...] = ("own",)
    """The trees the node publishes: "own" always, "dotted" for foreign readers."""

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        known = cls._known(data)
        if known.get("kind") == "redis" and data.get("redis_url") is None:
            yield ("redis_url",), "this key is required where kind is redis"
        layouts = known.get("layouts")
        if layouts is not None and "own" not in layouts:
            yield ("layouts",), '"own" is always among them'
        if layouts is not None and len(set(layouts)) != len(layouts):
            yield ("layouts",), "it names each layout once"


class ReplicationConfig(_Model):
    """A node: who it is, whom it reads, and how.

    :raises ConfigError: in every way of building one, with all problems, if anything is wrong.
    """

    local_node_id: NodeId
    """This node: 1 to 255 bytes of UTF-8 without control characters. Unique in the mesh, and
    kept for ever."""
    settings: Settings = Settings()
    """What is the same for all peers."""
    peers: Sequence[PeerConfig] = ()
    """Whom it reads, each ``node_id`` once; none makes a node that others read. This node
    itself is left out, with a warning."""
    cursor: CursorConfig = CursorConfig()
    """Where it remembers how far it read."""
    store: StoreConfig | None = None
    """The node's own store; only the command line needs it."""
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @field_validator("peers")
    @classmethod
    def _leave_self_out(
        cls, value: Sequence[PeerConfig], info: ValidationInfo
    ) -> Sequence[PeerConfig]:
        me = info.data.get("local_node_id")
        return tuple(peer for peer in value if peer.node_id != me)

    @classmethod
    def _together(cls, data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        first: dict[str, int] = {}
        for index, node_id in _peer_ids(data):
            if node_id in first:
                yield ("peers", index, "node_id"), f"peers[{first[node_id]}] has the same one"
            first.setdefault(node_id, index)

    def _notice(self, data: Any) -> None:
        me = self.local_node_id
        self._warnings = tuple(
            f"peers[{index}]: {me!r} is this node itself and is left out"
            for index, node_id in _peer_ids(data)
            if node_id == me
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd but no problem."""
        return self._warnings

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed, checked like a new one.

        :raises ConfigError: if a change is wrong.
        """
        copied = super().model_copy(update=update, deep=deep)
        if "peers" not in (update or {}):
            copied._warnings = (*self._warnings, *copied._warnings)
        return copied

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file.

        :raises ConfigError: if it cannot be read or anything in it is wrong.
        """
        problems: list[str] = []
        try:
            data, problems = _parse_yaml(_read(Path(path)))
            config = cls.model_validate(data)
        except ConfigError as error:
            problems += error.problems
        # Raised out here, so that no error before it hangs on as its context.
        if problems:
            raise ConfigError(problems, source=str(Path(path)))
        return config

    def changed_paths(self, other: ReplicationConfig) -> tuple[str, ...]:
        """Return the dotted paths whose values differ, sorted, and never a value.

        Peers are named by node id, since their place may change: ``peers[b].priority``, or
        ``peers[b]`` where only one of the two has it; their order does not count.
        """
        mine, theirs = _flat(self), _flat(other)
        return tuple(sorted(_differing(mine, theirs)))


def _peer_ids(data: Any) -> Iterator[tuple[int, str]]:
    peers = data.get("peers") if isinstance(data, Mapping) else None
    if not isinstance(peers, Sequence) or isinstance(peers, str | bytes):
        return
    for index, peer in enumerate(peers):
        node_id = peer.get("node_id") if isinstance(peer, Mapping) else None
        node_id = peer.node_id if isinstance(peer, PeerConfig) else node_id
        if isinstance(node_id, str):
            yield index, node_id


def _flat(config: ReplicationConfig) -> dict[str, Any]:
    """Return a tree of plain values in which each peer stands under its node id."""
    plain = config.model_dump()
    for peer in plain.pop("peers"):
        plain[f"peers[{peer['node_id']}]"] = peer
    return plain


def _differing(mine: Any, theirs: Any, path: str = "") -> Iterator[str]:
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        if mine != theirs:
            yield path
        return
    for name in mine.keys() | theirs.keys():
        yield from _differing(mine.get(name), theirs.get(name), f"{path}.{name}".lstrip("."))


# YAML -------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    """:raises ConfigError: if it is no readable file of UTF-8."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
        if len(raw) > FILE_BYTES_MAX:
            raise ConfigError([f"file: it is larger than {FILE_BYTES_MAX} bytes"])
        return raw.decode("utf-8")
    except OSError as error:
        why = error.strerror or type(error).__name__
    except UnicodeDecodeError as error:
        why = f"it is not UTF-8, at byte {error.start}"
    except ValueError:
        why = "its name holds a null character"
    raise ConfigError([f"file: {why}"])


def _parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Return the data and what is wrong about the text that does not hide the data.

    :raises ConfigError: if there is no data.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        data = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = f"{_at(mark) if mark else 'file'}: {error.problem or error.context}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        why = f"line {line}: it holds a character that YAML does not allow"
    except RecursionError:
        why = "file: it is nested too deeply"
    else:
        if data is not None:
            return data, loader.problems
        why = "file: it is empty"
    finally:
        if loader is not None:
            loader.dispose()
    raise ConfigError([why])


def _at(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


class _Loader(yaml.SafeLoader):
    """Makes plain values only, and notes keys that stand twice, of which YAML keeps the last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Look at the keys as they are written, before merge keys mix them."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                where = _at(key.start_mark)
                self.problems.append(f"{where}: the key {_key_text(key.value)} stands twice")
            seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value; one like 2024-13-45 looks like a date and is none."""
        try:
            return super().construct_object(node, deep=deep)
        except ValueError:
            why = f"this is no {node.tag.rpartition(':')[2]}; put text in quotes"
        raise yaml.MarkedYAMLError(problem=why, problem_mark=node.start_mark)
