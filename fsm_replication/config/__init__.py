"""The configuration of a node, from YAML or from Python.

Every problem is reported at once, with its path, in one :class:`ConfigError`, however a model was
built. Durations are written as "250ms", "5s", "2m", "3h", "7d" or seconds as a number, and are
held as float seconds in the field of the same name; sizes are written as bytes or "16 MiB", and
held as bytes. No error, repr or JSON dump shows the credentials of a URL.

What is where: ``node`` the configuration of a node, ``settings`` what it sets for all peers alike,
``values`` the kinds of values, ``model`` how problems are found and told, ``yaml_file`` the file.
"""

from fsm_replication.config.node import CursorConfig, PeerConfig, ReplicationConfig, StoreConfig
from fsm_replication.config.settings import (
    CircuitConfig,
    CircuitsConfig,
    ColdPathConfig,
    DeadLettersConfig,
    HotPathConfig,
    LimitsConfig,
    PeerHealthConfig,
    ReconnectConfig,
    RepairConfig,
    Settings,
    SloConfig,
    StartupConfig,
    TimeoutsConfig,
    TombstonesConfig,
    WritesCircuitConfig,
)
from fsm_replication.config.values import parse_duration, parse_size

__all__ = (
    "CircuitConfig",
    "CircuitsConfig",
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
    "WritesCircuitConfig",
    "parse_duration",
    "parse_size",
)
