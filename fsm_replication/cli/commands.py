"""The commands of ``fsm-replication``."""

from __future__ import annotations

import json
import sys
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from fsm_replication.bench.fairness import fairness_table, run_fairness_bench
from fsm_replication.bench.report import run_bench
from fsm_replication.bench.trees import run_tree_bench, tree_table
from fsm_replication.bench.workload import EVENTS
from fsm_replication.cli.cursors import opened_cursors
from fsm_replication.cli.letters import (
    FIELD_WIDTH,
    purge_letters,
    retry_letters,
    show_letter,
    show_letters,
)
from fsm_replication.cli.node import check_node, run_node
from fsm_replication.cli.pauses import pause_peer, resume_peer
from fsm_replication.cli.repair import (
    explain_node,
    explanation_table,
    print_ledger,
    repair_node,
    show_differences,
)
from fsm_replication.cli.restamp import restamp_node
from fsm_replication.cli.runtime import LogFormat, configure_logging, run_async
from fsm_replication.cli.tables import stats_table
from fsm_replication.config import ReplicationConfig
from fsm_replication.demo.mesh import NODES_MAX, Topology
from fsm_replication.demo.screen import run_demo
from fsm_replication.diagram import render_all
from fsm_replication.errors import ReplicationError, UsageError
from fsm_replication.ports import GapRow
from fsm_replication.printable import printable, told

__all__ = ("app",)

app = typer.Typer(
    name="fsm-replication",
    help="Keep data the same at several sites without a central database.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
letters_app = typer.Typer(help="The entries that could not be applied.", no_args_is_help=True)
app.add_typer(letters_app, name="dead-letters")
console = Console()
errors = Console(stderr=True)

_T = TypeVar("_T")
LetterIds = Annotated[list[int] | None, typer.Argument(metavar="ID", help="As listed.")]
PeerName = Annotated[str, typer.Argument(metavar="PEER", help="The peer's node id.")]
ConfigPath = Annotated[Path, typer.Argument(help="The node's YAML configuration.")]


def _load(path: Path) -> ReplicationConfig:
    try:
        return ReplicationConfig.load(path)
    except ReplicationError as error:
        raise _fail(error) from None


def _fail(error: BaseException) -> typer.Exit:
    errors.print(Text(told(error), style="red"), soft_wrap=True)
    return typer.Exit(1)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    try:
        return run_async(work)
    except ReplicationError as error:
        raise _fail(error) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def run(
    config: ConfigPath,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[LogFormat, typer.Option(help="How log lines look.")] = LogFormat.CONSOLE,
) -> None:
    """Run a node in the foreground until SIGINT or SIGTERM; SIGHUP reads the file again."""
    loaded = _load(config)
    configure_logging(log_level, log_format)
    try:
        run_async(run_node(loaded, config))
    except ReplicationError as error:
        raise _fail(error) from None


@app.command()
def check(config: ConfigPath) -> None:
    """Say what is wrong with a configuration or, if nothing is, whether each peer answers."""
    loaded = _load(config)
    console.print("[green]✓[/] configuration: no problem found")
    if not run_async(check_node(loaded, console)):
        raise typer.Exit(1)


@app.command()
def diagram(
    folder: Annotated[Path, typer.Argument(help="Where the files go.")] = Path("diagrams"),
    check_only: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if a file differs.")
    ] = False,
) -> None:
    """Write the state diagrams of all machines, as Mermaid, from their tables."""
    differing = []
    for name, text in render_all().items():
        path = folder / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        differing.append(name)
        if not check_only:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            console.print(Text(printable(f"wrote {path}")))
    if check_only and differing:
        told_of = printable(f"{folder} differs from the tables: {', '.join(differing)}")
        errors.print(Text(told_of, style="red"))
        raise typer.Exit(1)


@app.command()
def demo(
    repo: Annotated[
        Path, typer.Option(help="The git repository, or directory, to replay.")
    ] = Path(),
    nodes: Annotated[int, typer.Option(min=1, max=NODES_MAX, help="How many nodes.")] = 3,
    topology: Annotated[Topology, typer.Option(help="Who reads whom.")] = Topology.MESH,
    outage: Annotated[
        bool, typer.Option("--outage", help="Cut a node off for so long that streams forget.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Replay a real change history through real nodes, and see whether they agree."""
    configure_logging("error", LogFormat.CONSOLE)
    try:
        agreed = run_async(run_demo(repo, nodes, topology, as_json=as_json, outage=outage))
    except ReplicationError as error:
        raise _fail(error) from None
    except KeyboardInterrupt:
        errors.print("stopped: the nodes, their servers and their files are gone")
        raise typer.Exit(130) from None
    if not agreed:
        raise typer.Exit(1)


@app.command()
def bench(
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 5,
    events: Annotated[int, typer.Option(min=1000, help="Events in the stream.")] = EVENTS,
    trees: Annotated[
        bool, typer.Option("--trees", help="Measure what the tree costs instead; about a minute.")
    ] = False,
    fairness: Annotated[
        bool, typer.Option("--fairness", help="Measure who gets how much beside a flood instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure the hot path against what this machine can do at best; about 30 s a round."""
    configure_logging("error", LogFormat.CONSOLE)
    if trees and fairness:
        raise typer.BadParameter("--trees and --fairness are two different measurements")
    try:
        with errors.status("starting") as status:
            if trees:
                costs = run_async(run_tree_bench(note=status.update))
                if as_json:
                    sys.stdout.write(json.dumps([cost.as_json() for cost in costs]) + "\n")
                else:
                    console.print(tree_table(costs))
                return
            if fairness:
                shares = run_async(run_fairness_bench(note=status.update))
                if as_json:
                    sys.stdout.write(json.dumps([share.as_json() for share in shares]) + "\n")
                else:
                    console.print(fairness_table(shares))
                return
            report = run_async(run_bench(rounds, events, note=status.update))
    except ReplicationError as error:
        raise _fail(error) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(json.dumps(report.as_json()) + "\n")
    else:
        console.print(*report.tables(), sep="\n")


@app.command()
def repair(
    config: ConfigPath,
    peer: Annotated[str | None, typer.Option(help="Only this peer.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Change nothing; print what differs. Works beside a running node.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(help="Let any number of deletes through for an hour; try again what failed."),
    ] = False,
    accept_stale: Annotated[
        str | None, typer.Option(metavar="PEER", help="Take the old items of this peer.")
    ] = None,
    reject_stale: Annotated[
        str | None, typer.Option(metavar="PEER", help="Delete the old items of this peer.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare trees with the peers of a stopped node, and fetch what is newer there."""
    loaded = _load(config)
    configure_logging("error", LogFormat.CONSOLE)
    named = {name for name in (peer, accept_stale, reject_stale) if name is not None}
    if len(named) > 1 or (accept_stale and reject_stale):
        raise typer.BadParameter("--peer, --accept-stale and --reject-stale contradict each other")
    one = next(iter(named), None)
    try:
        if dry_run:
            if force or accept_stale or reject_stale:
                raise typer.BadParameter("--dry-run changes nothing: leave the other option out")
            if not run_async(show_differences(loaded, one, as_json=as_json)):
                raise typer.Exit(1)
            return
        stats = run_async(
            repair_node(
                loaded,
                one,
                force=force,
                accept_stale=accept_stale is not None,
                reject_stale=reject_stale is not None,
                console=errors,
            )
        )
    except ReplicationError as error:
        raise _fail(error) from None
    except KeyboardInterrupt:
        errors.print("stopped; what was fetched stays, and another repair goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(json.dumps(asdict(stats)) + "\n")
    else:
        console.print(stats_table(stats))
    if stats.errors:
        raise typer.Exit(1)


@app.command()
def pause(config: ConfigPath, peer: PeerName) -> None:
    """Have a stopped node pause the link to a peer from its next start on, until it is resumed."""
    _run(pause_peer(_load(config), peer))
    console.print(Text(f"{peer}: paused until it is resumed"))


@app.command()
def resume(config: ConfigPath, peer: PeerName) -> None:
    """End a pause of a stopped node's link: an operator's, and one of the interlock.

    Where the interlock has tripped, the peer may delete any number of items for an hour.
    """
    ended = _run(resume_peer(_load(config), peer))
    for one in ended:
        console.print(Text(f"{peer}: resumed; {one}"), soft_wrap=True)
    if not ended:
        console.print(Text(f"{peer}: nothing had paused it that a person must end"))


@app.command()
def explain(
    config: ConfigPath, key: Annotated[str, typer.Argument(help="The key, as the store has it.")]
) -> None:
    """Tell which version of a key is held here and at each peer, and which wins by which rule."""
    loaded = _load(config)
    configure_logging("error", LogFormat.CONSOLE)
    made = _run(explain_node(loaded, key))
    console.print(explanation_table(made))


@app.command()
def restamp(
    config: ConfigPath,
    key: Annotated[str, typer.Argument(help="The key, as the store has it.")],
    take: Annotated[
        str | None, typer.Option(metavar="PEER", help="Hold what this peer holds, as it is there.")
    ] = None,
    force: Annotated[
        bool, typer.Option(help="Do it though a peer holds such a stamp, or cannot be asked.")
    ] = False,
) -> None:
    """Give a key that is stamped more than a day ahead a stamp of now; beside a running node too."""
    loaded = _load(config)
    configure_logging("error", LogFormat.CONSOLE)
    item = _run(restamp_node(loaded, key, take=take, force=force, console=console))
    source = "a stamp of now" if take is None else f"what {take} holds"
    done = f"{key} has {source}: {item.updated_at} ms, version {item.version}"
    console.print(Text(printable(done), style="bold"), soft_wrap=True)


@app.command()
def ledger(
    config: ConfigPath,
    peer: Annotated[str | None, typer.Option(help="Only this peer's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List the gaps that were found in the peers' streams, and how they were healed."""
    rows = _run(_read_ledger(_load(config), peer))
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(asdict(row)) + "\n")
    else:
        print_ledger(rows, console)


async def _read_ledger(config: ReplicationConfig, peer: str | None) -> list[GapRow]:
    async with opened_cursors(config, read_only=True) as store:
        return list(await store.gaps(peer))


@letters_app.command("list")
def list_letters(
    config: ConfigPath,
    peer: Annotated[str | None, typer.Option(help="Only those of one peer.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List dead letters; works beside a running node."""
    _run(show_letters(_load(config), peer, limit, console, as_json=as_json))


@letters_app.command("show")
def show_one_letter(
    config: ConfigPath,
    letter_id: Annotated[int, typer.Argument(metavar="ID", min=1, help="As the list has it.")],
    width: Annotated[
        int, typer.Option(min=1, help="How much of each raw field is shown, in characters.")
    ] = FIELD_WIDTH,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print it as JSON, with raw fields whole.")
    ] = False,
) -> None:
    """Show one dead letter with its raw fields; works beside a running node."""
    _run(show_letter(_load(config), letter_id, console, width=width, as_json=as_json))


@letters_app.command("retry")
def retry(
    config: ConfigPath,
    ids: LetterIds = None,
    peer: Annotated[str | None, typer.Option(help="All of one peer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Try dead letters of a stopped node again; all of them unless ids or a peer are named."""
    if ids and peer is not None:
        raise typer.BadParameter("ids and --peer contradict each other")
    loaded = _load(config)
    configure_logging("error", LogFormat.CONSOLE)
    stats = _run(retry_letters(loaded, peer, ids))
    if as_json:
        sys.stdout.write(json.dumps(asdict(stats)) + "\n")
    else:
        console.print(stats_table(stats, FIELD_WIDTH))
    if stats.problems:
        raise typer.Exit(1)


@letters_app.command("purge")
def purge(
    config: ConfigPath,
    ids: LetterIds = None,
    peer: Annotated[str | None, typer.Option(help="All of one peer.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of every peer.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Remove dead letters of a stopped node for good: by id, those of one peer, or all."""
    if bool(ids) + (peer is not None) + everything != 1:
        raise typer.BadParameter("name ids, or --peer, or --all: one of the three")
    agree = (lambda _question: True) if yes else _confirm
    purged = _run(purge_letters(_load(config), peer, ids, agree))
    if purged is None:
        errors.print("nothing was removed")
        raise typer.Exit(1)
    if as_json:
        sys.stdout.write(json.dumps({"purged": purged}) + "\n")
    else:
        console.print(f"{purged:,} dead letters were removed")


def _confirm(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody is there to ask: say --yes")
    return typer.confirm(question, err=True)
