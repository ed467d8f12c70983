"""What differs between two configurations, and what of it a running engine can take over.

Everything can change before an engine is started. Once it is, what belongs to the store it was
given, and to the cursor file it has locked, stays as it is: such a change is refused whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fsm_replication.config import PeerConfig, ReplicationConfig
from fsm_replication.errors import ConfigError

__all__ = ("ConfigChange", "PeerChange", "compare_configs", "refuse_what_is_fixed")

# Why each of these cannot change under a running engine.
_FIXED: Final = {
    "local_node_id": "the store, its stream and the cursors belong to this node id",
    "store": "the store was opened when the node started",
    "cursor": "the cursor file is open and locked",
    "settings.timeouts.cursor": "the cursor file is open",
    "settings.tombstones": "the store keeps its tombstones by it, and its marker tells the peers",
}


@dataclass(frozen=True, slots=True)
class PeerChange:
    """A peer that both configurations have, and the names of the ``fields`` that differ."""

    node_id: str
    fields: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.node_id} ({', '.join(self.fields)})"


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """What ``update_config`` changed: names only, never a value; false where nothing did.

    Peers are named by node id, in the order of their configuration. ``settings`` are the dotted
    paths of everything else that differs, sorted.
    """

    peers_added: tuple[str, ...] = ()
    peers_removed: tuple[str, ...] = ()
    peers_changed: tuple[PeerChange, ...] = ()
    settings: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.peers_added or self.peers_removed or self.peers_changed or self.settings)

    def __str__(self) -> str:
        told = {
            "peers added": self.peers_added,
            "peers removed": self.peers_removed,
            "peers changed": tuple(map(str, self.peers_changed)),
            "settings changed": self.settings,
        }
        parts = [f"{what}: {', '.join(names)}" for what, names in told.items() if names]
        return "; ".join(parts) or "nothing changed"


def compare_configs(old: ReplicationConfig, new: ReplicationConfig) -> ConfigChange:
    """Return what differs; the order in which peers stand is no difference."""
    before = {peer.node_id: peer for peer in old.peers}
    after = {peer.node_id: peer for peer in new.peers}
    changed = (
        PeerChange(node_id, _differing_fields(before[node_id], peer))
        for node_id, peer in after.items()
        if node_id in before
    )
    return ConfigChange(
        peers_added=tuple(node_id for node_id in after if node_id not in before),
        peers_removed=tuple(node_id for node_id in before if node_id not in after),
        peers_changed=tuple(change for change in changed if change.fields),
        settings=tuple(path for path in old.changed_paths(new) if not path.startswith("peers[")),
    )


def _differing_fields(old: PeerConfig, new: PeerConfig) -> tuple[str, ...]:
    names = PeerConfig.model_fields
    return tuple(name for name in names if getattr(old, name) != getattr(new, name))


def refuse_what_is_fixed(change: ConfigChange) -> None:
    """Let only such changes pass that a running engine can take over.

    :raises ConfigError: if there are others; it names each.
    """
    problems = [
        f"{path}: cannot change while the engine runs ({why}); stop the node and start it anew"
        for path in change.settings
        for fixed, why in _FIXED.items()
        if path == fixed or path.startswith(f"{fixed}.")
    ]
    if problems:
        raise ConfigError(problems)
