"""What each log event says to a person: its name, and the sentence that its fields make.

A call to a logger names an event and gives its facts as fields; programs filter by those. What a
person reads is made of them here, in one place, so that the words of one fact are the same
wherever it is told. A field in a sentence was made safe for one line before it is put in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ("SENTENCES", "sentence")


def _move(fields: Mapping[str, Any]) -> str:
    """Say a move of a machine, why it was made, and when what failed is tried again."""
    parts = [fields[name] for name in ("why",) if fields.get(name)]
    if (wait_sec := fields.get("next_attempt_sec")) is not None:
        parts.append(f"next attempt in {wait_sec:.1f} s")
    told = f": {', '.join(parts)}" if parts else ""
    machine = fields["machine"].replace(":", " ", 1)
    return f"{machine}: {fields['source']} -> {fields['dest']}{told}"


# A string is a format of str.format, filled in with the fields of the event and of its logger.
SENTENCES: Final[Mapping[str, str | Callable[[Mapping[str, Any]], str]]] = {
    # The engine and its machines
    "transition": _move,
    "circuit_changed": lambda fields: _move({**fields, "machine": f"circuit:{fields['circuit']}"}),
    "config_changed": "the configuration was changed: {change}",
    "drain_incomplete": "the drain timeout is over, and this is left behind: {left}",
    "effect_failed": "an effect of {machine} failed, which is a defect: {error}",
    "link_will_not_end": "link {peer_id} does not end in time; cancelling what is left: {left}",
    "report_dropped": "{machine} dropped the report {fact}: it means nothing in {state}",
    "worker_died": "worker {worker} of {machine} died, which is a defect: {error}",
    # A link
    "agreement_not_kept": "link {peer_id}: that the peer agrees could not be saved: {error}",
    "bootstrap_finished": "link {peer_id}: the bootstrap is complete: {items} items copied,"
    " {skipped} skipped, {held_back} held back",
    "bootstrap_progress": "link {peer_id}: bootstrapping: {copied} items copied, {per_sec} per"
    " second, {differing} keys known to differ",
    "bootstrap_resumed": "link {peer_id}: the bootstrap goes on, from the head {head}",
    "bootstrap_started": "link {peer_id}: a bootstrap by {by} begins at the head {head}: {why}",
    "chunk_died": "link {peer_id}: working off entries died of a defect: {then}",
    "dead_letters": "link {peer_id}: {count} entries became dead letters, by reason: {reasons}",
    "dead_letters_dropped": "link {peer_id}: {count} dead letters were dropped, the oldest ones:"
    " there is room for {letters} of {held_bytes} bytes together",
    "dead_letters_not_kept": "link {peer_id}: dead letters cannot be written to {path}, and"
    " reading waits for that: {error}",
    "dead_letters_retried": "{tried} dead letters were tried again: {applied} applied,"
    " {superseded} superseded, {still_bad} still bad, {left} left",
    "deletes_wait": "link {peer_id}: deletes wait, since they cannot be reserved in {path}: {error}",
    "entry_died": "link {peer_id}: working off entry {stream_id} died of a defect; it becomes a dead"
    " letter",
    "gap_not_healed": "link {peer_id}: {missed} entries are missing from the stream and were"
    " passed over, until trees are compared: {why}",
    "interlock_not_kept": "link {peer_id}: what the interlock has seen could not be written to {path}:"
    " {error}",
    "interlock_tripped": "link {peer_id}: the interlock lets no delete through until a person says so:"
    " {shrunk} live items less within an hour and {more} more to come, allowed are {allowed}; {live}"
    " are left",
    "item_skipped": 'link {peer_id}: the item "{key}" was skipped: {error}',
    "no_common_layout": "link {peer_id}: trees cannot be compared, since {why}; {then}",
    "no_tree_yet": "link {peer_id}: the peer has no tree yet; {then}",
    "peer_clock_agrees": "link {peer_id}: the peer's clock agrees with ours again: {skew_sec} s ahead"
    " of it, asked within {round_trip_sec} s",
    "peer_clock_off": "link {peer_id}: the peer's clock is {skew_sec} s ahead of ours, asked within"
    " {round_trip_sec} s: one of the two is wrong",
    "peer_clock_unknown": "link {peer_id}: how the peer's clock stands to ours is unknown: {why}",
    "peer_clock_ahead": "link {peer_id}: {events} events are stamped more than a minute ahead of"
    " this node's clock",
    "peer_came_back_older": "link {peer_id}: the peer's store came back as it was before ({why}): the"
    " agreement of {agreed_at_ms} ms counts as one of {as_of_ms} ms",
    "rounds_in_vain": "link {peer_id}: rounds come to nothing, and wait {seconds:.1f} s now: {why}",
    "slo_violated": "link {peer_id}: {slo} was {seconds:g} s, the limit is {limit_sec:g} s"
    " (exceeded {more_since_last_warning} more times since the last warning)",
    "store_call_failed": "link {peer_id}: a call into the store failed (circuit {circuit}):"
    " {error}",
    "too_many_exceptions": "link {peer_id}: too many keys cannot be taken: {then}",
    "tree_nodes_skipped": "link {peer_id}: {count} nodes of the peer's tree cannot be read and"
    " were skipped",
    "unsettled_dropped": "link {peer_id}: {events} events are not settled and will be read again:"
    " {error}",
    # The cold path and the cursor store
    "cursor_flush_failed": "cursors could not be written to {path}: {error}",
    "peer_not_asked_for_tree": "peer {peer_id} could not be asked for its tree: {error}",
    "peer_repaired": "peer {peer_id} was compared: {differing} keys differed, {fetched} were"
    " fetched, {deferred} deferred, {held_back} held back",
    "repair_failed": "the comparison with peer {peer_id} failed, next attempt in {rest_sec:.0f} s:"
    " {error}",
    "words_not_kept": "a person's word could not be written to {path}, and holds until the engine stops:"
    " {error}",
    # Stores
    "dotted_layout_not_up_to_date": "the dotted layout could not be brought up to date, and is"
    " tried again: {error}",
    "item_not_published": 'the item "{key}" cannot be read and is not published: {error}',
    "leave_not_told": "that this process has left the node could not be written, and shows by itself:"
    " {error}",
    "lease_not_released": "the lease of the dotted layout was not given back, and ends by itself:"
    " {error}",
    "noop_store": "no store was given: {meaning}",
    "not_published": 'the outbox cannot publish "{key}" (version {version}): {why}',
    "publishing_everything": "the outbox publishes everything anew: {why}",
    "publishing_failed": "the outbox could not publish (attempt {attempt}), next attempt in"
    " {again_in_sec:.1f} s: {error}",
    "reserved_keys_not_published": "{count} keys with reserved names are kept out of the dotted"
    ' layout, "{first}" first',
    "store_is_volatile": "{store} may lose what it was told: {why}",
    "store_may_evict": "{store} may evict tombstones, and with them revive what was deleted: {why}",
    "store_reachable": "the node's own store answers again",
    "store_unreachable": "the node's own store does not answer: {error}",
    "store_upkeep_failed": "the store's upkeep failed, next attempt in {again_in_sec:.0f} s: {error}",
    "thrown_away": "{changes} changes were thrown away",
    "tombstone_ttl_announced": "the changed tombstone ttl is in force; {tombstones} tombstones were"
    " brought in line",
    # The command line
    "configuration": "configuration: {problem}",
    "configuration_refused": "{path} was refused, and {in_force} stays in force: {error}",
    "configuration_reloaded": "{path} was loaded again: {change}",
    "stopping": "stopping: {why}",
}


def sentence(event: str, fields: Mapping[str, Any]) -> str:
    """Return what an event says; one without a sentence is told as its name and fields."""
    form = SENTENCES.get(event)
    try:
        if isinstance(form, str):
            return form.format_map({k: "unknown" if v is None else v for k, v in fields.items()})
        if form is not None:
            return form(fields)
    except (LookupError, ValueError, TypeError):
        # A line that could not be written must not fail what it tells of.
        pass
    told = ", ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    name = event.replace("_", " ")
    return f"{name}: {told}" if told else name
