"""How two nodes differ, each with its ancestors: in one project, or at two commits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel import yaml as ruamel

from scripts.lib import lineage
from scripts.lib.errors import UserError
from scripts.lib.lineage import (
    METRICS,
    Entries,
    Row,
    Shelf,
    chain,
    commit,
    content_of,
    fit,
    main_out,
    owner,
    recorded,
    short,
)
from scripts.lib.run import git, number
from scripts.lib.settings import shown
from scripts.lib.stages import DATA, STAGES
from scripts.lib.store import LOCK, PARAMS, differences, load_yaml, read_lock

SECTIONS = ("nodes", "settings", "data", "models", "code", "environment", "scores")
"""What is compared, in the order shown; metrics come last."""
PASSING = {"started", "finished", "seconds", "gpu_hours", "resumed", "slurm_job"}
PASSING |= {"host", "git_commit", "git_dirty", "cpu_hours", "setup_seconds"}
"""What a provenance tells that makes no other node, or is shown otherwise."""
NEVER = "never built"
MADE_DATA = (*DATA, "rollouts")
"""Stages whose content is data, and no model."""


class Side:
    """One of the two: what is recorded of it and of all it comes from."""

    def __init__(self, given: str) -> None:
        revision, _, self.id = given.rpartition(":")
        self.name = given
        commit = resolved(revision) if revision else ""
        self.entries = self.read(commit)
        where = f"{LOCK} at {revision}" if revision else str(LOCK)
        self.shelf = Shelf()
        ids = chain(self.entries, self.id, where)
        self.rows = {id: lineage.row(self.entries, id, self.shelf) for id in ids}

    def read(self, commit: str) -> Entries:
        """What is built, and of what is only planned, what it would be made of."""
        files = [str(LOCK), "dvc.yaml", str(PARAMS)]
        try:
            if commit:
                lock, declared, params = (at(commit, file) for file in files)
                lock = lock.get("stages") or {}
            else:
                lock = read_lock()
                declared, params = load_yaml(Path("dvc.yaml")), load_yaml(PARAMS)
            planned = {
                f"{stage}-{name}": {
                    "deps": [{"path": p, "md5": "0" * 32} for p in deps],
                    "params": {str(PARAMS): {f"{stage}.{name}": settings}},
                }
                for stage, nodes in params.items()
                for name, settings in nodes.items()
                if f"{stage}-{name}" not in lock
                for deps in [declared["stages"][f"{stage}-{name}"].get("deps", [])]
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(self.name, f"not as DVC writes it: {error!r}") from error
        return {**planned, **lock}

    @property
    def row(self) -> Row:
        return self.rows[self.id]


def resolved(revision: str) -> str:
    """The commit that a revision means."""
    words = ["rev-parse", "--verify", "--quiet", "--end-of-options"]
    found = git(*words, f"{revision}^{{commit}}")
    if found is None:
        raise UserError(revision, "no such revision", "see git branch, git log")
    return found


def at(commit: str, file: str) -> Any:
    """A YAML file of the project at a commit; empty where there was none."""
    text = git("show", "--end-of-options", f"{commit}:./{file}")
    try:
        return ruamel.YAML(typ="safe").load(StringIO(text or "")) or {}
    except ruamel.error.YAMLError as error:
        what = str(error).splitlines()[0]
        raise UserError(f"{file} at {short(commit)}", f"not YAML: {what}") from error


def differences_of(first: str, second: str) -> dict[str, Any]:
    """What differs by section, each a list of lines; and which two were compared."""
    old, new = Side(first), Side(second)
    pairs, alone = paired(old, new)
    sections: dict[str, list[str]] = {name: [] for name in SECTIONS}
    sections["nodes"] = alone
    for name, of in (
        ("settings", settings), ("data", data), ("models", models), ("code", code),
        ("environment", environment),
    ):  # fmt: skip
        sections[name] = gathered(pairs, of)
    sections["scores"] = scores(old, new)
    sections["metrics"] = metrics(old, new, pairs)
    return {"a": first, "b": second, **sections}


def lines(found: dict[str, Any]) -> list[str]:
    """The comparison as text."""
    said = [f"{found['a']} -> {found['b']}"]
    for name, section in found.items():
        if isinstance(section, list) and (section or name != "nodes"):
            said.append(f"{name:12} {section[0] if section else 'the same'}")
            said += [f"{'':12} {line}" for line in section[1:]]
    return [part for line in said for part in fit(line, 15)]


def paired(old: Side, new: Side) -> tuple[list[tuple[Row, Row]], list[str]]:
    """Rows that stand for each other: of one name, or the only ones left of a stage."""
    partner = {id: id for id in new.rows if id in old.rows}
    partner |= {new.id: old.id}
    partner = {b: a for b, a in partner.items() if (b == new.id) == (a == old.id)}
    for stage in STAGES:
        left = [
            [id for id in side.rows if id.split("/")[0] == stage and id not in taken]
            for side, taken in ((old, {*partner.values()}), (new, {*partner}))
        ]
        if len(left[0]) == len(left[1]) == 1:
            partner[left[1][0]] = left[0][0]
    pairs = [(old.rows[partner[b]], row) for b, row in new.rows.items() if b in partner]
    alone = [
        f"{a}: only above {old.name}" for a in old.rows if a not in partner.values()
    ]
    alone += [f"{b}: only above {new.name}" for b in new.rows if b not in partner]
    return pairs, alone


def gathered(
    pairs: list[tuple[Row, Row]], of: Callable[[Row, Row], Iterator[str]]
) -> list[str]:
    """Each difference once, with the nodes that have it."""
    found: dict[str, list[str]] = {}
    for a, b in pairs:
        for what in of(a, b):
            found.setdefault(what, []).append(label(a, b))
    return [f"{what}  ({', '.join(ids)})" for what, ids in found.items()]


def label(a: Row, b: Row) -> str:
    """Two nodes, or the one that both are."""
    return a["node"] if a["node"] == b["node"] else f"{a['node']} | {b['node']}"


def settings(a: Row, b: Row) -> Iterator[str]:
    """`key old -> new`."""
    yield from differences(a["recipe"], b["recipe"])


def built(*rows: Row) -> bool:
    """Whether all of these were built."""
    return all(row["outs"] for row in rows)


def data(a: Row, b: Row) -> Iterator[str]:
    """Files of the project's own that were read, and what data stages made of them."""
    own = [{p: d for p, d in r["inputs"].items() if owner(p) is None} for r in (a, b)]
    if built(a, b):
        yield from changes(*own)
    if a["node"].split("/")[0] in MADE_DATA:
        yield from content(a, b)
        yield from differences(a["counts"], b["counts"])


def models(a: Row, b: Row) -> Iterator[str]:
    """What the other stages made."""
    if a["node"].split("/")[0] not in MADE_DATA:
        yield from content(a, b)


def content(a: Row, b: Row) -> Iterator[str]:
    """The digests of what two nodes made, where they differ."""
    one, other = (short(main_out(row)) or NEVER for row in (a, b))
    if main_out(a) != main_out(b) or not main_out(a):
        yield f"content {one} -> {other}"


def changes(old: dict[str, str], new: dict[str, str]) -> Iterator[str]:
    """Files whose digests differ."""
    for path in dict.fromkeys([*old, *new]):
        one, other = (side.get(path) for side in (old, new))
        if one != other:
            yield f"{path} {short(one or 'none')} -> {short(other or 'none')}"


def code(a: Row, b: Row) -> Iterator[str]:
    """Files of code that differ, as syntax."""
    yield from changes(a["code"], b["code"])


def environment(a: Row, b: Row) -> Iterator[str]:
    """Packages, locks, Python, container, machine, commit."""
    yield from differences(a["packages"], b["packages"])
    one, other = (row["made"] for row in (a, b))
    if not built(a, b):
        return
    if one is None or other is None:
        if one != other:
            yield "the rest is not known: a provenance.json is not at hand"
        return
    kept = [
        {k: v for k, v in made.items() if k not in PASSING} for made in (one, other)
    ]
    locks = [made.pop("environment", None) or {} for made in kept]
    yield from changes(*locks)
    yield from differences(kept[0], kept[1])
    if commit(one) != commit(other):
        yield f"commit {commit(one)} -> {commit(other)}"


def scores(old: Side, new: Side) -> list[str]:
    """Scores with their intervals: of a node, or else of an export of it."""
    (one, unread), (other, more) = scores_of(old), scores_of(new)
    said = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key, "none"), other.get(key, "none")
        said.append(f"{key}  {a} in both" if a == b else f"{key}  {a} -> {b}")
    said += [f"{id}: not at hand" for id in dict.fromkeys([*unread, *more])]
    return said or ["none: no eval node scored either"]


def scores_of(side: Side) -> tuple[dict[str, str], list[str]]:
    """{eval and task: score}, and the eval nodes whose scores are not at hand."""
    names = {side.id: main_out(side.row)}
    evals = []
    for key in side.entries:
        stage, _, name = key.partition("-")
        if stage in ("export", "eval"):
            record = recorded(side.entries, f"{stage}/{name}")
            if stage == "eval":
                evals.append((f"eval/{name}", record))
            elif record.outs and reads(record.deps, side.id, names[side.id]):
                id = f"export/{name}"
                names[id] = content_of(id, record.outs)
    found, unread = {}, []
    for id, record in evals:
        read = [n for n, md5 in names.items() if reads(record.deps, n, md5)]
        if not read or not record.outs:
            continue
        path = f"artifacts/{id}/scores/scores.json"
        held = side.shelf.data(record.outs, path)
        if held is None:
            unread.append(id)
            continue
        try:
            for row in held["scores"]:
                if row["model"] == read[0]:
                    low, high = (100 * float(x) for x in row["interval"])
                    text = f"{100 * float(row['score']):.1f}% ({low:.1f}-{high:.1f})"
                    by = "" if read[0] == side.id else f" as {read[0]}"
                    found[f"{id} {row['task']}"] = text + by
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(path, f"not of the scores' form: {error!r}") from error
    return found, unread


def reads(deps: dict[str, str], id: str, md5: str) -> bool:
    """Whether these inputs have this content of the node."""
    return bool(md5) and any(owner(p) == id and d == md5 for p, d in deps.items())


def metrics(old: Side, new: Side, pairs: list[tuple[Row, Row]]) -> list[str]:
    """Last lines of the metrics that differ, a node a line."""
    said = []
    for a, b in pairs:
        if not STAGES[a["node"].split("/")[0]].trains or not built(a, b):
            continue
        last = [
            side.shelf.last(row["outs"], f"artifacts/{row['node']}/{METRICS}")
            for side, row in ((old, a), (new, b))
        ]
        if last[0] == last[1]:
            continue
        keys = dict.fromkeys([*last[0], *last[1]])
        cells = [(key, *(figure(side.get(key)) for side in last)) for key in keys]
        told = [f"{k} {a} -> {b}" if a != b else f"{k} {a}" for k, a, b in cells]
        said.append(f"{label(a, b)}  {', '.join(told)}")
    return said


def figure(value: Any) -> str:
    """A number as short as it can be told."""
    return number(value) if isinstance(value, int | float) else shown(value)
