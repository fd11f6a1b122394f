"""Show each node's job, state and progress, also while a run is active.

    python -m scripts.lib.status
    python -m scripts.lib.status --all --json

Reads files and asks Slurm once, where there is one; writes nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from scripts.lib import cli, graph, plan, slurm
from scripts.lib.digest import Memory
from scripts.lib.errors import UserError
from scripts.lib.graph import Graph, Node
from scripts.lib.run import number
from scripts.lib.slurm import SlurmError, SlurmJob
from scripts.lib.stages import STAGES
from scripts.lib.store import GRAPH, PLAN_LOCK, RUN_LOCK, Store, dvc_errors, is_held

ORDER = ("running", "pending", "failed", "cancelled", "ready", "waiting", "current")
"""States in the order of the summary."""

ENDED = ("failed", "cancelled")
BEGUN = ("running", *ENDED)
"""States in which a node's log and work folder are those of its newest job."""

MEASURES = ("loss", "reward")


@dataclass
class Row:
    """A node's line; what does not apply to it is empty."""

    node: str
    job: str = ""
    machines: str = ""
    state: str = ""
    note: str = ""
    time: str = ""
    step: str = ""
    measure: str = ""
    log: str = ""


class Unwritten(Memory):
    """Digests that are not kept: those of a run that is active are its own."""

    def save(self) -> None:
        pass


class Glance(Store):
    """The store, read without writing anything or asking a remote."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.raw = Unwritten(self.raw.store)

    def memory(self, node: Node) -> Memory:
        return Unwritten(super().memory(node).store)

    def _not_in_remote(self, absent: list[Node]) -> list[str]:
        return []  # what is not here counts as there

    @classmethod
    def now(cls, config: Path) -> Glance:
        """What is current: in the run that is active, else by the config."""
        active = run_is_active()
        if active and GRAPH.exists():
            store = cls(Graph.from_json(GRAPH.read_text()))
        else:
            store = cls(graph.build(config))
        try:
            store.read()
        except UserError:  # dvc.lock, while a job writes it
            time.sleep(1)
            store.read()
        store.settle(keep=active, write=False)
        return store


def run_is_active() -> bool:
    """Whether a run holds this folder, or is about to.

    Whoever takes the run's lock has the plan's: holding that, looking disturbs nobody.
    """
    return is_held(PLAN_LOCK, RUN_LOCK)


def rows(store: Store, jobs: list[SlurmJob]) -> list[Row]:
    """All nodes, parents before children; then jobs of nodes that are no more."""
    nodes = store.graph.nodes
    of: dict[str, list[SlurmJob]] = {id: [] for id in nodes}
    for job in jobs:
        if known := store.graph.jobs.get(job.node):
            of[known.whole].append(job)
    found = [row(store, node, of[node.id]) for node in nodes.values()]
    for job in jobs:
        if job.alive and job.node not in store.graph.jobs:
            note = "no such node in the config any more"
            found.append(Row(job.node, job.id, job.machines, word(job), note))
    return found


def row(store: Store, node: Node, jobs: list[SlurmJob]) -> Row:
    """One node's line; of its jobs those alive count, else the newest if it failed.

    Where several make it, those that run come before those that wait.
    """
    alive = sorted((j for j in jobs if j.alive), key=lambda j: j.state == "RUNNING")
    newest = {job.node: job for job in jobs}.values()
    failed = [job for job in newest if job.state != "COMPLETED"]
    waits = [one for one in store.graph.before(node.id) if store.why[one]]
    found = Row(node.id)
    if alive:
        found.state = word(alive[-1])
        found.note = alive[-1].reason if found.state == "pending" else ""
        of_job(found, alive)
        found.time += f" of {alive[-1].limit}"
    elif plan.is_running(store.graph, node.id):
        found.state = "running"
    elif not store.why[node.id]:
        found.state = "current"
    elif failed:
        found.state = word(failed[-1])
        if failed[-1].state not in ("FAILED", "CANCELLED"):
            found.note = failed[-1].state.lower().replace("_", " ")
        of_job(found, failed[-1:])
    elif waits:
        more = f" and {len(waits) - 1} more" if len(waits) > 1 else ""
        found.state, found.note = "waiting", f"for {waits[0]}{more}"
    else:
        found.state = "ready"
    shards = store.graph.shards.get(node.id, [])
    if alive or (failed and found.job):
        told = store.graph.jobs[(alive or failed)[-1].node]
    else:
        told = next((one for one in shards if plan.has_begun(one.id)), node)
    of_files(found, told)
    if told.share:
        done = sum(Path(shard.manifest).exists() for shard in shards)
        found.step, found.measure = f"{done} of {len(shards)} jobs", ""
    return found


def of_job(found: Row, jobs: list[SlurmJob]) -> None:
    """Fill in what Slurm says."""
    found.job = ",".join(job.id for job in jobs)
    found.machines = ",".join(dict.fromkeys(j.machines for j in jobs if j.machines))
    found.time = jobs[-1].elapsed


def of_files(found: Row, node: Node) -> None:
    """Fill in how far the script of a node or share is, and which log tells more."""
    log = Path("logs", f"{node.id}.log")
    slurms = Path("logs/slurm", f"rule_{node.id}", f"{found.job.split(',')[-1]}.log")
    if found.state in (*BEGUN, "current") and log.exists():
        found.log = str(log)
    if found.state in ENDED and slurms.exists():
        found.log = str(slurms)
    if found.state not in BEGUN or not log.exists():
        return
    work = log.resolve().parent
    state = read_json(work / "progress.json")
    if state and STAGES[node.stage].trains:
        found.step = f"{state['step']} of {state['steps']}"
    elif state:
        found.step = f"{100 * state['step'] / state['steps']:.0f}%"
    for name in (n for n in MEASURES if n in (state or {})):
        found.measure = f"{name} {number(state[name])}"
    if not found.job:
        seconds = read_json(work / "seconds.json") or 0
        found.time = str(timedelta(seconds=int(seconds)))


def word(job: SlurmJob) -> str:
    """A job's state in a word."""
    if job.state in slurm.ENDED:
        return "cancelled" if job.state == "CANCELLED" else "failed"
    return job.state.lower()


def read_json(path: Path) -> Any:
    """What a file holds that others write; None before it is there."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def table(found: list[Row]) -> str:
    """The rows as aligned columns, without those that no row has."""
    cells = []
    for one in found:
        entry = asdict(one)
        between = " " if one.state == "waiting" else ": "
        entry["state"] = f"{one.state}{between}{one.note}" if one.note else one.state
        del entry["note"]
        cells.append(entry)
    widths = {key: max(len(c[key]) for c in cells) for key in cells[0]}
    titles = {key: {"machines": "on", "measure": ""}.get(key, key) for key in widths}
    shown = {k: max(width, len(titles[k])) for k, width in widths.items() if width}
    lines = [titles, *cells]
    return "\n".join(
        "  ".join(f"{line[key]:{width}}" for key, width in shown.items()).rstrip()
        for line in lines
    )


def summary(found: list[Row]) -> str:
    """How many nodes are in which state."""
    counts = Counter(one.state for one in found)
    states = sorted(counts, key=lambda s: ORDER.index(s) if s in ORDER else 0)
    return ", ".join(f"{counts[state]} {state}" for state in states)


def main(argv: list[str] | None = None) -> int:
    """Print the table and its summary."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--config", type=Path, default=plan.chosen_config())
    flags.add_argument("--all", action="store_true", help="also what is current")
    flags.add_argument("--json", action="store_true", help="the same as JSON")
    args = flags.parse_args(argv)
    problem, jobs = "", []
    try:
        jobs = slurm.jobs()
    except SlurmError as error:
        problem = f"Slurm: {error.what}; its jobs are not shown"
    except UserError:  # no Slurm here: builds on this machine
        pass
    with dvc_errors():
        found = rows(Glance.now(args.config), jobs)
    shown = [one for one in found if args.all or one.job or one.state != "current"]
    if args.json:
        nodes = [asdict(one) for one in shown]
        counts = Counter(one.state for one in found)
        print(
            json.dumps({"nodes": nodes, "counts": counts, "problem": problem}, indent=1)
        )
        return 0
    if shown:
        print(table(shown) + "\n")
    if problem:
        print(problem)
    print(summary(found))
    return 0


if __name__ == "__main__":
    cli.run(main)
