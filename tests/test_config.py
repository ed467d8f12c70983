"""The configuration: every rule, every problem at once, and no secret ever shown."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fsm_replication.config import (
    ColdPathConfig,
    CursorConfig,
    HotPathConfig,
    LimitsConfig,
    PeerConfig,
    ReconnectConfig,
    ReplicationConfig,
    Settings,
    StoreConfig,
    TimeoutsConfig,
    TombstonesConfig,
    parse_duration,
    parse_size,
    yaml_file,
)
from fsm_replication.config import model as model_module
from fsm_replication.config.values import SECONDS_MAX
from fsm_replication.errors import ConfigError

REQUIRED = object()
NEEDED: dict[str, Any] = {"local_node_id": "a"}
PEER: dict[str, Any] = {"node_id": "b", "redis_url": "redis://h:6379/0"}
SECRET = "hunter2"

# The table of the specification: path -> default.
TABLE: dict[str, Any] = {
    "local_node_id": REQUIRED,
    "settings.hot_path.enabled": True,
    "settings.hot_path.batch_size": 100,
    "settings.hot_path.block_timeout": 5,
    "settings.hot_path.adaptive_batch_size": False,
    "settings.hot_path.min_batch_size": 50,
    "settings.hot_path.max_batch_size": 1000,
    "settings.hot_path.rate_limit_enabled": False,
    "settings.hot_path.rate_limit_per_sec": 10_000,
    "settings.hot_path.rate_limit_burst": 1000,
    "settings.cold_path.enabled": True,
    "settings.cold_path.interval_sec": 60,
    "settings.cold_path.max_items_per_cycle": 1000,
    "settings.cold_path.backoff_base_sec": 5,
    "settings.cold_path.backoff_max_sec": 300,
    "settings.peer_health.enabled": True,
    "settings.peer_health.ping_interval_sec": 30,
    "settings.peer_health.idle_threshold_sec": 60,
    "settings.circuits.writes.failures": 3,
    "settings.circuits.writes.successes": 3,
    "settings.circuits.writes.reset_first": 1,
    "settings.circuits.writes.reset_max": 60,
    "settings.circuits.reads.failures": 5,
    "settings.circuits.reads.successes": 2,
    "settings.circuits.reads.reset_first": 1,
    "settings.circuits.reads.reset_max": 30,
    "settings.circuits.look_interval": 2,
    "settings.slo.max_stream_read_latency_ms": 100,
    "settings.slo.max_peer_op_latency_ms": 500,
    "settings.slo.max_batch_flush_latency_ms": 200,
    "settings.slo.max_replication_lag_sec": 30,
    "peers[].node_id": REQUIRED,
    "peers[].redis_url": REQUIRED,
    "peers[].priority": 0,
    "peers[].circuit_failure_threshold": 5,
    "peers[].circuit_reset_timeout_sec": 30,
    "peers[].redis_prefix": "",
    "peers[].allow_echo": False,
    "cursor.sqlite_path": "replication_cursors.db",
    "cursor.wal_mode": True,
    "store.kind": REQUIRED,
    "store.redis_url": None,
    "store.redis_prefix": "",
    "store.stream_maxlen": 100_000,
    "store.layouts": ("own",),
    "store.allow_eviction": False,
    "settings.startup.timeout": 30,
    "settings.startup.when_no_peer": "fail",
    "settings.reconnect.first": 1,
    "settings.reconnect.longest": 30,
    "settings.reconnect.rejected": 300,
    "settings.timeouts.connect": 10,
    "settings.timeouts.command": 5,
    "settings.timeouts.store_call": 10,
    "settings.timeouts.ping": 5,
    "settings.timeouts.cursor": 5,
    "settings.timeouts.drain": 10,
    "settings.limits.payload_bytes": 16 * 1024 * 1024,
    "settings.limits.batch_bytes": 64 * 1024 * 1024,
    "settings.limits.dead_letters": 10_000,
    "settings.limits.dead_letter_bytes": 256 * 1024**2,
    "settings.limits.journal": 1000,
    "settings.dead_letters.when_full": "pause",
    "settings.tombstones.ttl": 604_800,
    "settings.tombstones.grace": 86_400,
    "settings.repair.interlock_share": 0.2,
    "settings.repair.interlock_min": 1000,
}


def problems_of(build: Callable[[], Any]) -> tuple[str, ...]:
    """Return what a ConfigError tells; any other outcome fails the test."""
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None, "pydantic's error hangs on, with its inputs"
    return caught.value.problems


def peer(**changes: Any) -> PeerConfig:
    """Return a good peer with some keys changed."""
    return PeerConfig(**{**PEER, **changes})


def fields_of(model: type[BaseModel], path: str = "") -> dict[str, type[BaseModel]]:
    """Return every leaf of a model by its path in the notation of the table."""
    leaves: dict[str, type[BaseModel]] = {}
    for name in model.model_fields:
        inner = model_module._submodel(model, name)
        where = f"{path}.{name}".lstrip(".")
        if inner is None:
            leaves[where] = model
        else:
            leaves |= fields_of(inner, f"{where}[]" if name == "peers" else where)
    return leaves


# The table --------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_a_field_and_every_field_a_row() -> None:
    """A key of the specification would be missing, or one would exist that nobody documented."""
    assert fields_of(ReplicationConfig).keys() == TABLE.keys()


@pytest.mark.parametrize("path", TABLE)
def test_a_row_has_its_default(path: str) -> None:
    """A default would differ from the documented one."""
    field = fields_of(ReplicationConfig)[path].model_fields[path.rpartition(".")[2]]
    if TABLE[path] is REQUIRED:
        assert field.is_required()
        return
    built = ReplicationConfig(local_node_id="a", peers=[peer()], store=StoreConfig(kind="noop"))
    value: Any = built
    for name in path.split("."):
        value = value.peers[0] if name == "peers[]" else getattr(value, name)
    assert value == TABLE[path]
    assert type(value) is type(field.default) or isinstance(value, float)


@pytest.mark.parametrize("path", TABLE)
def test_every_field_is_described(path: str) -> None:
    """A key would have no text that says its unit, its zero and what to choose."""
    field = fields_of(ReplicationConfig)[path].model_fields[path.rpartition(".")[2]]
    assert field.description
    assert len(field.description) > len("what it is")


# Values -----------------------------------------------------------------------------------------

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@given(st.integers(0, 3650), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_a_duration_in_text_is_number_times_unit(number: int, unit: str, space: str) -> None:
    """A unit would be read as another, which turns seconds into days."""
    assert parse_duration(f"{number}{space}{unit}") == pytest.approx(number * UNITS[unit])


@given(st.floats(0, SECONDS_MAX) | st.integers(0, int(SECONDS_MAX)))
def test_a_duration_as_a_number_is_seconds(seconds: float) -> None:
    """A number would not stand for itself."""
    assert parse_duration(seconds) == seconds
    assert type(parse_duration(seconds)) is float


@given(st.floats() | st.integers() | st.text() | st.booleans() | st.none() | st.binary())
def test_a_duration_is_in_range_or_refused(value: object) -> None:
    """Some input would crash the parser, or come out negative, infinite or not a number."""
    try:
        seconds = parse_duration(value)
    except ValueError:
        return
    assert 0 <= seconds <= SECONDS_MAX
    assert not isinstance(value, bool)


@pytest.mark.parametrize(
    "value",
    [
        *(True, False, math.nan, math.inf, -1, -0.5, 10**400, None, [5]),
        *("", "s", "nan", "inf", "-5s", ".5s", "5S", "5 weeks", "1e3s", "1m30s", "5s\x00"),
        *("9" * 400 + "d", "\N{ARABIC-INDIC DIGIT FIVE}s"),
    ],
)
def test_a_bad_duration_is_refused(value: object) -> None:
    """A slip in a duration would be taken for another time."""
    with pytest.raises(ValueError, match="a duration is"):
        parse_duration(value)


@given(st.integers(1, 1023), st.sampled_from([("KiB", 1024), ("MiB", 1024**2), ("GiB", 1024**3)]))
def test_a_size_in_text_is_number_times_unit(number: int, unit: tuple[str, int]) -> None:
    """A size would be read in another unit."""
    assert parse_size(f"{number} {unit[0]}") == number * unit[1]
    assert parse_size(f"{number}{unit[0].lower()}") == number * unit[1]


@given(st.integers(1, 2**40))
def test_a_size_as_a_number_is_bytes(size: int) -> None:
    """A number of bytes would not stand for itself, as a number or as text."""
    assert parse_size(size) == parse_size(str(size)) == size


@given(st.floats() | st.integers() | st.text() | st.booleans() | st.none() | st.binary())
def test_a_size_is_in_range_or_refused(value: object) -> None:
    """Some input would crash the parser, or come out as no size."""
    try:
        size = parse_size(value)
    except ValueError:
        return
    assert 1 <= size <= 2**40
    assert not isinstance(value, bool | float)


@pytest.mark.parametrize(
    "value", [0, -1, True, 1.5, math.nan, "0", "1.5", "5 MB", "2 TiB", 2**41, "9" * 400, None, ""]
)
def test_a_bad_size_is_refused(value: object) -> None:
    """A size that no memory has, or in a unit that means two things, would be taken."""
    with pytest.raises(ValueError, match="a size is"):
        parse_size(value)


@pytest.mark.parametrize("node_id", ["a", "x" * 255, "é" * 127, "site a", "🜁", "a.b:c"])
def test_a_good_node_id_is_taken(node_id: str) -> None:
    """A name that is fine would be refused."""
    assert ReplicationConfig(local_node_id=node_id).local_node_id == node_id
    assert peer(node_id=node_id).node_id == node_id


@pytest.mark.parametrize(
    "node_id", ["", "x" * 256, "é" * 128, "a\nb", "a\x00", "\x7f", "\ud800", "a\u2028b", " a", 5]
)
def test_a_bad_node_id_is_refused(node_id: Any) -> None:
    """A name that breaks logs, Redis or the eye would be taken, here or in a peer."""
    assert [p.split(":")[0] for p in problems_of(lambda: peer(node_id=node_id))] == ["node_id"]
    found = problems_of(lambda: ReplicationConfig(local_node_id=node_id))
    assert [p.split(":")[0] for p in found] == ["local_node_id"]


@pytest.mark.parametrize(("given_prefix", "held"), [(None, ""), ("", ""), ("site-a:", "site-a:")])
def test_a_good_prefix_is_taken(given_prefix: str | None, held: str) -> None:
    """No prefix would be anything but the empty one."""
    assert peer(redis_prefix=given_prefix).redis_prefix == held


def test_a_prefix_without_its_colon_gets_a_suggestion() -> None:
    """Keys would run into the prefix, as in site-acdc, and nobody would say why."""
    (problem,) = problems_of(lambda: StoreConfig(kind="noop", redis_prefix="site-a"))
    assert problem.startswith("redis_prefix: ")
    assert '"site-a:"' in problem


GOOD_URLS = [
    "redis://h",
    "redis://h:6379",
    "redis://h:6379/15",
    "redis://h/0/",
    "redis://user:p%40ss@h:1/2",
    "redis://:pw@[::1]:6379",
    "rediss://h:65535?ssl_cert_reqs=none&db=3",
    "unix:///run/redis.sock",
    "unix:///run/redis.sock?db=1&password=x",
    "unix://user:pw@/run/redis.sock",
]


@pytest.mark.parametrize("url", GOOD_URLS)
def test_a_good_url_is_taken_as_it_is(url: str) -> None:
    """A URL that works would be refused or changed."""
    assert peer(redis_url=url).redis_url == url


BAD_URLS = [
    "",
    "h:6379",
    f"http://u:{SECRET}@h",
    f"REDIS://u:{SECRET}@h",
    f"redis://u:{SECRET}@",
    f"redis://u:{SECRET}@:6379",
    f"redis://u:{SECRET}@h:0",
    f"redis://u:{SECRET}@h:65536",
    f"redis://u:{SECRET}@h:six",
    f"redis://u:{SECRET}@h:-1",
    f"redis://u:{SECRET}@h/x",
    f"redis://u:{SECRET}@h/-1",
    f"redis://u:{SECRET}@h/1/2",
    f"redis://u:{SECRET}@h/{'9' * 10}",
    f"redis://u:{SECRET}@h?db=-1",
    f"redis://u:{SECRET}@h?db=",
    f"redis://u:{SECRET}@h?ssl_password={SECRET}",
    f"redis://u:{SECRET}/x@h",
    f"redis://u:{SECRET}#x@h",
    f"redis://u:12#{SECRET}@h",
    f"redis://u:12?{SECRET}@h",
    f"redis://u:{SECRET} x@h",
    f"redis://u:{SECRET}\n@h",
    f"redis://u:{SECRET}@[::1",
    f"unix://u:{SECRET}@",
    f"unix://u:{SECRET}@/",
    f"unix://u:{SECRET}@run/redis.sock",
    f"unix:///run/%00{SECRET}",
    "redis://***@h",
    "redis://h?password=***",
]


@pytest.mark.parametrize("url", [*BAD_URLS, 5, None, b"redis://h", [f"redis://u:{SECRET}@h"]])
def test_a_bad_url_is_refused_without_showing_it(url: Any) -> None:
    """A URL that cannot work would be found only at run time, or the error would tell the password."""
    with pytest.raises(ConfigError) as caught:
        peer(redis_url=url)
    assert [p.split(":")[0] for p in caught.value.problems] == ["redis_url"]
    assert SECRET not in f"{caught.value!s}{caught.value!r}{vars(caught.value)}"


@pytest.mark.parametrize(
    ("model", "values", "path"),
    [
        (HotPathConfig, {"block_timeout": 0}, "block_timeout"),
        (HotPathConfig, {"block_timeout": "0ms"}, "block_timeout"),
        (HotPathConfig, {"block_timeout": 0.0004}, "block_timeout"),
        (HotPathConfig, {"batch_size": 0}, "batch_size"),
        (HotPathConfig, {"batch_size": True}, "batch_size"),
        (HotPathConfig, {"batch_size": 10**10}, "batch_size"),
        (HotPathConfig, {"batch_size": "100"}, "batch_size"),
        (HotPathConfig, {"enabled": 1}, "enabled"),
        (HotPathConfig, {"enabled": "yes"}, "enabled"),
        (HotPathConfig, {"rate_limit_per_sec": 0}, "rate_limit_per_sec"),
        (HotPathConfig, {"rate_limit_per_sec": math.nan}, "rate_limit_per_sec"),
        (HotPathConfig, {"rate_limit_per_sec": True}, "rate_limit_per_sec"),
        (ColdPathConfig, {"interval_sec": 0}, "interval_sec"),
        (ColdPathConfig, {"interval_sec": True}, "interval_sec"),
        (TimeoutsConfig, {"drain": 0}, "drain"),
        (TombstonesConfig, {"ttl": 0}, "ttl"),
        (TombstonesConfig, {"grace": -1}, "grace"),
        (LimitsConfig, {"journal": 0}, "journal"),
        (LimitsConfig, {"payload_bytes": "many"}, "payload_bytes"),
        (Settings, {"repair": {"interlock_share": 1.01}}, "repair.interlock_share"),
        (Settings, {"repair": {"interlock_share": -0.01}}, "repair.interlock_share"),
        (Settings, {"repair": {"interlock_share": True}}, "repair.interlock_share"),
        (Settings, {"repair": {"interlock_share": math.nan}}, "repair.interlock_share"),
        (Settings, {"repair": {"interlock_min": -1}}, "repair.interlock_min"),
        (Settings, {"slo": {"max_peer_op_latency_ms": "1"}}, "slo.max_peer_op_latency_ms"),
        (Settings, {"slo": {"max_peer_op_latency_ms": 0}}, "slo.max_peer_op_latency_ms"),
        (Settings, {"startup": {"when_no_peer": "wait"}}, "startup.when_no_peer"),
        (Settings, {"dead_letters": {"when_full": "drop"}}, "dead_letters.when_full"),
        (Settings, {"hot_path": None}, "hot_path"),
        (Settings, {"hot_path": [1]}, "hot_path"),
        (CursorConfig, {"sqlite_path": ""}, "sqlite_path"),
        (CursorConfig, {"sqlite_path": "a\x00b"}, "sqlite_path"),
        (StoreConfig, {"kind": "sqlite"}, "kind"),
        (StoreConfig, {}, "kind"),
        (StoreConfig, {"kind": "redis"}, "redis_url"),
        (StoreConfig, {"kind": "redis", "redis_url": None}, "redis_url"),
        (StoreConfig, {"kind": "noop", "layouts": ["dotted"]}, "layouts"),
        (StoreConfig, {"kind": "noop", "layouts": []}, "layouts"),
        (StoreConfig, {"kind": "noop", "layouts": ["own", "own"]}, "layouts"),
        (StoreConfig, {"kind": "noop", "layouts": "own"}, "layouts"),
        (StoreConfig, {"kind": "noop", "layouts": ["own", "flat"]}, "layouts[1]"),
        (PeerConfig, {"node_id": "b"}, "redis_url"),
        (PeerConfig, {**PEER, "priority": 1.5}, "priority"),
        (PeerConfig, {**PEER, "circuit_failure_threshold": 0}, "circuit_failure_threshold"),
        (ReplicationConfig, {}, "local_node_id"),
        (ReplicationConfig, {**NEEDED, "peers": "b"}, "peers"),
        (ReplicationConfig, {**NEEDED, "peers": None}, "peers"),
        (ReplicationConfig, {**NEEDED, "peers": [5]}, "peers[0]"),
    ],
)
def test_a_value_out_of_range_is_one_problem(
    model: type[BaseModel], values: dict[str, Any], path: str
) -> None:
    """A value that breaks a rule would be taken, or told at another path, or told twice."""
    (problem,) = problems_of(lambda: model(**values))
    assert problem.startswith(f"{path}: ")
    assert "pydantic" not in problem


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (Settings, {"repair": {"interlock_share": 0, "interlock_min": 0}}),
        (Settings, {"repair": {"interlock_share": 1}}),
        (Settings, {"tombstones": {"grace": 0}}),
        (Settings, {"peer_health": {"idle_threshold_sec": 0}}),
        (HotPathConfig, {"block_timeout": "1ms"}),
        (HotPathConfig, {"min_batch_size": 7, "max_batch_size": 7}),
        (HotPathConfig, {"batch_size": 2000}),
        (HotPathConfig, {"batch_size": 1}),
        (LimitsConfig, {"payload_bytes": "64 MiB"}),
        (StoreConfig, {"kind": "redis", "redis_url": "redis://h", "layouts": ["dotted", "own"]}),
        (StoreConfig, {"kind": "memory"}),
        (CursorConfig, {"sqlite_path": Path("x.db")}),
    ],
)
def test_a_value_at_a_bound_is_taken(model: type[BaseModel], values: dict[str, Any]) -> None:
    """A rule would refuse more than it says."""
    assert isinstance(model(**values), model)


# Fields together, and all at once -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "values", "path", "other"),
    [
        (HotPathConfig, {"min_batch_size": 9, "max_batch_size": 8}, "max_batch_size", "min_"),
        (HotPathConfig, {"min_batch_size": 1001}, "max_batch_size", "min_batch_size"),
        (HotPathConfig, {"adaptive_batch_size": True, "batch_size": 49}, "batch_size", "min_"),
        (HotPathConfig, {"adaptive_batch_size": True, "batch_size": 1001}, "batch_size", "max_"),
        (ColdPathConfig, {"backoff_base_sec": "10m"}, "backoff_max_sec", "backoff_base_sec"),
        (ReconnectConfig, {"first": "10m"}, "longest", "first"),
        (LimitsConfig, {"payload_bytes": "65 MiB"}, "batch_bytes", "payload_bytes"),
    ],
)
def test_fields_that_do_not_fit_each_other(
    model: type[BaseModel], values: dict[str, Any], path: str, other: str
) -> None:
    """Bounds the wrong way round would be taken; also one that contradicts a default."""
    (problem,) = problems_of(lambda: model(**values))
    assert problem.startswith(f"{path}: ")
    assert other in problem


def test_what_can_be_judged_together_is_judged_although_a_neighbour_is_wrong() -> None:
    """A wrong field would hide that others do not fit, and the user would mend twice."""
    found = problems_of(
        lambda: HotPathConfig.model_validate(
            {"adaptive_batch_size": True, "batch_size": 5, "max_batch_size": "x", "tpyo": 1}
        )
    )
    assert {p.split(":")[0] for p in found} == {"batch_size", "max_batch_size", "tpyo"}


def test_a_wrong_field_is_not_judged_by_its_default() -> None:
    """A second problem would be told that the user never made."""
    wrong = {"min_batch_size": 2000, "max_batch_size": "x"}
    (problem,) = problems_of(lambda: HotPathConfig.model_validate(wrong))
    assert problem == "max_batch_size: a whole number is expected"


def test_a_node_id_that_stands_three_times_points_at_the_first() -> None:
    """The error would name a peer that is not the one."""
    peers = [peer(node_id="c"), peer(), peer(), peer()]
    found = problems_of(lambda: ReplicationConfig(local_node_id="a", peers=peers))
    assert found == (
        "peers[2].node_id: peers[1] has the same one",
        "peers[3].node_id: peers[1] has the same one",
    )


EVERYTHING_WRONG: dict[str, Any] = {
    "local_node_id": "",
    "peers": [
        {"node_id": "b", "redis_url": f"http://u:{SECRET}@h"},
        {"node_id": "b", "redis_url": f"redis://u:{SECRET}@h:x", "priorty": 1},
        {"node_id": "c"},
        7,
    ],
    "settings": {
        "hot_path": {"batch_size": 0, "min_batch_size": 2000, "block_timeout": 0},
        "cold_path": {"backoff_base_sec": 400, "interval_sec": "soon"},
        "limits": {"payload_bytes": "1 GiB"},
        "repair": {"interlock_share": 2},
        "slo": 5,
    },
    "cursor": {"wal": True},
    "store": {"kind": "redis", "layouts": ["dotted"]},
}
WRONG_PATHS = {
    "local_node_id",
    "peers[0].redis_url",
    "peers[1].redis_url",
    "peers[1].node_id",
    "peers[1].priorty",
    "peers[2].redis_url",
    "peers[3]",
    "settings.hot_path.batch_size",
    "settings.hot_path.block_timeout",
    "settings.hot_path.max_batch_size",
    "settings.cold_path.backoff_max_sec",
    "settings.cold_path.interval_sec",
    "settings.limits.batch_bytes",
    "settings.repair.interlock_share",
    "settings.slo",
    "cursor.wal",
    "store.redis_url",
    "store.layouts",
}


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    """A problem at some level would hide one at another; or YAML and Python would differ."""
    found = problems_of(lambda: ReplicationConfig(**EVERYTHING_WRONG))
    assert {p.split(":")[0] for p in found} == WRONG_PATHS
    assert len(found) == len(WRONG_PATHS)
    assert problems_of(lambda: ReplicationConfig.model_validate(EVERYTHING_WRONG)) == found
    file = tmp_path / "node.yaml"
    file.write_text(yaml.safe_dump(EVERYTHING_WRONG))
    with pytest.raises(ConfigError) as caught:
        ReplicationConfig.load(file)
    assert caught.value.problems == found
    assert caught.value.source == str(file)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values", "guess"),
    [
        ("batch_sizes", {"settings": {"hot_path": {"batch_sizes": 1}}}, "batch_size"),
        ("BATCH-SIZE", {"settings": {"hot_path": {"BATCH-SIZE": 1}}}, "batch_size"),
        ("prioriti", {"peers": [{**PEER, "prioriti": 1}]}, "priority"),
        ("knid", {"store": {"kind": "noop", "knid": 1}}, "kind"),
        ("timeouts", {"timeouts": {}}, "settings.timeouts"),
        ("peer", {"peer": []}, "peers"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(key: str, values: dict[str, Any], guess: str) -> None:
    """A misspelt or misplaced key would be ignored, or refused without a hint."""
    (problem,) = problems_of(lambda: ReplicationConfig(**NEEDED, **values))
    assert problem.split(":")[0].endswith(key)
    assert problem.endswith(f"unknown key; did you mean {guess!r}?")


def test_an_unknown_key_like_no_other_gets_no_suggestion() -> None:
    """A guess would lead astray."""
    assert problems_of(lambda: CursorConfig.model_validate({"zebra": 1})) == ("zebra: unknown key",)


@pytest.mark.parametrize("key", ["cls", "self", "data", "warnings", "_warnings"])
def test_a_key_that_is_a_name_of_the_code_is_an_unknown_key(key: str) -> None:
    """A key would meet a parameter or an attribute of the same name and crash or overwrite it."""
    (problem,) = problems_of(lambda: ReplicationConfig.model_validate({**NEEDED, key: 1}))
    assert problem.startswith(f"{key}: unknown key")


# However it is built ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: HotPathConfig(batch_size=0),
        lambda: HotPathConfig.model_validate({"batch_size": 0}),
        lambda: HotPathConfig.model_validate_json('{"batch_size": 0}'),
        lambda: HotPathConfig.model_validate_strings({"batch_size": "0"}),
        lambda: HotPathConfig().model_copy(update={"batch_size": 0}),
        lambda: HotPathConfig().model_copy(update={"batch_size": 0}, deep=True),
    ],
)
def test_a_bad_model_is_a_config_error_however_built(build: Callable[[], Any]) -> None:
    """Some way of building would raise pydantic's error, or none."""
    (problem,) = problems_of(build)
    assert problem.startswith("batch_size: ")


@pytest.mark.parametrize("data", [None, 5, "x", [], [("local_node_id", "a")]])
def test_what_is_no_mapping_is_a_config_error(data: Any) -> None:
    """Something that is no configuration at all would raise another error."""
    (problem,) = problems_of(lambda: ReplicationConfig.model_validate(data))
    assert problem == "configuration: a mapping of keys to values is expected"


def test_keys_that_are_no_text_are_problems() -> None:
    """A number as a key, as YAML makes them, would crash."""
    data: dict[Any, Any] = {**NEEDED, 1: 2, "cursor": {None: 3}}
    found = problems_of(lambda: ReplicationConfig.model_validate(data))
    assert len(found) == 2
    assert all(problem.endswith("a key is text") for problem in found)


def test_a_field_cannot_be_set_or_deleted() -> None:
    """A model could become wrong after it was checked, or the attempt would print a URL."""
    built: Any = peer()
    with pytest.raises(ConfigError) as caught:
        built.redis_url = f"redis://u:{SECRET}@h"
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError):
        del built.node_id
    assert built == peer()


def test_built_from_python_objects() -> None:
    """Embedding would need dictionaries."""
    hot = HotPathConfig(block_timeout=0.25)
    built = ReplicationConfig(
        local_node_id="a", peers=[peer(), peer(node_id="c")], settings=Settings(hot_path=hot)
    )
    assert built.settings.hot_path is hot
    assert built.peers == (peer(), peer(node_id="c"))
    assert hash(built) == hash(copy.deepcopy(built))
    assert pickle.loads(pickle.dumps(built)) == built


def test_objects_and_dictionaries_can_be_mixed() -> None:
    """Duplicates would be found only among dictionaries or only among objects."""
    (problem,) = problems_of(
        lambda: ReplicationConfig.model_validate({**NEEDED, "peers": [peer(), PEER]})
    )
    assert problem.startswith("peers[1].node_id: ")


def test_the_rules_hold_inside_a_model_of_the_users() -> None:
    """An application's own pydantic settings could hold a configuration that breaks rules."""

    class Application(BaseModel):
        node: ReplicationConfig

    with pytest.raises(ValidationError) as caught:
        Application.model_validate({"node": EVERYTHING_WRONG})
    assert len(caught.value.errors()) == len(WRONG_PATHS)
    assert SECRET not in f"{caught.value}{caught.value.errors()}"
    good = {**NEEDED, "peers": [PEER, {**PEER, "node_id": "a"}]}
    built = Application.model_validate({"node": good}).node
    assert len(built.peers) == len(built.warnings) == 1


def test_a_copy_changes_what_is_asked_and_is_checked() -> None:
    """A copy would lose or invent a change, or not be checked against its neighbours."""
    hot = HotPathConfig(min_batch_size=10)
    assert hot.model_copy(update={"max_batch_size": 20}).max_batch_size == 20
    assert hot.model_copy() == hot
    assert hot.model_copy().model_fields_set == {"min_batch_size"}
    found = problems_of(lambda: hot.model_copy(update={"max_batch_size": 9}))
    assert found[0].startswith("max_batch_size: ")
    assert problems_of(lambda: hot.model_copy(update={"nonsense": 9})) == ("nonsense: unknown key",)


# Peers ------------------------------------------------------------------------------------------


def test_this_node_among_its_peers_is_left_out_with_a_warning() -> None:
    """A node would replicate from itself, or drop a peer and say nothing."""
    built = ReplicationConfig(local_node_id="b", peers=[peer(node_id="c"), peer()])
    assert [p.node_id for p in built.peers] == ["c"]
    (warning,) = built.warnings
    assert "peers[1]" in warning
    assert "'b'" in warning


def test_a_copy_keeps_its_warnings_until_its_peers_change() -> None:
    """A reconfiguration would forget that a peer was left out, or warn of one long gone."""
    built = ReplicationConfig(local_node_id="b", peers=[peer()])
    assert built.model_copy(update={"settings": Settings()}).warnings == built.warnings
    assert built.model_copy(update={"peers": []}).warnings == ()


def test_no_warnings_without_cause() -> None:
    """A good configuration would be met with a warning."""
    assert ReplicationConfig(local_node_id="a", peers=[peer()]).warnings == ()


# Secrets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"redis://u:{SECRET}@h:1/0",
        f"redis://{SECRET}@h",
        f"rediss://:{SECRET}@h?password={SECRET}&username={SECRET}",
        f"unix://u:{SECRET}@/run/redis.sock?password={SECRET}",
        f"redis://u:{SECRET}@{SECRET}@h",
    ],
)
def test_credentials_are_held_and_never_shown(url: str) -> None:
    """A password would land in a log, a screen or a JSON dump; or get lost on the way."""
    store = StoreConfig(kind="redis", redis_url=url)
    built = ReplicationConfig(local_node_id="a", peers=[peer(redis_url=url)], store=store)
    assert built.peers[0].redis_url == store.redis_url == url
    shown = [repr(built), str(built), f"{built.peers}", repr(store), built.model_dump_json()]
    shown += [str(built.model_dump(mode="json")), built.peers[0].display_url, store.display_url]
    shown += [str(built.warnings), str(ReplicationConfig.model_json_schema())]
    assert all(SECRET not in text for text in shown)
    assert "***" in built.peers[0].display_url
    assert "redis_url" not in repr(built.peers[0])


def test_a_dump_for_display_cannot_be_loaded_by_mistake() -> None:
    """A masked URL would be taken for a real one and log in as ***."""
    dumped = peer(redis_url=f"redis://u:{SECRET}@h").model_dump_json()
    (problem,) = problems_of(lambda: PeerConfig.model_validate_json(dumped))
    assert "masked" in problem


def test_a_display_url_without_a_url_is_empty() -> None:
    """A store that needs no Redis would have no text to show."""
    assert StoreConfig(kind="noop").display_url == ""


@pytest.mark.parametrize(
    "key",
    [
        f"redis://u:{SECRET}@h\x1b[31m",
        f"redis://{'x' * 60}u:{SECRET}@h\x1b[31m",
        f"redis://u:{SECRET}{'x' * 100}@h",
        f"redis_url:redis://u:{SECRET}@{'h' * 200}",
    ],
)
def test_a_url_as_a_key_is_masked_and_shortened(key: str) -> None:
    """A space forgotten in YAML makes a URL part of a key, which errors do show."""
    (problem,) = problems_of(lambda: CursorConfig.model_validate({key: 1}))
    assert SECRET not in problem
    assert "\x1b" not in problem
    assert len(problem) < 130


# Files ------------------------------------------------------------------------------------------


def load(tmp_path: Path, text: str | bytes) -> ReplicationConfig:
    """Load a configuration from a file with this content."""
    file = tmp_path / "node.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return ReplicationConfig.load(str(file))


GOOD_YAML = """\
local_node_id: site-a
peers:
  - &peer {node_id: site-b, redis_url: "rediss://user:pw@b:6380/1", redis_prefix: "b:"}
  - {<<: *peer, node_id: site-c, priority: -1}
settings:
  hot_path: {block_timeout: 250ms, batch_size: 200}
  limits: {payload_bytes: 1 MiB}
  tombstones: {ttl: 30d, grace: 12h}
  startup: {timeout: 2m, when_no_peer: run}
cursor: {sqlite_path: ":memory:"}
store: {kind: redis, redis_url: "redis://localhost", layouts: [own, dotted]}
"""


@pytest.mark.parametrize("lead", ["", "\ufeff", "# a comment\n---\n"])
def test_a_good_file_is_read(tmp_path: Path, lead: str) -> None:
    """YAML would be read in part, or a byte order mark or a merge key would be refused."""
    built = load(tmp_path, lead + GOOD_YAML)
    assert built.settings.hot_path.block_timeout == 0.25
    assert built.settings.limits.payload_bytes == 1024**2
    assert built.settings.tombstones.ttl == 30 * 86_400
    assert built.settings.startup.timeout == 120
    assert [p.node_id for p in built.peers] == ["site-b", "site-c"]
    assert built.peers[1].priority == -1
    assert built.peers[1].redis_prefix == "b:"
    assert built.store is not None
    assert built.store.layouts == ("own", "dotted")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "file: it is empty"),
        ("# nothing\n", "file: it is empty"),
        ("- 1\n", "configuration: a mapping of keys to values is expected"),
        ("just text", "configuration: a mapping of keys to values is expected"),
        (b"local_node_id: \xff\n", "file: it is not UTF-8, at byte 15"),
        ("local_node_id: a".encode("utf-16"), "file: it is not UTF-8, at byte 0"),
        ("local_node_id: [a\n", "line 2, column 1: "),
        ("local_node_id: a\n  peers: []\n", "line 2, column 8: "),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: "),
        ("a: 1\nb: \x07\n", "line 2: it holds a character that YAML does not allow"),
        ("local_node_id: 2024-13-45\n", "line 1, column 16: this is no timestamp"),
        ("local_node_id: !!int x\n", "line 1, column 16: this is no int"),
        ("local_node_id: !!python/name:os.system x\n", "line 1, column 16: could not"),
        ("local_node_id: *a\n", "line 1, column 16: found undefined alias"),
        ("? [1]\n: 2\n", "line 1, column 3: found unhashable key"),
        ("[" * 20_000, "file: it is nested too deeply"),
        ("local_node_id: no\n", "local_node_id: a node id is text; put it in quotes"),
        ("local_node_id: 5\n", "local_node_id: a node id is text; put it in quotes"),
        ("local_node_id: 2024-01-05\n", "local_node_id: a node id is text; put it in quotes"),
        ("local_node_id: a\npeers: &p [*p]\n", "peers[0]: "),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str | bytes, expected: str) -> None:
    """A broken file would crash the command, or be told without the place to mend."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    (problem,) = caught.value.problems
    assert problem.startswith(expected)
    assert caught.value.source == str(tmp_path / "node.yaml")
    assert str(tmp_path) in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [("missing.yaml", "No such file"), ("", "Is a directory"), ("a\x00b", "null character")],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, expected: str) -> None:
    """A wrong path would raise an error that says nothing about configuration."""
    with pytest.raises(ConfigError) as caught:
        ReplicationConfig.load(tmp_path / name)
    assert expected in caught.value.problems[0]
    assert caught.value.source == str(tmp_path / name)


def test_a_long_file_is_read_to_its_end(tmp_path: Path) -> None:
    """Peers at the end of a long list would be missing."""
    lines = [f"  - {{node_id: n{n}, redis_url: 'redis://h'}}\n" for n in range(200)]
    built = load(tmp_path, "local_node_id: a\npeers:\n" + "".join(lines))
    assert len(built.peers) == 200


def test_a_file_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong path such as /dev/zero would fill the memory."""
    monkeypatch.setattr(yaml_file, "FILE_BYTES_MAX", 1000)
    with pytest.raises(ConfigError, match="larger than 1000 bytes"):
        ReplicationConfig.load("/dev/zero")


def test_keys_that_stand_twice_are_told_with_all_else(tmp_path: Path) -> None:
    """YAML would silently keep the last of two keys."""
    text = "local_node_id: a\nlocal_node_id: b\ncursor:\n  wal_mode: true\n  wal_mode: 5\n"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert sorted(caught.value.problems) == [
        "cursor.wal_mode: true or false is expected",
        "line 2, column 1: the key local_node_id stands twice",
        "line 5, column 3: the key wal_mode stands twice",
    ]


def test_a_merge_key_may_be_overridden(tmp_path: Path) -> None:
    """A key that overrides a merged one would be told as a duplicate, at whatever depth."""
    text = (
        "local_node_id: a\nsettings:\n  timeouts:\n    <<: &base {<<: &deep {ping: 1s}, ping: 2s}\n"
        "    ping: 3s\npeers: []\n"
    )
    assert load(tmp_path, text).settings.timeouts.ping == 3


@given(st.text(max_size=40))
def test_no_text_crashes_the_loader(text: str) -> None:
    """Some file would raise anything but a ConfigError."""
    try:
        data, problems = yaml_file._parse_yaml(text)
        assert isinstance(problems, list)
        ReplicationConfig.model_validate(data)
    except ConfigError:
        pass


# Changes ----------------------------------------------------------------------------------------


def test_changed_paths_name_what_differs_and_no_value() -> None:
    """Live reconfiguration would miss a change, invent one, or show a URL."""
    old = ReplicationConfig(
        local_node_id="a",
        peers=[peer(), peer(node_id="c"), peer(node_id="d")],
        settings=Settings(hot_path=HotPathConfig(batch_size=60)),
    )
    new = ReplicationConfig(
        local_node_id="a",
        peers=[
            peer(node_id="e"),
            peer(node_id="d", priority=2),
            peer(redis_url=f"redis://:{SECRET}@h:6379/0"),
        ],
        settings=Settings(timeouts=TimeoutsConfig(drain=3)),
        store=StoreConfig(kind="noop"),
    )
    expected = (
        "peers[b].redis_url",
        "peers[c]",
        "peers[d].priority",
        "peers[e]",
        "settings.hot_path.batch_size",
        "settings.timeouts.drain",
        "store",
    )
    assert old.changed_paths(new) == new.changed_paths(old) == expected


def test_equal_configurations_have_no_changed_paths() -> None:
    """A reload of the same file, or of its peers in another order, would restart links."""
    one = ReplicationConfig(local_node_id="a", peers=[peer(), peer(node_id="c")])
    two = ReplicationConfig(local_node_id="a", peers=[peer(node_id="c"), peer(priority=0)])
    assert one.changed_paths(two) == ()
    assert one.changed_paths(one) == ()
