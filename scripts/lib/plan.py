"""Show what will run and why, or draw it: nothing is built.

    python -m scripts.lib.plan --config config/config.yaml
    python -m scripts.lib.plan --config config/config.yaml --draw dag.svg --draw dag.png

With --write, as DVC's own `plan` stage calls it, only write dvc.yaml and
config/params.yaml from the config.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from scripts.lib import cli, graph
from scripts.lib.errors import UserError
from scripts.lib.graph import Graph
from scripts.lib.store import (
    HARMED,
    MAY,
    NEVER,
    STATE,
    Store,
    apart_from_builds,
    dvc_errors,
    is_held,
)

FEW = 3
RUNS = ("run", "may run")
DEFAULT = Path("config/config.yaml")
CONFIG = "PIPELINE_CONFIG"
"""Environment variable that names another config than the default."""


def chosen_config() -> Path:
    """The config to build: what PIPELINE_CONFIG names, else the default."""
    return Path(os.environ.get(CONFIG) or DEFAULT)


def state_of(store: Store, id: str) -> tuple[str, str]:
    """A node's state (current, running, missing, stale) and why it is not current."""
    reasons = store.why[id]
    note = "; ".join(reasons)
    if is_running(store.graph, id):
        return "running", note
    if not reasons:
        return "current", note
    return ("stale" if id in store.records else "missing"), note


def is_running(graph: Graph, id: str) -> bool:
    """Whether some process holds the node's lock, or one of its shards', now."""
    ids = [id, *(shard.id for shard in graph.shards.get(id, ()))]
    return any(map(has_begun, ids))


def has_begun(id: str) -> bool:
    """Whether some process holds the lock of a node's or a shard's job now."""
    return is_held(STATE / f"{id}.lock")


def verb(reasons: list[str]) -> str:
    """What will happen to a node that these reasons keep from being current."""
    if not reasons:
        return "current"
    if all(r.startswith(MAY) for r in reasons):
        return "may run"
    if all(r.endswith(HARMED) or r.startswith(MAY) for r in reasons):
        return "restore"
    return "run"


def stale(store: Store) -> list[str]:
    """The nodes that are not current, parents before children."""
    return [id for id, reasons in store.why.items() if reasons]


def lines(store: Store, all_nodes: bool) -> list[str]:
    """One line a node: what will happen, and the reasons."""
    ids = store.why if all_nodes else stale(store)
    shown = {id: (verb(store.why[id]), store.why[id]) for id in ids}
    width = max((len(id) for id in shown), default=0)
    text = []
    for id, (what, reasons) in shown.items():
        said = [r for r in reasons if what == "may run" or not r.startswith(MAY)]
        note = "; ".join(r.removesuffix(HARMED) for r in said)
        backend = store.graph.nodes[id].placement.get("backend")
        by = f"  (backend {backend})" if backend else ""
        if what in RUNS and id in store.graph.shards:
            by = f"  (in {len(store.graph.shards[id])} jobs)"
        text.append(f"{what:8} {id:{width}}  {note}{by}".rstrip())
    return text


def folded(whole: Graph, ids: list[str]) -> str:
    """The nodes' names; for those of one sweep its name and their number."""
    sweeps = {id: sweep for sweep, its in whole.sweeps.items() for id in its}
    num = Counter(sweeps.get(id, id) for id in ids)
    return ", ".join(f"{n} ({num[n]})" if n in whole.sweeps else n for n in num)


def announce(store: Store) -> None:
    """Say on the terminal what is not current, and why; or where the results are."""
    new = [id for id, why in store.why.items() if NEVER in why]
    if len(new) > FEW:
        print(
            f"[plan] run      {len(new)} nodes {NEVER}: {folded(store.graph, new)}",
            file=sys.stderr,
        )
    for id, line in zip(stale(store), lines(store, all_nodes=False), strict=True):
        if len(new) <= FEW or id not in new:
            print(f"[plan] {line}", file=sys.stderr)
    if not any(store.why.values()):
        results(store)


def results(store: Store) -> None:
    """The last lines of a build: where the models and reports are."""
    nodes = store.graph.nodes.values()
    for kind, stage, file in (
        ("model", "export", ""),
        ("report", "report", "report.html"),
        ("to upload", "release", ""),
    ):
        for node in nodes:
            if node.stage == stage and not store.why[node.id]:
                path = Path(node.content, file)
                here = "" if path.exists() else f"  (not here: dvc pull {node.dvc})"
                print(f"[done] {kind}: {path}{here}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Print the plan, or draw or write it."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--config", type=Path, default=chosen_config())
    flags.add_argument("--write", action="store_true", help="as DVC's plan stage")
    flags.add_argument(
        "--draw", type=Path, action="append", default=[], metavar="FILE.svg|FILE.png"
    )
    args = flags.parse_args(argv)
    store = Store(graph.build(args.config))
    if args.write:
        with apart_from_builds():
            rewritten = store.declare()
        if rewritten:
            raise UserError(
                "dvc.yaml",
                "was not the graph of the config; it has been rewritten",
                "run `dvc repro` again",
            )
        return 0
    with dvc_errors():
        store.sync()
    for target in args.draw:
        from scripts.lib.draw import draw

        states = {id: state_of(store, id) for id in store.graph.nodes}
        nodes = [
            {"id": id, "state": state, "note": note}
            for id, (state, note) in states.items()
        ]
        edges = [(p, n.id) for n in store.graph.nodes.values() for p in n.parents]
        draw(nodes, edges, target)
        print(target)
    if not args.draw:
        print("\n".join(lines(store, all_nodes=True)))
    return 0


if __name__ == "__main__":
    cli.run(main)
