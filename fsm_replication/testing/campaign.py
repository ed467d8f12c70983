"""Many simulated runs from seeds: ``python -m fsm_replication.testing.campaign --runs 10000``.

Each seed stands for a mesh and a fate (see :mod:`fsm_replication.testing.fates`). A campaign fails
if a promise is broken in any run, which is then shown with the fewest steps that break it, or if
there is a move in the tables that no run has taken: then the runs would prove less than they seem
to.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.progress import Progress

from fsm_replication.testing.fates import (
    Fate,
    Tally,
    random_fate,
    run_fate,
    shrink,
)
from fsm_replication.testing.moves import EXEMPT, Move

__all__ = ("Campaign", "Failure", "main", "run_campaign", "run_seeds")

SEEDS_PER_JOB: Final = 50
SHRUNK_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Failure:
    """A run in which a promise was broken: its seed and, for the first few, a shorter fate."""

    seed: int
    error: str
    fate: Fate


@dataclass(slots=True)
class Campaign:
    """What a campaign has come to; ``took_sec`` is real time."""

    tally: Tally = field(default_factory=Tally)
    failures: list[Failure] = field(default_factory=list)
    took_sec: float = 0.0

    @property
    def never_taken(self) -> list[Move]:
        """The moves of the tables that no run took, but for those that none can take."""
        return [move for move in self.tally.never_taken() if move not in EXEMPT]

    @property
    def passed(self) -> bool:
        """Whether no promise was broken and every move was taken."""
        return not self.failures and not self.never_taken


def _failure_of(fate: Fate) -> str | None:
    try:
        run_fate(fate)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run has failed
        return f"{type(error).__name__}: {error}"
    return None


def run_seeds(seeds: Sequence[int]) -> Campaign:
    """Run some seeds in this process."""
    done = Campaign()
    for seed in seeds:
        fate = random_fate(seed)
        try:
            done.tally.add(run_fate(fate))
        except Exception as error:  # noqa: BLE001 - whatever it is, the run has failed
            done.failures.append(Failure(seed, f"{type(error).__name__}: {error}", fate))
    return done


def _quiet() -> None:
    # Nodes in trouble warn, and these are in nothing else.
    logging.disable(logging.CRITICAL)


@contextmanager
def _quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    _quiet()
    try:
        yield
    finally:
        logging.disable(before)


def run_campaign(first: int, runs: int, processes: int) -> Iterator[Campaign]:
    """Run ``runs`` seeds from ``first`` on in several processes; yields what it has come to so far."""
    began = time.perf_counter()
    whole = Campaign()
    jobs = [
        range(begin, min(begin + SEEDS_PER_JOB, first + runs))
        for begin in range(first, first + runs, SEEDS_PER_JOB)
    ]
    with ProcessPoolExecutor(processes, initializer=_quiet) as pool:
        for part in pool.map(run_seeds, jobs):
            whole.tally.add(part.tally)
            whole.failures += part.failures
            whole.took_sec = time.perf_counter() - began
            yield whole


def _shrunk(failure: Failure) -> Failure:
    fate = shrink(failure.fate, lambda tried: _failure_of(tried) is not None)
    return Failure(failure.seed, _failure_of(fate) or failure.error, fate)


def _as_json(done: Campaign) -> dict[str, object]:
    tally = done.tally
    return {
        "runs": tally.runs,
        "failed": [{"seed": f.seed, "error": f.error, "fate": repr(f.fate)} for f in done.failures],
        "seconds": round(done.took_sec, 1),
        "runs_per_second": round(tally.runs / done.took_sec, 2) if done.took_sec else 0.0,
        "virtual_hours": round(tally.seconds / 3600, 1),
        "servers": dict(sorted(tally.servers.items())),
        "peak_in_vain": {"flights": round(tally.peak[0]), "commands": round(tally.peak[1])},
        "steps": dict(tally.steps.most_common()),
        "moves_taken": len(tally.moves),
        "moves_never_taken": [" ".join(move) for move in done.never_taken],
    }


def _show(done: Campaign, say: Callable[[str], None]) -> None:
    said = _as_json(done)
    say(
        f"{said['runs']:,} runs in {said['seconds']} s ({said['runs_per_second']} a second),"
        f" {said['virtual_hours']} hours of virtual time, {said['moves_taken']} different moves"
    )
    say("servers: " + ", ".join(f"{name} {n:,}" for name, n in sorted(done.tally.servers.items())))
    flights, commands = done.tally.peak
    say(f"most in vain: {flights:.0f} flights, {commands:.0f} commands")
    say("steps: " + ", ".join(f"{kind} {n:,}" for kind, n in done.tally.steps.most_common()))
    for failure in done.failures:
        say(f"FAILED seed {failure.seed}: {failure.error}\n  {failure.fate}")
    for move in done.never_taken:
        say(f"NEVER TAKEN: {move[0]}: {move[1]} from {move[2]} to {move[3]}")
    say("every promise was kept" if done.passed else "THE CAMPAIGN FAILED")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; returns 0 if it passed."""
    parser = argparse.ArgumentParser(prog="python -m fsm_replication.testing.campaign")
    parser.add_argument("--runs", type=int, default=1000, help="how many seeds (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    done = Campaign()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("runs", total=chosen.runs)
        told = 0
        for so_far in run_campaign(chosen.first, chosen.runs, chosen.processes):
            done = so_far
            failed = len(done.failures)
            bar.update(task, completed=done.tally.runs + failed, description=f"{failed} failed")
            # At once: making them shorter, at the end, may take long.
            for failure in done.failures[told:]:
                bar.console.print(f"FAILED seed {failure.seed}: {failure.error}", markup=False)
            told = failed
    with _quietly():
        done.failures[:SHRUNK_MAX] = map(_shrunk, done.failures[:SHRUNK_MAX])
    if chosen.json:
        say(json.dumps(_as_json(done), indent=2))
    else:
        _show(done, say)
    return 0 if done.passed else 1


if __name__ == "__main__":
    sys.exit(main())
