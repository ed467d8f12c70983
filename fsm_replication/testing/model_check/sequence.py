"""A trace as a Mermaid sequence diagram: who did what, and which machine moved."""

from __future__ import annotations

from collections.abc import Iterator

from fsm_replication.testing.model_check.product import Combined, Product
from fsm_replication.testing.model_check.search import Violation

__all__ = ("sequence",)

_INDENT = "    "


def sequence(product: Product, violation: Violation) -> str:
    """Return the shortest way to a violation as a ``sequenceDiagram``."""
    machines = ["engine", *_link_names(violation.start)]
    actors: dict[str, str] = {}
    body: list[str] = []
    here = violation.start
    for move in violation.trace:
        who, whom, what = move.label
        actor = who if whom == "engine" or who == "operator" else f"{who} of {whom}"
        name = actors.setdefault(actor, f"w{len(actors)}")
        body.append(f"{name}->>{_machine(whom)}: {_clean(what)}")
        body += _notes(product, here, move.after)
        here = move.after
    body.append(f"Note over {_machine(machines[0])}: VIOLATION: {_clean(violation.what)}")
    head = [f"participant {name} as {actor}" for actor, name in actors.items()]
    head += [
        f"participant {_machine(one)} as {one if one == 'engine' else f'link {one}'}"
        for one in machines
    ]
    lines = ["sequenceDiagram", *(_INDENT + line for line in (*head, *body))]
    return "\n".join(lines) + "\n"


def _link_names(at: Combined) -> list[str]:
    return list("ab"[: len(at[1])])


def _machine(name: str) -> str:
    return f"m_{name}"


def _notes(product: Product, before: Combined, after: Combined) -> Iterator[str]:
    """Yield a note for each machine that moved, and each circuit that changed."""
    was, now = product.engines.things[before[0]].state, product.engines.things[after[0]].state
    if was != now:
        yield f"Note over {_machine('engine')}: {was} → {now}"
    for name, one, other in zip(_link_names(after), before[1], after[1], strict=True):
        link, moved = product.links.things[one], product.links.things[other]
        if link.state != moved.state:
            yield f"Note over {_machine(name)}: {link.state} → {moved.state}"
        if link.reasons != moved.reasons:
            held = ", ".join(moved.reasons) or "none"
            yield f"Note over {_machine(name)}: reasons to pause: {held}"
    for circuit, state, changed in zip(("writes", "reads"), before[2], after[2], strict=False):
        if state != changed:
            yield f"Note over {_machine('engine')}: circuit of {circuit}: {state} → {changed}"


def _clean(text: str) -> str:
    """Return a text without what Mermaid would take for syntax."""
    return text.replace(";", ",").replace("#", "").replace("\n", " ")
