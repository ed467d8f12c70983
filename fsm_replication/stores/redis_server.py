"""What a node's Redis is configured to do with the data: throw it away when full, keep it on disk.

A user who may do little is not allowed to ask by CONFIG, and some providers have no such command; INFO
tells about eviction too. Where neither answers, it is unknown, and that is said.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ("ServerFacts", "ask_server_facts")

SAFE_POLICY: Final = "noeviction"
_UNKNOWN: Final = (
    "its maxmemory-policy cannot be asked for (the user may use neither CONFIG GET nor INFO): make sure"
    " that it is noeviction, or deletes may be undone when Redis is full"
)
_VOLATILE: Final = (
    "it keeps nothing on disk (save is empty, appendonly is no): when Redis restarts it is empty, the node"
    " copies everything from its peers, and what none of them had read is lost"
)

# Sends a command and returns its reply, None where the server answers with an error.
Ask = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What is known of a server: its eviction policy, "" if not; whether it persists, None if not."""

    policy: str
    persists: bool | None

    @property
    def evicts(self) -> bool:
        """Whether keys may vanish before their time."""
        return self.policy not in ("", SAFE_POLICY)

    @property
    def eviction(self) -> str:
        """What eviction may do here, as a sentence; "" where there is none."""
        if not self.evicts:
            return "" if self.policy else _UNKNOWN
        return (
            f"its maxmemory-policy is {self.policy}: when Redis is full it may throw away tombstones, and"
            " deleted items come back"
        )

    @property
    def volatility(self) -> str:
        """What a restart of Redis loses, as a sentence; "" where it persists, or that is not known."""
        return _VOLATILE if self.persists is False else ""


async def ask_server_facts(ask: Ask) -> ServerFacts:
    """Ask a server how it is configured.

    :raises StoreError: if it cannot be reached.
    """
    policy = await _configured(ask, "maxmemory-policy")
    if policy is None:
        told = await ask("INFO", "memory")
        policy = str(told.get("maxmemory_policy", "")) if isinstance(told, Mapping) else ""
    append = await _configured(ask, "appendonly")
    save = await _configured(ask, "save")
    persists = None if append is None or save is None else append == "yes" or bool(save)
    return ServerFacts(policy, persists)


async def _configured(ask: Ask, name: str) -> str | None:
    reply = await ask("CONFIG", "GET", name)
    if isinstance(reply, list) and len(reply) == 2 and isinstance(reply[1], bytes):
        return reply[1].decode("utf-8", "replace")
    return None
