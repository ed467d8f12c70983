"""The configuration of a node, from YAML or from Python.

Every problem is reported at once, with its path, in one :class:`ConfigError`, however a model was
built. Durations are written as "250ms", "5s", "2m", "3h", "7d" or seconds as a number, and are
held as seconds; sizes as bytes or "16 MiB", held as bytes. No error, repr or dump for display shows
the credentials of a URL.
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from fsm_replication.errors import ConfigError, redact

__all__ = (
    "ColdPathConfig",
    "CursorConfig",
    "DeadLettersConfig",
    "HotPathConfig",
    "LimitsConfig",
    "PeerConfig",
    "PeerHealthConfig",
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
NODE_ID_BYTES_MAX: Final = 255


# Values ---------------------------------------------------------------------------------------


def parse_duration(value: Any) -> float:
    """Return seconds from "250ms", "5s", "2m", "3h", "7d" or a number of seconds.

    :raises ValueError: if it is none of these, negative, or over ten years.
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


def parse_size(value: Any) -> int:
    """Return bytes from a whole number or "16 MiB", "64KiB", "1GiB".

    :raises ValueError: if it is none of these or not positive.
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
    if not 0 < size <= 2**40 or size != int(size):
        raise ValueError("a size is a whole number of bytes, at least 1 and at most 1 TiB")
    return int(size)


def _check_node_id(value: str) -> str:
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        raise ValueError("a node id must be encodable as UTF-8") from None
    if not 0 < len(encoded) <= NODE_ID_BYTES_MAX:
        raise ValueError(f"a node id has 1 to {NODE_ID_BYTES_MAX} bytes")
    if not value.isprintable() or value.strip() != value:
        raise ValueError("a node id holds no control characters and no space around it")
    return value


def _check_prefix(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str) and value and not value.endswith(":"):
        raise ValueError(f'a prefix carries its own trailing colon: did you mean "{value}:"?')
    return value


def _check_url(value: str) -> str:
    """Accept what the transport can use; the value itself never stands in a message."""
    kinds = "redis://host:port/db, rediss://host:port/db or unix:///path"
    try:
        parts = urlsplit(value)
        port = parts.port
        query = parse_qs(parts.query)
    except ValueError:
        raise ValueError(f"the URL cannot be read (a port is 1 to 65535); use {kinds}") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"the URL must be {kinds}")
    if parts.scheme == "unix":
        if len(parts.path) < 2:
            raise ValueError("the URL names no socket; use unix:///path/to/redis.sock")
    else:
        if not parts.hostname:
            raise ValueError(f"the URL names no host; use {kinds}")
        if port == 0:
            raise ValueError("a port is 1 to 65535")
        database = parts.path.strip("/")
        if database and not (database.isascii() and database.isdigit()):
            raise ValueError("the database in the URL is a number, such as redis://host:6379/0")
    for number in query.get("db", []):
        if not (number.isascii() and number.isdigit()):
            raise ValueError("the database in the URL is a number")
    return value


Duration = Annotated[float, BeforeValidator(parse_duration)]
PositiveDuration = Annotated[float, Field(gt=0), BeforeValidator(parse_duration)]
Size = Annotated[int, BeforeValidator(parse_size)]
NodeId = Annotated[str, BeforeValidator(lambda v: _check_node_id(v) if isinstance(v, str) else v)]
Prefix = Annotated[str, BeforeValidator(_check_prefix)]
Url = Annotated[str, BeforeValidator(lambda v: _check_url(v) if isinstance(v, str) else v)]
Positive = Annotated[int, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]


# How problems are told ----------------------------------------------------------------------------


def _problems(model: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        path = _path(detail["loc"])
        if detail["type"] == "extra_forbidden":
            known = _keys_at(model, detail["loc"][:-1])
            near = difflib.get_close_matches(str(detail["loc"][-1]), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield f"{path}: unknown key{hint}"
        elif detail["type"] == "missing":
            yield f"{path}: this key is required"
        else:
            yield f"{path}: {detail['msg'].removeprefix('Value error, ')}"


def _path(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".") or "configuration"


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys a model has at a path, to guess what a misspelt one was meant to be."""
    here: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        here = here.model_fields[part].annotation if part in here.model_fields else model
        models = [here, *typing.get_args(here)]
        here = next((m for m in models if isinstance(m, type) and issubclass(m, BaseModel)), model)
    return list(here.model_fields)


if TYPE_CHECKING:
    _Base = BaseModel
else:

    class _Reporting(type(BaseModel)):
        """Turns pydantic's error into ours, where a model is built and not where one is nested."""

        def __call__(cls, **data):
            problems = []
            built = None
            try:
                built = super().__call__(**data)
            except ValidationError as error:
                problems += _problems(cls, error)
            problems += cls._cross_problems(data)
            if problems:
                raise ConfigError(problems) from None
            cls._notice(built, data)
            return built

    class _Base(BaseModel, metaclass=_Reporting):
        """Where the metaclass is hung in, out of sight of type checkers."""


class _Model(_Base):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        allow_inf_nan=False,
        # A default is compared with its neighbours too: a minimum may have been set above it.
        validate_default=True,
    )

    @classmethod
    def _cross_problems(cls, _data: Mapping[str, Any]) -> list[str]:
        """Return problems that show only when fields are seen together."""
        return []

    @classmethod
    def _notice(cls, _built: Self, _data: Mapping[str, Any]) -> None:
        """Note what is odd about the data, though no problem."""

    @classmethod
    def model_validate(cls, obj: Any, **_options: Any) -> Self:
        """Build from a mapping.

        :raises ConfigError: if anything about it is wrong.
        """
        if isinstance(obj, cls):
            return obj
        if not isinstance(obj, Mapping) or not all(isinstance(key, str) for key in obj):
            raise ConfigError(["configuration: a mapping of names to values is expected"])
        return cls(**obj)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed, checked like a new one.

        :raises ConfigError: if a change is wrong.
        """
        if deep:
            return type(self)(**{**self.model_dump(), **(update or {})})
        return type(self)(**{**dict(self), **(update or {})})


# Settings ---------------------------------------------------------------------------------------


class HotPathConfig(_Model):
    """Tailing the peers' streams.

    ``batch_size``: entries per read at the head, at first where it adapts; reads in bulk ask for
    ``max_batch_size``. ``block_timeout``: seconds a read waits at the head. With
    ``adaptive_batch_size`` a full read doubles the size up to ``max_batch_size``, and an empty one
    takes off a tenth or 10 down to ``min_batch_size``. ``rate_limit_*``: one token bucket for all
    peers, in events per second and events.
    """

    enabled: Flag = True
    batch_size: Positive = 100
    block_timeout: PositiveDuration = 5.0
    adaptive_batch_size: Flag = False
    min_batch_size: Positive = 50
    max_batch_size: Positive = 1000
    rate_limit_enabled: Flag = False
    rate_limit_per_sec: Annotated[float, Field(gt=0)] = 10_000
    rate_limit_burst: Positive = 1000

    @field_validator("max_batch_size")
    @classmethod
    def _check_range(cls, value: int, info: ValidationInfo) -> int:
        lowest, size = info.data.get("min_batch_size"), info.data.get("batch_size")
        if lowest is not None and lowest > value:
            raise ValueError(f"it is below min_batch_size, which is {lowest}")
        if size is not None and size > value:
            raise ValueError(f"it is below batch_size, which is {size}")
        adaptive = info.data.get("adaptive_batch_size")
        if adaptive and lowest is not None and size is not None and size < lowest:
            raise ValueError(f"batch_size, {size}, is below min_batch_size, {lowest}")
        return value


class ColdPathConfig(_Model):
    """Comparing trees. ``max_items_per_cycle`` is shared by all peers of a cycle."""

    enabled: Flag = True
    interval_sec: Annotated[float, Field(gt=0)] = 60
    max_items_per_cycle: Positive = 1000
    backoff_base_sec: Annotated[float, Field(gt=0)] = 5
    backoff_max_sec: Annotated[float, Field(gt=0)] = 300

    @field_validator("backoff_max_sec")
    @classmethod
    def _check_range(cls, value: float, info: ValidationInfo) -> float:
        base = info.data.get("backoff_base_sec")
        if base is not None and base > value:
            raise ValueError(f"it is below backoff_base_sec, which is {base:g}")
        return value


class PeerHealthConfig(_Model):
    """Pinging peers: every ``ping_interval_sec``, only those idle for ``idle_threshold_sec``."""

    enabled: Flag = True
    ping_interval_sec: Annotated[float, Field(gt=0)] = 30
    idle_threshold_sec: NotNegative = 60


class SloConfig(_Model):
    """Limits over which a metric counts; nothing else depends on them."""

    max_stream_read_latency_ms: Annotated[float, Field(gt=0)] = 100
    max_peer_op_latency_ms: Annotated[float, Field(gt=0)] = 500
    max_batch_flush_latency_ms: Annotated[float, Field(gt=0)] = 200
    max_replication_lag_sec: Annotated[float, Field(gt=0)] = 30


class StartupConfig(_Model):
    """Starting. ``timeout``: seconds for the first peer; ``when_no_peer``: fail, or run without."""

    timeout: PositiveDuration = 30.0
    when_no_peer: Literal["fail", "run"] = "fail"


class TimeoutsConfig(_Model):
    """Seconds that a call may take: connecting, a command to a peer, a call into the local store,
    a ping, a call to the cursor store, and the whole shutdown (of which a fifth is kept for closing).
    """

    connect: PositiveDuration = 10.0
    command: PositiveDuration = 5.0
    store_call: PositiveDuration = 10.0
    ping: PositiveDuration = 5.0
    cursor: PositiveDuration = 5.0
    drain: PositiveDuration = 10.0


class LimitsConfig(_Model):
    """Bounds. ``payload_bytes``: one content after decompression; ``batch_bytes``: half of the
    memory of one link; ``dead_letters``: kept per peer; ``journal``: moves kept in memory.
    """

    payload_bytes: Size = 16 * 1024**2
    batch_bytes: Size = 64 * 1024**2
    dead_letters: Positive = 10_000
    journal: Positive = 1000

    @field_validator("batch_bytes")
    @classmethod
    def _check_range(cls, value: int, info: ValidationInfo) -> int:
        payload = info.data.get("payload_bytes")
        if payload is not None and payload > value:
            raise ValueError(f"it is below payload_bytes, which is {payload}")
        return value


class DeadLettersConfig(_Model):
    """What happens when a peer's dead letters are full: pause its link, or drop the oldest."""

    when_full: Literal["pause", "drop_oldest"] = "pause"


class TombstonesConfig(_Model):
    """How long deletes are remembered: ``ttl`` seconds, the same at every node of a mesh, and
    ``grace`` seconds more in the store.
    """

    ttl: PositiveDuration = 7 * 86_400.0
    grace: Duration = 86_400.0


class RepairConfig(_Model):
    """The interlock: a link pauses when replication would delete more than this share of the live
    keys, and more than ``interlock_min`` of them, within an hour.
    """

    interlock_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    interlock_min: Annotated[int, Field(ge=0, strict=True)] = 1000


class Settings(_Model):
    """Everything that is the same for all peers."""

    hot_path: HotPathConfig = HotPathConfig()
    cold_path: ColdPathConfig = ColdPathConfig()
    peer_health: PeerHealthConfig = PeerHealthConfig()
    slo: SloConfig = SloConfig()
    startup: StartupConfig = StartupConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    limits: LimitsConfig = LimitsConfig()
    dead_letters: DeadLettersConfig = DeadLettersConfig()
    tombstones: TombstonesConfig = TombstonesConfig()
    repair: RepairConfig = RepairConfig()


class _HasUrl(_Model):
    @property
    def display_url(self) -> str:
        """The URL without credentials, for logs and screens."""
        return redact(getattr(self, "redis_url", None) or "")


class PeerConfig(_HasUrl):
    """One peer. Those of a lower ``priority`` number are served first in start and repair; its
    circuit opens after ``circuit_failure_threshold`` failures for ``circuit_reset_timeout_sec``.
    ``allow_echo``: read a foreign node that also reads us.
    """

    node_id: NodeId
    redis_url: Url = Field(repr=False)
    priority: Annotated[int, Field(strict=True)] = 0
    circuit_failure_threshold: Positive = 5
    circuit_reset_timeout_sec: Annotated[float, Field(gt=0)] = 30
    redis_prefix: Prefix = ""
    allow_echo: Flag = False


class CursorConfig(_Model):
    """The file that remembers how far each peer was read. ":memory:" forgets, for tests."""

    sqlite_path: Annotated[str, Field(min_length=1)] = "replication_cursors.db"
    wal_mode: Flag = True


class StoreConfig(_HasUrl):
    """The node's own store, for ``fsm-replication run``. ``stream_maxlen``: entries its stream
    keeps, about; ``layouts``: the trees it publishes, "own" always, "dotted" for foreign readers.
    """

    kind: Literal["redis", "memory", "noop"]
    redis_url: Url | None = Field(default=None, repr=False)
    redis_prefix: Prefix = ""
    stream_maxlen: Positive = 100_000
    layouts: tuple[Literal["own", "dotted"], ...] = ("own",)

    @field_validator("layouts")
    @classmethod
    def _check_layouts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "own" not in value or len(set(value)) != len(value):
            raise ValueError('it names each layout once, and "own" among them')
        return value

    @classmethod
    def _cross_problems(cls, data: Mapping[str, Any]) -> list[str]:
        if data.get("kind") == "redis" and not data.get("redis_url"):
            return ["redis_url: needed where kind is redis"]
        return []


class ReplicationConfig(_Model):
    """A node: who it is, whom it reads, and how. ``store`` is needed by the command line only."""

    local_node_id: NodeId
    settings: Settings = Settings()
    peers: Sequence[PeerConfig] = ()
    cursor: CursorConfig = CursorConfig()
    store: StoreConfig | None = None
    _left_out: tuple[str, ...] = PrivateAttr(default=())

    @field_validator("peers")
    @classmethod
    def _leave_self_out(
        cls, value: Sequence[PeerConfig], info: ValidationInfo
    ) -> Sequence[PeerConfig]:
        me = info.data.get("local_node_id")
        return tuple(peer for peer in value if peer.node_id != me)

    @classmethod
    def _cross_problems(cls, data: Mapping[str, Any]) -> list[str]:
        problems = []
        seen: dict[Any, int] = {}
        for index, node_id in enumerate(_peer_ids(data)):
            if node_id is not None and node_id in seen:
                where = f"peers[{index}].node_id"
                problems.append(f"{where}: {node_id!r} is peers[{seen[node_id]}] already")
            else:
                seen[node_id] = index
        store = data.get("store")
        if isinstance(store, Mapping):
            problems += [f"store.{p}" for p in StoreConfig._cross_problems(store)]  # noqa: SLF001
        return problems

    @classmethod
    def _notice(cls, built: Self, data: Mapping[str, Any]) -> None:
        if built.local_node_id in set(_peer_ids(data)):
            left_out = f"peer {built.local_node_id!r} is this node itself and is left out"
            built._left_out = (left_out,)  # noqa: SLF001

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd but no problem."""
        return self._left_out

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file.

        :raises ConfigError: if it cannot be read or anything in it is wrong.
        """
        source = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError([f"file: {why}"], source=source) from None
        try:
            # The loader is a safe one: it makes plain values only.
            data = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
            raise ConfigError([f"{where}: {error.problem}"], source=source) from None
        except yaml.YAMLError as error:
            raise ConfigError([f"file: it is not YAML: {error}"], source=source) from None
        try:
            return cls.model_validate(data)
        except ConfigError as error:
            raise ConfigError(error.problems, source=source) from None

    def changed_paths(self, other: ReplicationConfig) -> tuple[str, ...]:
        """Return the dotted paths whose values differ; peers are named by node id."""
        mine, theirs = _flat(self), _flat(other)
        return tuple(sorted(p for p in mine.keys() | theirs.keys() if mine.get(p) != theirs.get(p)))


def _peer_ids(data: Mapping[str, Any]) -> Iterator[Any]:
    peers = data.get("peers")
    for peer in peers if isinstance(peers, list | tuple) else ():
        node_id = peer.get("node_id") if isinstance(peer, Mapping) else None
        node_id = peer.node_id if isinstance(peer, PeerConfig) else node_id
        yield node_id if isinstance(node_id, str) else None


def _flat(config: ReplicationConfig) -> dict[str, Any]:
    plain = config.model_dump()
    plain["peers"] = {peer["node_id"]: peer for peer in plain["peers"]}
    flat: dict[str, Any] = {}
    queue: list[tuple[str, Any]] = [("", plain)]
    while queue:
        path, value = queue.pop()
        if isinstance(value, dict):
            queue += [(f"{path}.{name}".lstrip("."), part) for name, part in value.items()]
        else:
            flat[path] = value
    return flat


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(getattr(key_node, "value", key_node))
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
