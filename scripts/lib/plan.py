"""Show what will run and why, or draw it: nothing is built.

    python -m scripts.lib.plan --config config/config.yaml
    python -m scripts.lib.plan --config config/config.yaml --draw dag.svg --draw dag.png

With --write, as DVC's own `plan` stage calls it, only write dvc.yaml and
config/params.yaml from the config.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts.lib import cli, graph
from scripts.lib.errors import UserError
from scripts.lib.graph import Graph, Node
from scripts.lib.store import (
    CHANGED,
    HARMED,
    MAY,
    NEVER,
    STATE,
    Store,
    apart_from_builds,
    dvc_errors,
    is_held,
)

FEW, MANY = 3, 5
INDENT = 10
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


@dataclass
class Outlook:
    """What will happen to a node, and why; nothing else is known of it.

    `deps` are its inputs' digests where all of them are known already, `outs` those of
    what it will publish.
    """

    verb: str
    why: list[str]
    deps: dict[str, str] | None = None
    outs: dict[str, str] | None = None


def outlook(store: Store) -> dict[str, Outlook]:
    """What will happen to each node, as far as it can be known.

    More than the reasons of the store tell: what DVC's cache has of the same inputs is
    restored, and what reads it has known inputs too.
    """
    found: dict[str, Outlook] = {}
    for node in store.graph.nodes.values():
        reasons, record = store.why[node.id], store.records.get(node.id)
        if not reasons:
            outs = record.outs if record else None
            found[node.id] = Outlook("current", [], outs=outs)
            continue
        deps = foreseen(store, node, found)
        if deps is None:
            found[node.id] = Outlook(verb(reasons), reasons)
            continue
        own, after = store.own[node.id], []
        for artifact in node.artifacts:
            parent = str(store.graph.owner(artifact))
            if record and record.deps.get(artifact) != deps[artifact]:
                was = record.deps.get(artifact)
                how = f"{CHANGED}{since(store, found, artifact, was)}" if was else ""
                own = [*own, f"{parent} {how or 'is new to it'}"]
            elif found[parent].why:
                after.append(parent)
        own = list(dict.fromkeys(own))
        recorded = record.outs if record else None
        if not own:
            why = [f"stays as it is after {listed(after)}"]
            found[node.id] = Outlook("current", why, deps, recorded)
        elif verb(own) == "restore":
            found[node.id] = Outlook("restore", own, deps, recorded)
        elif before := store.made_before(node, deps):
            why = [r for r in own if r != NEVER] + ["DVC's cache has it"]
            found[node.id] = Outlook("restore", why, deps, before.outs)
        else:
            found[node.id] = Outlook("run", own, deps)
    return found


def since(store: Store, found: dict[str, Outlook], artifact: str, was: str) -> str:
    """Why an artifact is another than it was, as ` <- cause`, if DVC's cache tells.

    Its run cache has what the earlier one was made of.
    """
    node = store.graph.nodes[str(store.graph.owner(artifact))]
    old = store.made_as(node, artifact, was)
    if old is None:
        return ""
    if changes := store.changes(node, old):
        return f" <- {', '.join(changes)}"
    for path in node.artifacts:
        parent = str(store.graph.owner(path))
        outs = found[parent].outs or {}
        if (then := old.deps.get(path)) and then != outs.get(path):
            return f" <- {parent}{since(store, found, path, then)}"
    return ""


def foreseen(
    store: Store, node: Node, found: dict[str, Outlook]
) -> dict[str, str] | None:
    """The digests of what a node will read; None where a parent's is not known yet."""
    deps = {}
    for artifact in node.artifacts:
        outs = found[str(store.graph.owner(artifact))].outs
        if outs is None or artifact not in outs:
            return None
        deps[artifact] = outs[artifact]
    return deps | {file: store.digest(file) for file in node.files}


def explained(store: Store, found: dict[str, Outlook], id: str) -> str:
    """Why a node is not current; where its parents may change, down to the causes."""
    one = found[id]
    if one.verb != "may run":
        said = [r for r in one.why if not r.startswith(MAY)]
        return "; ".join(r.removesuffix(HARMED) for r in said)
    by_cause: dict[str, list[list[str]]] = {}
    for parent in store.graph.nodes[id].parents:
        if found[parent].outs is None:
            way = way_up(store, found, parent)
            by_cause.setdefault(way[-1], []).append(way)
    texts = []
    for cause, ways in by_cause.items():
        several = [way[0] for way in ways]
        shortest = min(ways, key=len)[1:]
        root = explained(store, found, cause).replace("; ", ", ")
        parts = [f"if {listed(several, 'or')} changes", *shortest, root]
        texts.append(" <- ".join(parts))
    return "; ".join(texts)


def way_up(store: Store, found: dict[str, Outlook], id: str) -> list[str]:
    """The shortest way from a node to one above, or itself, that runs in any case."""
    ways, seen = [[id]], {id}
    for way in ways:
        if found[way[-1]].verb != "may run":
            return way
        for parent in store.graph.nodes[way[-1]].parents:
            if found[parent].outs is None and parent not in seen:
                seen.add(parent)
                ways.append([*way, parent])
    raise AssertionError("what may run has a cause")


def listed(names: Sequence[str], word: str = "and") -> str:
    """`a, b and c`; of many, the first."""
    if len(names) > MANY:
        names = [*names[:FEW], f"{len(names) - FEW} more"]
        word = "and"
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else last


def lines(store: Store, all_nodes: bool) -> list[str]:
    """One line a node: what will happen, and the reasons."""
    found = outlook(store)
    ids = found if all_nodes else stale(store)
    width = max((len(id) for id in ids), default=0)
    return [
        f"{found[id].verb:8} {id:{width}}  {note(store, found, id)}".rstrip()
        for id in ids
    ]


def note(store: Store, found: dict[str, Outlook], id: str) -> str:
    """What else is to say of a node: why, and how it will run."""
    backend = store.graph.nodes[id].placement.get("backend")
    by = f"  (backend {backend})" if backend else ""
    if found[id].verb in RUNS and id in store.graph.shards:
        by = f"  (in {len(store.graph.shards[id])} jobs)"
    return explained(store, found, id) + by


def wrapped(rows: list[str]) -> list[str]:
    """Rows that fit the terminal; as they are where they go elsewhere."""
    if not sys.stdout.isatty():
        return rows
    width = max(60, shutil.get_terminal_size().columns)
    indent = " " * INDENT
    fold = partial(textwrap.wrap, width=width, subsequent_indent=indent)
    return [
        part
        for row in rows
        for part in (fold(row, break_on_hyphens=False) if len(row) > width else [row])
    ]


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
    budget = store.graph.budget
    if budget and budget.model_fields_set:
        from scripts.lib.estimate import Table

        table = Table(store)
        for line in [*table.basis(), *table.budget()]:
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
    flags.add_argument("--cluster", type=Path, help="its file: placed as there")
    flags.add_argument("--write", action="store_true", help="as DVC's plan stage")
    flags.add_argument(
        "--draw", type=Path, action="append", default=[], metavar="FILE.svg|FILE.png"
    )
    args = flags.parse_args(argv)
    store = Store(graph.build(args.config, args.cluster))
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
        from scripts.lib.estimate import Table

        print("\n".join(wrapped(Table(store).lines())))
    return 0


if __name__ == "__main__":
    cli.run(main)
